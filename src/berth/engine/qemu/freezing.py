"""Let the root file system of a running VM stand still while its disk is copied. Layer 3; `engine` calls it.

The guest agent does it: a command of its own, `freeze`, writes what is in memory and freezes for as long as its stdin
is open, five minutes at most. Whoever is killed on the way (we, the keeper, the command), the guest goes on: see
guest/internal/freeze. That it stood still to the end, the command's exit status says.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Generator

from berth.errors import BerthError, InvalidStateError
from berth.names import MachineName
from berth.session import run_session
from berth.wire.messages import ExecRequest

_FREEZE_S = 240.0  # what is in the guest's memory is written first
_THAW_S = 60.0
# The link leads to the agent itself: the child is a copy of it until it executes something.
_COMMAND = (b"/proc/self/exe", b"freeze")
_SIGN = b"frozen\n"
_WORDS = 300


@contextlib.contextmanager
def frozen(agent: Callable[[], _socket.socket], name: MachineName) -> Generator[None]:
    """Freeze the file system for the block. Raises InvalidStateError when it can't be, or was thawed too early.

    agent: connects to the guest agent.
    """
    command = _Command(agent())
    try:
        if not command.has_said(_SIGN, _FREEZE_S):
            raise _failed(name, command.end())
        yield
        if command.end() is not None:
            raise _failed(name, command.end())
    finally:
        command.end()


def _failed(name: MachineName, why: str | None) -> InvalidStateError:
    return InvalidStateError(
        f"machine '{name}' is running, and its disk could not be kept from changing: {why or 'it takes too long'}",
        hint=f"berth stop {name} first; berth restart {name} if it was started by an older berth",
    )


class _Command:
    """The command in the guest, its stdin held open; a thread carries its bytes."""

    def __init__(self, sock: _socket.socket) -> None:
        request = ExecRequest(argv=_COMMAND, user="0", cwd=b"/")
        self._sock = sock
        theirs, self._stdin = os.pipe()
        self._stdout, output = os.pipe()
        self._said = b""
        self._problem: str | None = None
        self._over = False

        def work() -> None:
            try:
                status = run_session(
                    self._sock, request, stdin_fd=theirs, stdout_fd=output, stderr_fd=output, tty=False
                )
                self._problem = None if status == 0 else f"status {status}"
            except (OSError, BerthError) as error:
                self._problem = str(error)
            finally:
                os.close(theirs)
                os.close(output)

        self._worker = threading.Thread(target=work, daemon=True)
        self._worker.start()

    def has_said(self, words: bytes, timeout_s: float) -> bool:
        """Wait for its first words; say whether they are these."""
        deadline = time.monotonic() + timeout_s
        while self._said != words and words.startswith(self._said):
            if not select.select([self._stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
            data = os.read(self._stdout, _WORDS)
            if not data:
                return False
            self._said += data
        return self._said == words

    def end(self) -> str | None:
        """Close its stdin and wait for its end; return what went wrong. Idempotent."""
        if not self._over:
            self._over = True
            os.close(self._stdin)
            self._said += self._rest()
            self._worker.join(_THAW_S)
            os.close(self._stdout)
            if self._worker.is_alive():
                self._sock.shutdown(_socket.SHUT_RDWR)  # the guest hangs up on it
                self._problem = self._problem or "it did not end"
            words = self._said.removeprefix(_SIGN).decode(errors="replace")
            if self._problem is not None and words:
                self._problem = "".join(char for char in words if char.isprintable())[:_WORDS]
        return self._problem

    def _rest(self) -> bytes:
        """Read what it still says, a bounded part of it."""
        said = b""
        deadline = time.monotonic() + _THAW_S
        while select.select([self._stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            data = os.read(self._stdout, _WORDS)
            if not data:
                break
            said = (said + data)[:_WORDS]
        return said
