"""The help of `berth run`, from the table by which cli/run.py reads its words. Also serves completion."""

from __future__ import annotations

import argparse

from berth.cli import run
from berth.cli.parser import DIRECTORY, FILE, MACHINE, Handler, Parser

# member -> (what its value is called, what completion offers, help)
_WORDS: dict[str, tuple[str, str | None, str]] = {
    "name": ("NAME", MACHINE, "the machine; without it the default machine"),
    "interactive": ("", None, "accepted as docker has it; stdin is always the command's"),
    "tty": ("", None, "give the command a terminal even where stdin or stdout is none"),
    "detach": ("", None, "return at once and print the machine's name; the command goes on, with no input or output"),
    "root": ("", None, "run as root"),
    "user": ("USER[:GROUP]", None, "run as this user of the machine, by name or number"),
    "uid": ("UID", None, "run as the user of this number"),
    "gid": ("GID", None, "run with the group of this number"),
    "workdir": ("DIR", DIRECTORY, "run in this directory of the machine"),
    "env": ("K=V|K", None, "set an environment variable; K alone copies yours; may be given again"),
    "env_file": ("FILE", FILE, "set those in a file, one a line; may be given again"),
    "shell": ("", None, "have your login shell in the machine evaluate the command"),
    "progress": ("auto|plain|none", None, "how to show a boot that is needed first"),
    "debug": ("", None, "say on stderr what is done, and show where errors come from"),
    "help": ("", None, "show this help"),
}


def _configure(parser: Parser) -> Handler:
    parser.usage = "berth run [OPTION …] [--] [COMMAND [ARGUMENT …]]"
    parser.describe(
        """
        Runs a command in a machine, which is booted first if it is stopped. It runs as your user's twin in the
        machine, and in your working directory where that is mounted there (else in the home). Without a command it
        opens a login shell.

        Every argument arrives exactly as it is. Only a single argument that has white space or shell characters in it
        is evaluated by the login shell, and with --shell any command is. Options stand before the command; what
        stands behind its name belongs to it.

        When stdin and stdout are terminals the command has one too: Ctrl-C, job control, the window's size and
        full-screen programs work. When they are not, input and output pass byte for byte, and stdout and stderr stay
        apart.
        """,
        examples=(
            ("berth run", "a shell"),
            ("cd ~/project && berth run make -j4", "the same directory, the same files"),
            ("berth run 'ps aux | wc -l'", "one argument with a pipe in it: evaluated by the shell in the machine"),
            ("berth run --root apt-get install -y nginx", "as root"),
            ("tar c src | berth run -n dev tar x -C /srv", "through pipes"),
            ("berth run -d -- python3 -m http.server", "in the background"),
        ),
        more="""
        Exit status: the command's own, 128+N when signal N ended it; 127 when it is not found, 126 when it can't be
        executed, 125 when berth failed, 2 for wrong usage.

        The environment has TERM and COLORTERM of yours when there is a terminal, LANG=C.UTF-8 unless the machine's
        configuration sets one, and what -e and --env-file say. Your SSH agent is reachable in the machine.
        """,
    )
    for flags, dest, valued in run.OPTIONS:
        metavar, kind, words = _WORDS[dest]
        if valued:
            parser.option(*flags, dest=dest, metavar=metavar, help=words, kind=kind)
        else:
            parser.option(*flags, dest=dest, action="store_true", help=words)
    parser.choices["progress"] = ("auto", "plain", "none")
    return _unused


def _unused(_args: argparse.Namespace) -> int:
    raise AssertionError("cli/run.py reads the words of run")


COMMANDS = {"run": _configure}
