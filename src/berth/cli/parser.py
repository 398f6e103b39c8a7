"""How commands describe their arguments, and how their help looks. Built on argparse; `cli` only."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from berth.cli.output import columns, write
from berth.errors import InvalidArgumentError

Handler = Callable[[argparse.Namespace], int]
Configure = Callable[["Parser"], Handler]

# What the shell completion offers for an argument (cli/complete.py knows how).
MACHINE = "machine"
IMAGE = "image"
FILE = "file"
DIRECTORY = "directory"
ASSIGNMENT = "assignment"


class Parser(argparse.ArgumentParser):
    """The parser of one command. Errors are raised as InvalidArgumentError, with the command's help as the hint."""

    def __init__(self, command: str) -> None:
        super().__init__(
            prog=f"berth {command}".strip(), add_help=False, allow_abbrev=False, formatter_class=_Formatter
        )
        self.kinds: dict[str, str] = {}
        self.choices: dict[str, Sequence[str]] = {}
        self._arguments = self.add_argument_group("Arguments")
        self._options = self.add_argument_group("Options")

    def describe(
        self, text: str, *, examples: Iterable[tuple[str, str]] = (), more: str = "", listing: Sequence[str] = ()
    ) -> None:
        """Set the help's prose: paragraphs divided by blank lines, then examples (command, what it does).

        more: paragraphs after the examples. listing: lines after those, kept as they are.
        """
        self.description = _paragraphs(text)
        shown = [f"  {command}\n      {what}" for command, what in examples]
        parts = ["\n".join(["Examples:", *shown]) if shown else "", _paragraphs(more), "\n".join(listing)]
        self.epilog = "\n\n".join(part for part in parts if part)

    def argument(self, name: str, *, kind: str | None = None, **settings: Any) -> None:  # noqa: ANN401  (add_argument's own)
        """Add a positional argument. kind: what completion offers."""
        self._remember(self._arguments.add_argument(name, **settings), kind)

    def option(self, *flags: str, kind: str | None = None, **settings: Any) -> None:  # noqa: ANN401  (add_argument's own)
        """Add an option. kind: what completion offers for its value."""
        self._remember(self._options.add_argument(*flags, **settings), kind)

    def _remember(self, action: argparse.Action, kind: str | None) -> None:
        if kind:
            self.kinds[action.dest] = kind
        if action.choices is not None:
            self.choices[action.dest] = list(action.choices)

    def add_common(self, *, progress: bool = False) -> None:
        """Add what every command has, last: --progress where work may be long, --debug, --help."""
        if progress:
            self.option(
                "--progress", choices=("auto", "plain", "none"), default="auto", metavar="auto|plain|none",
                help="how to show what is going on: a moving line on a terminal and plain lines elsewhere (auto), "
                "plain lines always, or nothing",
            )  # fmt: skip
        self.option("--debug", action="store_true", help="say on stderr what is done, and show where errors come from")
        self.option("-h", "--help", action="help", help="show this help")

    def actions(self) -> list[argparse.Action]:
        """Return every argument and option, in order; for completion and tests."""
        return list(self._actions)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Read the words after the command. Options may stand before, between and after the arguments."""
        return self.parse_intermixed_args(list(words))

    def print_help(self, file: object = None) -> None:  # noqa: ARG002  (argparse's signature)
        write(self.format_help().encode())

    def error(self, message: str) -> NoReturn:
        raise InvalidArgumentError(message, hint=f"{self.prog} --help")


def add_format(parser: Parser) -> None:
    """Add what every list has."""
    parser.option("--format", choices=("table", "json"), default="table", metavar="table|json",
                  help="a table for people (default) or JSON for programs")  # fmt: skip
    parser.option("-q", "--quiet", action="store_true", help="print only the names, one a line")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with room to read: capital headings, options and their text in two columns, at most 100 wide."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=width())

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:  # noqa: ANN401
        super().add_usage(usage, actions, groups, "Usage: " if prefix is None else prefix)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # "-n, --name NAME" instead of "-n NAME, --name NAME".
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, action.metavar if isinstance(action.metavar, str) else action.dest.upper())
        return f"{', '.join(action.option_strings)} {value}"


def width() -> int:
    return max(60, min(100, columns(100)))


def _paragraphs(text: str) -> str:
    blocks = textwrap.dedent(text).strip("\n").split("\n\n")
    return "\n\n".join(
        textwrap.fill(" ".join(block.split()), width(), break_on_hyphens=False, break_long_words=False)
        for block in blocks
    )
