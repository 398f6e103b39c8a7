"""Finds the guest agent that the package carries (hatch_build.py builds it). Layer 1; engine and net may call it."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from berth import host
from berth.errors import BerthError, UnsupportedError
from berth.files import make_private_directory
from berth.layout import Layout

_CARRIED = Path(__file__).parent / "_agent"


def find_agent(layout: Layout, architecture: str | None = None) -> Path:
    """Find the agent for `architecture` (this host's when None): a static Linux program that can be executed.

    It lies in the package. Where an installer lost the executable bit, or the package lies where nothing may be
    executed, it is a copy in the cache directory. Idempotent. Raises UnsupportedError when the package has none.
    """
    architecture = architecture or host.architecture()
    carried = _CARRIED / f"berth-agent-linux-{architecture}"
    try:
        status = carried.stat()
    except FileNotFoundError:
        raise _missing(architecture) from None
    # A foreign architecture's agent only goes into a guest: it need not be executable here.
    if os.access(carried, os.X_OK) or architecture != host.architecture():
        return carried
    return _copy(carried, status, layout)


def _copy(carried: Path, status: os.stat_result, layout: Layout) -> Path:
    # Size and time in the name: an upgraded package gets a new copy, and a running machine keeps its own.
    copy = layout.agents / f"{carried.name}-{status.st_size}-{status.st_mtime_ns}"
    if _is_whole(copy, status):
        return copy
    import shutil  # rarely needed, and 5 ms of the fast path

    make_private_directory(layout.cache)
    make_private_directory(layout.agents)
    partial = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(carried, partial)
        partial.chmod(0o755)
        partial.replace(copy)
    except OSError as error:
        raise BerthError(f"cannot copy the guest agent to {copy}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return copy


def _is_whole(copy: Path, status: os.stat_result) -> bool:
    try:
        found = copy.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == status.st_size and os.access(copy, os.X_OK)


def _missing(architecture: str) -> UnsupportedError:
    there = [arch for arch in ("amd64", "arm64") if (_CARRIED / f"berth-agent-linux-{arch}").exists()]
    if there:
        return UnsupportedError(f"there is no guest agent for {architecture}, only for {' and '.join(there)}")
    return UnsupportedError(
        "this installation of berth has no guest agent", hint="install it again: pip install . in berth's source folder"
    )
