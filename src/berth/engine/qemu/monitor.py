"""A client of QEMU's monitor (QMP) for a command or two: stopping and looking. Called by `engine`.

Written out rather than taken from qemu.qmp: that imports asyncio, which alone takes 30 ms, half of what a whole berth
command may take. QEMU serves one client at a time: come, ask, go. The keeper has a monitor, and a client, of its own.

Source: QEMU, docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import cast

from berth.errors import BerthError, DeadlineError, InvalidStateError, ProtocolError

# Answers to what we ask are some hundred bytes; QEMU works for a guest that is not trusted.
_MAX_LINE = 1 << 20
_MAX_LINES = 1000  # events that may come before an answer
_CHUNK = 65536


class Monitor:
    """A connection to a QEMU's monitor; a context manager. Every wait ends after `timeout_s`.

    Raises InvalidStateError when no QEMU listens at `path`, DeadlineError when it does not answer in time (it hangs, or
    serves another client), ProtocolError when what it says is not QMP.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._socket = _connect(path, timeout_s)
        self._timeout_s = timeout_s
        self._received = bytearray()
        self._last_id = 0
        try:
            self._negotiate()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; idempotent."""
        self._socket.close()

    def command(self, name: str, **arguments: object) -> dict[str, object]:
        """Give a command; return what it returned (an empty object for what returns nothing or no object).

        Raises BerthError when QEMU refuses it, else as the class says. After another error than a refusal the
        connection is of no more use.
        """
        deadline = time.monotonic() + self._timeout_s
        self._last_id += 1
        request = {"execute": name, "arguments": arguments, "id": self._last_id}
        self._send(json.dumps(request).encode() + b"\r\n", deadline)
        for _ in range(_MAX_LINES):
            reply = self._read(deadline)
            # Events come in between, and have no id.
            if reply.get("id") != self._last_id:
                continue
            if "error" in reply:
                raise BerthError(f"QEMU refused {name}: {_description(reply['error'])}")
            value = reply.get("return")
            return cast("dict[str, object]", value) if isinstance(value, dict) else {}
        raise ProtocolError(f"QEMU's monitor did not answer {name} in {_MAX_LINES} lines")

    def _negotiate(self) -> None:
        if "QMP" not in self._read(time.monotonic() + self._timeout_s):
            raise ProtocolError("QEMU's monitor did not greet")
        self.command("qmp_capabilities")

    def _send(self, data: bytes, deadline: float) -> None:
        try:
            self._socket.settimeout(_remaining(deadline))
            self._socket.sendall(data)
        except TimeoutError:
            raise _late() from None
        except OSError as error:
            raise _gone() from error

    def _read(self, deadline: float) -> dict[str, object]:
        """Read one line: one JSON object."""
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > _MAX_LINE:
                raise ProtocolError("QEMU's monitor sent a line without end")
            self._received += self._receive(deadline)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            document: object = json.loads(line)
        except (ValueError, RecursionError):
            raise ProtocolError(f"QEMU's monitor sent no JSON: {line[:80]!r}") from None
        if not isinstance(document, dict):
            raise ProtocolError(f"QEMU's monitor sent no JSON object: {line[:80]!r}")
        return cast("dict[str, object]", document)

    def _receive(self, deadline: float) -> bytes:
        try:
            self._socket.settimeout(_remaining(deadline))
            data = self._socket.recv(_CHUNK)
        except TimeoutError:
            raise _late() from None
        except OSError as error:
            raise _gone() from error
        if not data:
            raise _gone()
        return data


def _connect(path: Path, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(os.fsencode(path))
    except OSError as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise _late() from None
        raise InvalidStateError(f"no QEMU listens at {path}: {error.strerror or error}") from error
    return sock


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise _late()
    return remaining


def _late() -> DeadlineError:
    return DeadlineError("QEMU's monitor does not answer")


def _gone() -> InvalidStateError:
    return InvalidStateError("QEMU hung up its monitor: it has ended")


def _description(error: object) -> str:
    match error:
        case {"desc": str(text)}:
            return text[:500]
        case _:
            return "it does not say why"
