"""Locks: one holder, across processes, dropped by the kernel when the holder dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from berth import locks, proc
from berth.errors import BusyError
from support import ROOT

# A holder in a process of its own: takes the lock, says so, holds it until it reads a line.
_HOLDER = """
import sys; from pathlib import Path; from berth import locks
with locks.hold(Path(sys.argv[1]), shared=sys.argv[2] == "True"):
    print("held", flush=True); sys.stdin.readline()
"""


@contextmanager
def other_process(path: Path, *, shared: bool = False) -> Generator[tuple[int, IO[bytes]]]:
    argv = [sys.executable, "-c", _HOLDER, str(path), str(shared)]
    with proc.spawn(argv, stdin=-1, stdout=-1, env={"PYTHONPATH": str(ROOT / "src")}) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        try:
            yield process.pid, process.stdin
        finally:
            process.kill()


def test_hold_makes_the_file_and_drops_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not locks.is_held(path)
    with locks.hold(path) as fd:
        assert locks.is_held(path)
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert not os.get_inheritable(fd)
    assert not locks.is_held(path)
    assert path.exists()


def test_another_process_keeps_us_out_until_it_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with other_process(path) as (_pid, stdin):
        assert locks.is_held(path)
        with (
            pytest.raises(BusyError, match="machine 'dev' is in use"),
            locks.hold(path, timeout_s=0, what="machine 'dev'"),
        ):
            pytest.fail("two holders")
        stdin.write(b"\n")
        stdin.flush()
        with locks.hold(path, timeout_s=30):
            pass


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with other_process(path) as (pid, _stdin):
        os.kill(pid, signal.SIGKILL)
        with locks.hold(path, timeout_s=30):
            pass


def test_shared_holders_share_and_keep_a_writer_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with other_process(path, shared=True):
        with locks.hold(path, shared=True, timeout_s=0):
            pass
        with pytest.raises(BusyError), locks.hold(path, timeout_s=0):
            pytest.fail("a reader and a writer")


def test_waiting_without_end_ends_when_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    order: list[str] = []
    holding = threading.Event()

    def first() -> None:
        with locks.hold(path):
            holding.set()
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert holding.wait(30)
    with locks.hold(path):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_file_that_was_renamed_away_does_not_count(tmp_path: Path) -> None:
    """Who waited for the lock of a directory that was deleted meanwhile locks the new file, not the dead one."""
    path = tmp_path / "lock"
    waited = threading.Event()

    def wait() -> None:
        with locks.hold(path, timeout_s=30) as fd:
            assert os.fstat(fd).st_ino == path.stat().st_ino
            waited.set()

    with locks.hold(path):
        thread = threading.Thread(target=wait)
        thread.start()
        path.rename(tmp_path / "away")
    thread.join()
    assert waited.is_set()


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locks.hold(tmp_path / "lock"):
        pytest.fail("followed a symbolic link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_failure_inside_drops_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locks.hold(tmp_path / "lock"):
        raise ZeroDivisionError
    assert not locks.is_held(tmp_path / "lock")
