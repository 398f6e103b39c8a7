"""Reads what a machine wrote: its console log, or a command's output as it comes. Layer 3; used by lifecycle.

The keeper rotates the log (`console.log` → `console.log.1`), so that no machine can fill the disk by talking.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from berth.errors import BerthError
from berth.log import log
from berth.session import run_session
from berth.wire.messages import ExecRequest

if TYPE_CHECKING:
    import _socket

_CHUNK = 1 << 16
_JOIN_S = 5.0
_POLL_S = 0.2  # a file gives no event without inotify, which the standard library has no name for


def read(path: Path, *, lines: int | None, follow: bool, alive: Callable[[], bool]) -> Iterator[bytes]:
    """Give the console log in chunks: all of it or its last `lines`; with `follow` also what comes while `alive`."""
    older = _read_all(path.with_name(f"{path.name}.1"))
    current = _open(path)
    try:
        data = older + (b"" if current is None else _drain(current))
        yield data if lines is None else _tail(data, lines)
        while follow:
            if current is None or _was_rotated(current, path):
                fresh = _open(path)
                if current is not None:
                    yield _drain(current)
                    os.close(current)
                current = fresh
            news = b"" if current is None else _drain(current)
            if news:
                yield news
            elif not alive():
                return
            else:
                time.sleep(_POLL_S)
    finally:
        if current is not None:
            os.close(current)


def command_output(sock: _socket.socket, argv: Sequence[str]) -> Iterator[bytes]:
    """Run a command as the machine's root and give its output, both streams, as it comes; ends with it.

    Whoever stops reading ends the command, by the broken pipe.
    """
    reader, writer = os.pipe()
    request = ExecRequest(argv=tuple(os.fsencode(word) for word in argv), user="0", cwd=b"/")

    def work() -> None:
        try:
            run_session(sock, request, stdin_fd=None, stdout_fd=writer, stderr_fd=writer, tty=False)
        except (OSError, BerthError) as error:
            log.debug("%s: %s", argv[0], error)
        finally:
            os.close(writer)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while chunk := os.read(reader, _CHUNK):
            yield chunk
    finally:
        os.close(reader)
        worker.join(_JOIN_S)


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None


def _read_all(path: Path) -> bytes:
    fd = _open(path)
    if fd is None:
        return b""
    try:
        return _drain(fd)
    finally:
        os.close(fd)


def _drain(fd: int) -> bytes:
    chunks: list[bytes] = []
    while chunk := os.read(fd, _CHUNK):
        chunks.append(chunk)
    return b"".join(chunks)


def _was_rotated(fd: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(fd)
    return (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino)


def _tail(data: bytes, lines: int) -> bytes:
    parts = data.splitlines(keepends=True)
    return b"".join(parts[-lines:]) if lines else b""
