"""The table of all commands, the finding of one by its words, and the help above them. `cli` only.

Each entry names the module that configures it; that module is imported only when its command is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import cast

from berth.cli.ending import EXIT_USAGE, say, show_traceback
from berth.cli.parser import Configure, Handler, Parser
from berth.errors import InvalidArgumentError
from berth.version import VERSION


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One command. name: its words; module: in berth.cli; aliases: other last words."""

    name: str
    module: str
    summary: str
    aliases: tuple[str, ...] = ()

    @property
    def noun(self) -> str:
        return self.name.rpartition(" ")[0]

    @property
    def verb(self) -> str:
        return self.name.rpartition(" ")[2]


MACHINES = (
    Entry("create", "create", "make a machine from an image and boot it"),
    Entry("run", "runhelp", "run a command or a shell in a machine"),
    Entry("ls", "show", "list the machines", ("list",)),
    Entry("inspect", "show", "show all there is to know about a machine, as JSON"),
    Entry("set", "configure", "change a machine's configuration"),
    Entry("set-default", "configure", "choose the machine that is meant when none is named"),
    Entry("start", "state", "boot machines"),
    Entry("stop", "state", "shut machines down"),
    Entry("restart", "state", "shut machines down and boot them again"),
    Entry("rm", "state", "delete machines with their storage", ("delete",)),
    Entry("logs", "show", "show what a machine's console and services wrote"),
    Entry("wait", "show", "wait until a machine answers or has settled"),
)
IMAGES = (
    Entry("build", "build", "build an image from a Dockerfile"),
    Entry("commit", "commit", "make an image of a machine"),
    Entry("image ls", "image", "list the images in the store", ("list",)),
    Entry("image pull", "image", "bring an image into the store"),
    Entry("image push", "image", "put an image into a registry"),
    Entry("image inspect", "image", "show an image, as JSON"),
    Entry("image tag", "image", "give an image another name"),
    Entry("image rm", "image", "remove images", ("delete",)),
    Entry("image prune", "image", "remove what no image and no machine needs"),
    Entry("image load", "image", "read images from an archive"),
    Entry("image save", "image", "write images to an archive"),
    Entry("image import", "image", "make an image from a root file system"),
    Entry("login", "registry", "log in to a registry"),
    Entry("logout", "registry", "log out of a registry"),
)
SYSTEM = (
    Entry("system check", "system", "say what berth needs on this host and what is missing", ("doctor",)),
    Entry("system df", "system", "show how much disk berth uses"),
    Entry("system prune", "system", "remove what nothing needs any more"),
    Entry("system start", "system", "start the machines marked autostart"),
    Entry("system stop", "system", "stop the machines marked autostart"),
    Entry("system status", "system", "show the machines marked autostart"),
    Entry("system autostart", "system", "start them with the login or the host, or no longer"),
    Entry("system kernel", "system", "show, fetch and choose the kernels that VMs boot"),
    Entry("completion", "completion", "print the completion script for a shell"),
)

_GROUPS = (("Machines", MACHINES), ("Images", IMAGES), ("System", SYSTEM))
_ALL = (*MACHINES, *IMAGES, *SYSTEM)
NOUNS = {
    "machine": MACHINES,
    "m": MACHINES,
    "image": tuple(entry for entry in IMAGES if entry.noun),
    "system": tuple(entry for entry in SYSTEM if entry.noun),
}
# Words that mean a command of another noun.
_SHORTCUTS = {"doctor": "system check", "images": "image ls"}


def names() -> dict[str, Entry]:
    """Return every spelling of every command, without the noun `machine`: ``ls``, ``list``, ``image ls`` …"""
    found = {entry.name: entry for entry in _ALL}
    for entry in _ALL:
        found |= {f"{entry.noun} {alias}".strip(): entry for alias in entry.aliases}
    return found | {word: found[name] for word, name in _SHORTCUTS.items()}


def find(words: Sequence[str]) -> tuple[Entry, list[str]]:
    """Return the command that `words` begin with, and the words that follow it. Raises InvalidArgumentError."""
    spellings = names()
    first, rest = words[0], list(words[1:])
    if first not in NOUNS:
        if first in spellings:
            return spellings[first], rest
        raise _unknown(first, [name.split()[0] for name in spellings] + ["machine"])
    prefix = "" if first in ("machine", "m") else f"{first} "
    if not rest or rest[0].startswith("-"):
        raise InvalidArgumentError(f"'berth {first}' needs a command", hint=f"berth {first} --help")
    valid = [entry.verb for entry in NOUNS[first]] + [alias for entry in NOUNS[first] for alias in entry.aliases]
    if rest[0] not in valid:
        raise _unknown(rest[0], valid, noun=first)
    return spellings[prefix + rest[0]], rest[1:]


