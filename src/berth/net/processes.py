"""Processes that outlive us, known by pid *and* start time: a pid alone may be somebody else's by now.

Owns how berth recognises and ends its sidecars. Layer 1 in spirit; used by `net`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from berth.proc import start_time


class Process(NamedTuple):
    """One process for good. start: clock ticks since boot. Source: proc(5), /proc/pid/stat, field 22."""

    pid: int
    start: int

    def alive(self) -> bool:
        """Say whether it runs still (a zombie does not)."""
        return identify(self.pid) == self


def identify(pid: int) -> Process | None:
    """Look at the process that has this pid now; None when there is none, or only its remains."""
    start = start_time(pid)
    return None if start is None else Process(pid, start)


def network_namespace(pid: int | None = None) -> int | None:
    """Return the inode of a process's network namespace (ours without `pid`); None when we may not see it."""
    try:
        return os.stat(f"/proc/{pid or 'self'}/ns/net").st_ino
    except OSError:
        return None


def every_process() -> Iterator[int]:
    """List all pids."""
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def find_programs(program: str, argument: str) -> list[Process]:
    """Find processes of ours whose program's name begins with `program`, with exactly `argument` among its arguments.

    Ours: those that we may signal. Anybody on the host can give a process these words.
    """
    name, wanted = os.fsencode(program), os.fsencode(argument)
    found: list[Process] = []
    for pid in every_process():
        with contextlib.suppress(OSError):
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if wanted in argv[1:] and os.path.basename(argv[0]).startswith(name):
                os.kill(pid, 0)
                process = identify(pid)
                found += [process] if process is not None else []
    return found


def send(process: Process, number: signal.Signals) -> bool:
    """Signal the process, and no other; say whether it was there."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        # The descriptor holds on to the process, so what is checked now is what is signalled.
        if not process.alive():
            return False
        signal.pidfd_send_signal(fd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)


def end(process: Process, *, grace_s: float = 3.0) -> None:
    """End the process: SIGTERM, then SIGKILL after `grace_s`; returns when it has gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not process.alive():
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if poll.poll(grace_s * 1000):
                return
    finally:
        os.close(fd)
