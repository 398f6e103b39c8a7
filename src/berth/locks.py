"""Advisory locks that the kernel drops when their holder dies (flock). Layer 1; callers wrap them in proof types."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Generator
from pathlib import Path

from berth.errors import BusyError


@contextlib.contextmanager
def hold(path: Path, *, shared: bool = False, timeout_s: float | None = None, what: str = "") -> Generator[int]:
    """Hold the lock file `path` (made when absent) until the block ends; yields its descriptor.

    timeout_s: None waits without end; 0 does not wait. Raises BusyError naming `what` when time is up.
    The lock file may be replaced while we wait (its directory renamed away): the lock counts only while `path` still
    names the file that we hold.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _flock(fd, operation, deadline, what or str(path))
            if _still_named(fd, path):
                yield fd
                return
        finally:
            os.close(fd)


def is_held(path: Path) -> bool:
    """Say whether some process holds the lock file `path` exclusively now (a momentary answer).

    A shared lock is tried, so that those who ask don't see each other.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _flock(fd: int, operation: int, deadline: float | None, what: str) -> None:
    if deadline is None:
        fcntl.flock(fd, operation)
        return
    while True:
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            # flock has no time-out of its own, and an alarm signal is not a library's to take.
            if time.monotonic() >= deadline:
                raise BusyError(f"{what} is in use by another berth command") from None
            time.sleep(0.01)


def _still_named(fd: int, path: Path) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    held = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)
