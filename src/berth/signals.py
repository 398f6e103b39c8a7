"""Signals as a stream of numbers that poll() can wait for. Owns the handlers for the time of a session; layer 1.

On the fast path of `berth run`: `_signal` is the C half of `signal`, whose Python half costs 5 ms (it brings `enum`).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal

# What a session passes on, or answers. By number: the numbers of this host, whatever it is.
NAMES: dict[int, str] = {
    int(getattr(signal, f"SIG{name}")): name
    for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "TSTP", "CONT", "WINCH")
}
_NUMBERS = {name: number for number, name in NAMES.items()}


class SignalStream:
    """Catches the signals in NAMES while a block runs; `fileno` becomes readable and `take` names them in order.

    A signal that was ignored when we came stays ignored (nohup, a shell's background job). Outside the main thread
    Python can't handle signals: nothing is caught then, and `fileno` is -1.
    """

    def __init__(self) -> None:
        self._pipe = (-1, -1)
        self._old_wakeup = -1
        self._old: dict[int, object] = {}

    def __enter__(self) -> SignalStream:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        self._pipe = (reader, writer)
        try:
            self._old_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        except ValueError:
            self._close()
            return self
        for number in NAMES:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, _wake)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe[0] < 0:
            return
        for number, handler in self._old.items():
            # None: a handler that was not made by Python can't be put back by Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._old.clear()
        signal.set_wakeup_fd(self._old_wakeup)
        self._close()

    def fileno(self) -> int:
        """Return the descriptor that is readable when signals have come, or -1."""
        return self._pipe[0]

    def take(self) -> list[str]:
        """Return the names of the signals that came since the last call."""
        try:
            numbers = os.read(self._pipe[0], 4096)
        except BlockingIOError:
            return []
        return [NAMES[number] for number in numbers if number in NAMES]

    def stop_process(self) -> None:
        """Stop this process, as SIGTSTP would if nobody caught it; returns when it is continued.

        At once where the kernel ignores it: in a process group that no shell controls.
        """
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, _wake)

    def _close(self) -> None:
        for fd in self._pipe:
            os.close(fd)
        self._pipe = (-1, -1)


def number_of(name: str) -> int:
    """Return this host's number of a signal in NAMES."""
    return _NUMBERS[name]


def _wake(_number: int, _frame: object) -> None:
    """Do nothing: that there is a handler makes the interpreter write the number into the wake-up pipe."""
