"""The terminal that a person sits at. Owns raw mode and the window's size; used by `session` and `cli`; layer 3."""

from __future__ import annotations

import os
import termios

from berth.wire.messages import TerminalSize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FALLBACK = TerminalSize(rows=24, cols=80)


def window_size(fd: int) -> TerminalSize:
    """Return the size of the terminal `fd`; 24 x 80 where it has none (a serial line, a fresh pty)."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return _FALLBACK
    if not (0 < size.lines <= 65535 and 0 < size.columns <= 65535):
        return _FALLBACK
    return TerminalSize(rows=size.lines, cols=size.columns)


def environment() -> tuple[bytes, ...]:
    """Return what a command in the guest should know of this terminal, as ``K=V``."""
    return tuple(
        name + b"=" + os.environb[name] for name in (b"TERM", b"COLORTERM") if os.environb.get(name)
    )  # fmt: skip


class RawMode:
    """Keeps a terminal in raw mode while a block runs: keys, ^C and ^Z included, travel as bytes.

    The old mode comes back however the block ends. `suspend` and `resume` are for a stop in between (job control).
    What is no terminal is left alone.
    """

    def __init__(self, fd: int | None) -> None:
        self.fd = -1 if fd is None else fd
        self._cooked: list[Any] | None = None

    def __enter__(self) -> RawMode:
        if self.fd >= 0 and os.isatty(self.fd):
            self._cooked = termios.tcgetattr(self.fd)
            self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.suspend()
        self._cooked = None

    @property
    def is_raw(self) -> bool:
        """Say whether there is a terminal, in raw mode while the block runs."""
        return self._cooked is not None

    def resume(self) -> None:
        """Enter raw mode. Source: cfmakeraw in termios(3)."""
        if self._cooked is None:
            return
        inputs, outputs, control, local, ispeed, ospeed, characters = self._cooked
        inputs &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
        )  # fmt: skip
        local &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        characters = list(characters)
        characters[termios.VMIN], characters[termios.VTIME] = 1, 0
        raw = [inputs, outputs & ~termios.OPOST, (control & ~(termios.CSIZE | termios.PARENB)) | termios.CS8, local]
        # TCSANOW: what was typed ahead is for the command.
        termios.tcsetattr(self.fd, termios.TCSANOW, [*raw, ispeed, ospeed, characters])

    def suspend(self) -> None:
        """Give the terminal its old mode back, when it is still ours to set."""
        if self._cooked is None:
            return
        # From the background this would stop us (SIGTTOU), and the terminal is somebody else's by then.
        if self._is_in_foreground():
            try:  # noqa: SIM105 (contextlib would cost the fast path 2 ms)
                termios.tcsetattr(self.fd, termios.TCSADRAIN, self._cooked)
            except termios.error:
                pass  # it hung up: there is no mode to restore

    def _is_in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self.fd) == os.getpgrp()
        except OSError:
            return True  # not our controlling terminal: it knows no background
