"""`berth __complete WORD…`: how a command line may go on. For the scripts in cli/completion.py; `cli` only.

The words are those after `berth`, the last being typed (maybe empty). Prints "CANDIDATE<TAB>DESCRIPTION" lines and,
where names of files belong, ":file" or ":directory". Never fails: a shell that asks wants silence instead.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence

from berth.cli import commands
from berth.cli import parser as kinds
from berth.cli.output import emit
from berth.cli.parser import Parser
from berth.config import HOME_MOUNTS, KEYS
from berth.errors import BerthError
from berth.layout import Layout
from berth.names import parse_machine_name

_KEY_VALUES = {"home-mount": HOME_MOUNTS}


def main(words: Sequence[str]) -> int:
    seen: set[str] = set()
    with contextlib.suppress(BerthError, OSError):
        for candidate in candidates(list(words) or [""]):
            if candidate not in seen:
                seen.add(candidate)
                emit(candidate)
    return 0


def candidates(words: Sequence[str]) -> Iterator[str]:
    """Give what the last of `words` may become."""
    before, current = list(words[:-1]), words[-1]
    while before and before[0] == "--debug":
        del before[0]
    if not before:
        return _matching(current, _first_words())
    if before[0] in commands.NOUNS and len(before) == 1:
        entries = commands.NOUNS[before[0]]
        return _matching(current, [f"{entry.verb}\t{entry.summary}" for entry in entries])
    entry, rest = commands.find(before)
    return _matching(current, _of_command(commands.build(entry)[0], rest, current, is_run=entry.name == "run"))


def _first_words() -> Iterator[str]:
    for entry in (*commands.MACHINES, *commands.IMAGES, *commands.SYSTEM):
        if not entry.noun:
            yield f"{entry.name}\t{entry.summary}"
    yield from ("image\tcommands for images", "system\tcommands for this host", "machine\tcommands for machines")
    yield from ("--help\tshow help", "--version\tprint the version", "--debug\tsay what is done")


def _of_command(parser: Parser, rest: Sequence[str], current: str, *, is_run: bool) -> Iterator[str]:
    options = {flag: action for action in parser.actions() for flag in action.option_strings}
    plain = 0  # arguments that are no options, so far
    waiting: argparse.Action | None = None  # an option whose value is next
    ended = False
    for word in rest:
        if waiting is not None:
            waiting = None
        elif word == "--" and not ended:
            ended = True
        elif word.startswith("-") and len(word) > 1 and not ended:
            found = options.get(word if word.startswith("--") else f"-{word[-1]}")
            waiting = found if found is not None and found.nargs != 0 and "=" not in word else None
        else:
            plain += 1
            ended = ended or is_run
    if waiting is not None:
        return _values(parser, waiting, current)
    flag, equals, value = current.partition("=")
    if equals and not ended and flag in options:
        return (f"{flag}={item}" for item in _values(parser, options[flag], value) if not item.startswith(":"))
    if is_run and (plain or ended or not current.startswith("-")):
        return iter((":file",))
    if current.startswith("-") and not ended:
        return (f"{flag}\t{action.help}" for flag, action in options.items())
    return _positional(parser, plain, current)


def _positional(parser: Parser, index: int, current: str) -> Iterator[str]:
    actions = [action for action in parser.actions() if not action.option_strings]
    if not actions:
        return iter(())
    action = actions[min(index, len(actions) - 1)]
    if index >= len(actions) and action.nargs not in ("*", "+"):
        return iter(())
    return _values(parser, action, current)


def _values(parser: Parser, action: argparse.Action, current: str) -> Iterator[str]:
    """Give what an option's value or an argument may be."""
    if action.dest in parser.choices:
        return iter(parser.choices[action.dest])
    match parser.kinds.get(action.dest):
        case kinds.MACHINE:
            return _machines()
        case kinds.IMAGE:
            return _images(current)
        case kinds.ASSIGNMENT:
            return _assignments(current)
        case kinds.FILE:
            return iter((":file",))
        case kinds.DIRECTORY:
            return iter((":directory",))
        case _:
            return iter(HOME_MOUNTS if action.dest == "home_mount" else ())


def _machines() -> Iterator[str]:
    with contextlib.suppress(OSError):
        for path in sorted(Layout.from_environment().machines.iterdir()):
            with contextlib.suppress(BerthError):
                yield parse_machine_name(path.name)


def _images(current: str) -> Iterator[str]:
    from berth.cli.image import familiar_name
    from berth.images import Images

    for image in Images(Layout.from_environment()).list():
        name = familiar_name(image)
        if image.reference:
            yield name if name.startswith(current) else image.reference
    if not current or current.startswith(("oci", "docker-archive", "rootfs", "bootstrap")):
        yield from ("oci:", "oci-archive:", "docker-archive:", "rootfs:", "bootstrap:debian/")
    if current.partition(":")[0] in ("oci", "oci-archive", "docker-archive", "rootfs") and ":" in current:
        yield ":file"


def _assignments(current: str) -> Iterator[str]:
    name, equals, _ = current.partition("=")
    for key in KEYS:
        if not equals:
            yield f"{key.name}=\t{key.help}"
        elif name == key.name:
            values = ("true", "false") if key.metavar == "BOOL" else _KEY_VALUES.get(key.name, ())
            yield from (f"{key.name}={value}" for value in values)


def _matching(current: str, found: Sequence[str] | Iterator[str]) -> Iterator[str]:
    return (item for item in found if item.startswith(current) or item in (":file", ":directory"))