def _unknown(word: str, valid: Sequence[str], *, noun: str = "") -> InvalidArgumentError:
    import difflib  # for a mistake only

    close = difflib.get_close_matches(word, valid, 1, 0.7)
    what = f"unknown option {word}" if word.startswith("-") else f"unknown command '{f'{noun} {word}'.strip()}'"
    said = f"berth {noun}".strip()
    return InvalidArgumentError(what, hint=f"did you mean '{said} {close[0]}'?" if close else f"{said} --help")


def dispatch(words: Sequence[str], *, debug: bool) -> int:
    """Run the command that `words` name, any but `run` (`main` knows that one); return its exit status."""
    if words[0] in ("--version", "-V", "version"):
        return _print(f"berth {VERSION}")
    if words[0] in ("--help", "-h", "help"):
        return show_help(*words[1:])
    if words[0] in NOUNS and words[1:2] in (["-h"], ["--help"], ["help"]):
        return _print(overview(words[0]))
    if len(words) == 1 and words[0] in NOUNS:
        say(overview(words[0]))
        return EXIT_USAGE
    entry, rest = find(words)
    parser, handler = build(entry)
    args = parser.parse(rest)
    from berth import log

    log.configure(debug=debug or args.debug)
    if args.debug and not debug:
        return _debugged(handler, args)
    return handler(args)


def _debugged(handler: Handler, args: argparse.Namespace) -> int:
    """Show where an error comes from, for a --debug that stands behind the command."""
    try:
        return handler(args)
    except Exception as error:
        show_traceback(error)
        raise


def build(entry: Entry) -> tuple[Parser, Handler]:
    """Make the parser of a command; return it with what runs the command."""
    module = importlib.import_module(f"berth.cli.{entry.module}")
    configure = cast("Mapping[str, Configure]", module.COMMANDS)[entry.name]
    parser = Parser(entry.name)
    return parser, configure(parser)


def show_help(*words: str) -> int:
    """Print the help of the command that `words` name, or that of berth."""
    plain = [word for word in words if not word.startswith("-")]
    if not plain:
        return _print(overview())
    if len(plain) == 1 and plain[0] in NOUNS:
        return _print(overview(plain[0]))
    return _print(build(find(plain)[0])[0].format_help().rstrip("\n"))


def overview(noun: str = "") -> str:
    """Return the help above the commands: of all of berth, or of one noun."""
    if noun:
        lines = [f"Usage: berth {noun} COMMAND [ARGUMENT …]", "", "Commands:"]
        return "\n".join([*lines, *_listing(NOUNS[noun], short=True), "", f"berth {noun} COMMAND --help says more."])
    lines = [
        "Usage: berth [--debug] [COMMAND [ARGUMENT …]]",
        "",
        "Linux machines that feel like an extension of your own computer: made from an",
        "image in seconds, with their own init and services, and with your user, your",
        "home and your working directory in them.",
        "",
        "  berth create debian:12 --name dev    make a machine",
        "  berth run make                       run a command in it, in this directory",
        "  berth                                open a shell in it",
    ]
    for title, entries in _GROUPS:
        lines += ["", f"{title}:", *_listing(entries)]
    return "\n".join(
        [
            *lines,
            "",
            "Options:",
            "  --debug                 say on stderr what is done and where errors come from",
            "  -V, --version           print the version",
            "  -h, --help              show this help; behind a command, that command's",
            "",
            "Machine commands may also be written 'berth machine COMMAND', 'berth m COMMAND'.",
            "Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted; that of 'run' is",
            "the command's own.",
            "Something is missing? 'berth system check' says what, and what to type.",
        ]
    )


def _listing(entries: Sequence[Entry], *, short: bool = False) -> list[str]:
    return [
        f"  {', '.join([entry.verb if short else entry.name, *entry.aliases]):22}  {entry.summary}" for entry in entries
    ]


def _print(text: str) -> int:
    from berth.cli.output import emit

    emit(text)
    return 0
