"""What goes to stdout: tables for people, JSON for programs, names for scripts; and how wide it may be. `cli` only."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Sequence

from berth.cli.ending import colour_wanted
from berth.units import format_size

_COLOURS = {"running": "32", "starting": "33", "stopping": "33", "broken": "31", "ok": "32", "missing": "31",
            "warning": "33"}  # fmt: skip


def emit(line: str) -> None:
    """Print one line on stdout. Bytes of a name that are no UTF-8 leave as they came."""
    write(line.encode("utf-8", "surrogateescape") + b"\n")


def write(data: bytes) -> None:
    """Write to stdout, whole and at once. Raises BrokenPipeError when the reader has left."""
    # The descriptor and not sys.stdout: nothing is left in a buffer to fail at exit, when nobody can tell any more.
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest) :]


def emit_json(document: object) -> None:
    """Print a JSON document, indented. ASCII only, so it survives every terminal, pipe and locale."""
    emit(json.dumps(document, indent=2))


def emit_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, coloured: str | None = None) -> None:
    """Print rows under headings, columns apart by three blanks where there is room; an empty cell shows as `-`.

    coloured: the heading of the column whose words (running, broken, ok, …) get a colour on a terminal.
    """
    table = [list(headings), *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    gap = " " * _gap(widths)
    paint = headings.index(coloured) if coloured and colour_wanted(sys.stdout) else -1
    for row in table:
        cells = [cell.ljust(size) for cell, size in zip(row, widths, strict=True)]
        if paint >= 0 and row[paint] in _COLOURS:
            cells[paint] = f"\033[{_COLOURS[row[paint]]}m{cells[paint]}\033[m"
        emit(gap.join(cells).rstrip())


def columns(otherwise: int = 80) -> int:
    """Return how wide the terminal is that we write to, `otherwise` where there is none. COLUMNS goes before.

    What shutil.get_terminal_size does, but for stderr as well; importing shutil costs each command 2 ms.
    """
    with contextlib.suppress(KeyError, ValueError):
        if (said := int(os.environ["COLUMNS"])) > 0:
            return said
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            return os.get_terminal_size(fd).columns or otherwise
    return otherwise


def _gap(widths: Sequence[int]) -> int:
    """Choose how far columns stand apart: three blanks, on a narrow terminal fewer, so that rows stay whole."""
    if not os.isatty(1):
        return 3
    room = columns() - sum(widths)
    return max(1, min(3, room // max(1, len(widths) - 1)))


def _cell(text: str) -> str:
    shown = "".join(letter if letter.isprintable() or "\udc80" <= letter <= "\udcff" else "?" for letter in text)
    return shown or "-"


def size_cell(size: int | None) -> str:
    return "" if size is None else format_size(size)


def time_cell(time: str | None) -> str:
    """Show an RFC 3339 time in local time, to the minute; what is no time stands as it is."""
    if not time:
        return ""
    try:
        moment = datetime.datetime.fromisoformat(time)
    except ValueError:
        return time
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")
