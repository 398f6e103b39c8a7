"""What several commands share: the machines, the same deed for many names, a question to the person. `cli` only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from berth.cli.ending import show_error
from berth.cli.output import emit
from berth.cli.parser import MACHINE, Parser
from berth.errors import BerthError, InvalidArgumentError
from berth.layout import Layout
from berth.names import MachineName, parse_machine_name

if TYPE_CHECKING:
    from berth.lifecycle import Machines


def machines() -> Machines:
    from berth.lifecycle import Machines

    return Machines(Layout.from_environment())


def add_name(parser: Parser, help: str = "the machine; without it the default machine") -> None:
    parser.argument("name", nargs="?", metavar="NAME", kind=MACHINE, help=help)


def add_names(parser: Parser, *, help: str, all_help: str) -> None:
    parser.argument("names", nargs="*", metavar="NAME", kind=MACHINE, help=help)
    parser.option("--all", action="store_true", help=all_help)


def resolve(given: str | None) -> MachineName:
    """Return the machine that a command means. Raises NotFoundError, InvalidArgumentError."""
    return machines().resolve(None if given is None else parse_machine_name(given))


def chosen(args: argparse.Namespace, everyone: Callable[[], Sequence[MachineName]]) -> list[MachineName]:
    """Return the machines of a command that takes many: those named, all of them, or the default machine."""
    named: list[str] = args.names
    if args.all and named:
        raise InvalidArgumentError("names and --all can't be used together", hint="give names, or --all")
    if args.all:
        return list(everyone())
    if not named:
        return [resolve(None)]
    return [parse_machine_name(name) for name in dict.fromkeys(named)]


def for_each(names: Sequence[MachineName], deed: Callable[[MachineName], object]) -> int:
    """Do the deed for every name and print the names of those done; an error of one doesn't keep the others from it."""
    status = 0
    for name in names:
        try:
            deed(name)
        except BerthError as error:
            if len(names) == 1:
                raise
            status = show_error(error)
        else:
            emit(name)
    return status


def can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str) -> bool:
    """Ask the person, on stderr; anything but y and yes is no."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
