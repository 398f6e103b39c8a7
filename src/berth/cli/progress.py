"""How long work looks on stderr: one moving line on a terminal, plain lines elsewhere. `cli` only.

Own code, and not `rich`: importing rich costs 21 to 50 ms of a create that takes 300, for one line that moves.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from typing import TextIO

from berth.cli.ending import colour_wanted
from berth.cli.output import columns as terminal_columns
from berth.progress import Progress, Silent
from berth.units import format_size

_REDRAW_S = 0.1
_PLAIN_S = 10.0  # how often a transfer says a line where nothing can move
_RATE_S = 3.0  # the rate is that of the last seconds
_BAR = 20  # letters


@contextlib.contextmanager
def display(mode: str) -> Generator[Progress]:
    """Show progress until the block ends. mode: auto, plain, none."""
    stream = sys.stderr
    if mode == "none":
        yield Silent()
    elif mode == "auto" and stream.isatty():
        bar = Bar(stream)
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield Lines(stream)


class Lines:
    """Progress in plain lines, for logs."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._transfer = Transfer(clock)
        self._step = ""
        self._said = clock()

    def step(self, text: str) -> None:
        self._step, self._transfer, self._said = text, Transfer(self._clock), self._clock()
        self._print(f"{text} …")

    def advance(self, done: int, total: int | None) -> None:
        self._transfer.update(done, total)
        if self._clock() - self._said >= _PLAIN_S:
            self._said = self._clock()
            self._print(f"{self._step}: {self._transfer.describe()}")

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(f"{_printable(text)}\n")
            self._stream.flush()


class Bar:
    """Progress as one line that is drawn again and again, and gone at the end."""

    def __init__(
        self, stream: TextIO, clock: Callable[[], float] = time.monotonic, columns: Callable[[], int] | None = None
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._bold = colour_wanted(stream)
        self._columns = columns or terminal_columns
        self._transfer = Transfer(clock)
        self._step = ""
        self._drawn = -1.0

    def step(self, text: str) -> None:
        self._step, self._transfer = text, Transfer(self._clock)
        self._draw()

    def advance(self, done: int, total: int | None) -> None:
        self._transfer.update(done, total)
        if self._clock() - self._drawn >= _REDRAW_S:
            self._draw()

    def note(self, text: str) -> None:
        self._write(f"\r\033[K{_printable(text)}\n")
        if self._step:
            self._draw()

    def close(self) -> None:
        """Take the line away."""
        if self._step:
            self._write("\r\033[K")
            self._step = ""

    def _draw(self) -> None:
        self._drawn = self._clock()
        tail = self._transfer.describe()
        room = self._columns() - 1
        line = _printable(f"{self._step}  {tail}" if tail else f"{self._step} …")[:room]
        if self._bold and line.startswith(self._step):
            line = f"\033[1m{self._step}\033[m{line[len(self._step) :]}"
        self._write(f"\r\033[K{line}")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


class Transfer:
    """How far one step is: bytes, rate, time left. Pure but for its clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: list[tuple[float, int]] = []
        self._total: int | None = None

    def update(self, done: int, total: int | None) -> None:
        now = self._clock()
        self._total = total
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] > _RATE_S:
            del self._samples[0]

    def describe(self) -> str:
        """Say ``[#####    ]  45%  12M/27M  8.1M/s  0:02 left``; what isn't known is left out."""
        if not self._samples:
            return ""
        done, rate = self._samples[-1][1], self._rate()
        speed = f"  {format_size(int(rate))}/s" if rate >= 1 else ""
        if not self._total:
            return f"{format_size(done)}{speed}"
        share = min(1.0, done / self._total)
        bar = ("#" * int(share * _BAR)).ljust(_BAR)
        left = f"  {_duration((self._total - done) / rate)} left" if rate >= 1 and done < self._total else ""
        return f"[{bar}] {share:4.0%}  {format_size(done)}/{format_size(self._total)}{speed}{left}"

    def _rate(self) -> float:
        """Return bytes per second over the last samples; 0 while nobody can tell."""
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return max(0.0, (after - before) / (end - start)) if end - start >= _REDRAW_S else 0.0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
