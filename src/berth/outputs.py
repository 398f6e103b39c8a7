"""Descriptors that bytes are written to without ever waiting. Owns how an inherited one is written to; layer 1.

Used by `session`. stdout and stderr come from whoever started us, and their open file descriptions are shared with
them: O_NONBLOCK set there would hit the shell, or its other programs. So each kind is written to in its own way:

    pipe, terminal   opened once more through /proc/self/fd, which gives a description of our own, non-blocking
    socket           send(MSG_DONTWAIT)
    file, /dev/null  plain write: they don't block in the sense of poll
    what is left     (a pipe of another user's, no /proc) up to 4096 bytes after poll said that it is ready
"""

from __future__ import annotations

import os
import sys
from stat import S_ISCHR, S_ISFIFO, S_ISSOCK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Output(Protocol):
        """Takes bytes, keeps what it can't pass on yet; counts what left our hands."""

        @property
        def error(self) -> OSError | None:
            """Why it takes no more; BrokenPipeError when its reader went away. What is written then is dropped."""
            ...

        @property
        def is_pending(self) -> bool:
            """Say whether something is kept: wait for `fileno` to be writable and call `flush`."""
            ...

        def fileno(self) -> int:
            """Return the descriptor to wait for."""
            ...

        def write(self, data: memoryview) -> int:
            """Take all of `data`; return how many bytes went on (the rest is copied and kept)."""
            ...

        def flush(self) -> int:
            """Pass on what is kept, as far as it goes; return how many bytes went on."""
            ...

        def close(self) -> None:
            """Close what is our own; never the descriptor that was given."""
            ...


_WIDE_PIPE = 262144
_SAFE_WRITE = 4096  # PIPE_BUF: a pipe that poll calls writable takes so much without blocking; pipe(7)


class FdOutput:
    """Writes to a descriptor of somebody else's; see Output for the methods."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._own = -1
        self._pending: list[memoryview] = []
        self._must_poll = False
        self._widened = False
        self.error: OSError | None = None
        self._write = self._choose()

    @property
    def is_pending(self) -> bool:
        return bool(self._pending)

    def fileno(self) -> int:
        return self._own if self._own >= 0 else self._fd

    def write(self, data: memoryview) -> int:
        if self.error is not None:
            return len(data)
        sent = 0 if self._pending or self._must_poll else self._send(data)
        if sent < len(data) and self.error is None:
            self._pending.append(memoryview(bytes(data[sent:])))
            return sent
        return len(data)

    def flush(self) -> int:
        total = 0
        while self._pending:
            data = self._pending[0]
            sent = self._send(data[:_SAFE_WRITE] if self._must_poll else data)
            if self.error is not None:
                total += sum(len(kept) for kept in self._pending)
                self._pending.clear()
                break
            total += sent
            if sent < len(data):
                self._pending[0] = data[sent:]
                break
            del self._pending[0]
            if self._must_poll:
                break
        return total

    def close(self) -> None:
        if self._own >= 0:
            os.close(self._own)
            self._own = -1
            self.error = self.error or BrokenPipeError()

    def _send(self, data: memoryview) -> int:
        """Write as much as goes without waiting; 0 when nothing goes or the output broke (see `error`)."""
        sent = 0
        try:
            while sent < len(data):
                sent += self._write(data[sent:] if sent else data)
        except BlockingIOError:
            if not self._widened:
                self._widened = True
                widen_pipe(self._own)
        except OSError as error:
            self.error = error
        return sent

    def _choose(self) -> Callable[[memoryview], int]:
        try:
            mode = os.fstat(self._fd).st_mode
        except OSError:
            mode = 0  # whoever started us closed it; the first write will tell
        if S_ISSOCK(mode):
            return self._writer_to_socket()
        if S_ISFIFO(mode) or (S_ISCHR(mode) and os.isatty(self._fd)):
            self._own = self._reopen()
        fd = self.fileno()
        return lambda data: os.write(fd, data)

    def _reopen(self) -> int:
        try:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            # Not ours to open, or no reader any more (ENXIO): the descriptor as it is will tell.
            self._must_poll = True
            return os.dup(self._fd)

    def _writer_to_socket(self) -> Callable[[memoryview], int]:
        import _socket

        self._own = os.dup(self._fd)
        flags = _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL

        def send(data: memoryview) -> int:
            sock = _socket.socket(fileno=self._own)
            try:
                return sock.send(data, flags)
            finally:
                sock.detach()  # the descriptor is ours to close

        return send


def widen_pipe(fd: int) -> None:
    """Let a pipe hold 256 KiB, where it is one and may: bulk data then takes a quarter of the turns.

    Source: fcntl(2), F_SETPIPE_SZ.
    """
    if sys.platform == "linux":
        import fcntl

        try:  # noqa: SIM105 (contextlib would cost the fast path 2 ms)
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _WIDE_PIPE)
        except OSError:
            pass  # no pipe, or the user's pipes hold too much already


class MemoryOutput:
    """Keeps everything; see Output for the methods."""

    is_pending = False
    error: OSError | None = None

    def __init__(self) -> None:
        self.data: bytearray = bytearray()

    def fileno(self) -> int:
        return -1

    def write(self, data: memoryview) -> int:
        self.data += data
        return len(data)

    def flush(self) -> int:
        return 0

    def close(self) -> None:
        pass
