"""What a container machine has changed, as a layer: its overlayfs upper directory, read on the host. Used by `engine`.

A machine that runs stands still meanwhile, by its control groups' freezer.
Source: the kernel's cgroup-v2.rst, cgroup.freeze.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Generator
from pathlib import Path
from typing import IO, cast

from berth.config import MachineConfig
from berth.engine.base import Machine
from berth.engine.crun import cgroups
from berth.engine.unpacking import find_unpacked
from berth.errors import BerthError, InvalidStateError
from berth.oci.diff import layer_of
from berth.proc import spawn

_FREEZE_S = 10.0
# Freezes a cgroup for as long as its stdin is open: when berth is killed, the machine goes on.
_FREEZER = 'echo 1 >"$0" && cat >/dev/null; echo 0 >"$0"'


def write_changes(machine: Machine, out: IO[bytes], *, exclude: Collection[str]) -> None:
    """Write the layer to `out`, from its beginning. exclude: paths below the root that are not looked at."""
    upper = machine.bundle.upper
    upper.mkdir(parents=True, exist_ok=True)  # of a machine that never ran
    lower = find_unpacked(machine.bundle.layout, machine.config.image_digest)
    layer_of(upper, out, lower=lower, exclude=exclude)


@contextlib.contextmanager
def frozen(config: MachineConfig) -> Generator[None]:
    """Let the machine's processes stand still. Raises InvalidStateError where that can't be."""
    files = [
        path for path in (Path(found, "cgroup.freeze") for found in cgroups.find_leftovers(config.id)) if path.exists()
    ]
    if not files or not all(os.access(path, os.W_OK) for path in files):
        raise InvalidStateError(
            f"machine '{config.name}' is running, and this host has no way to freeze it",
            hint=f"berth stop {config.name} first; or commit --live, if no file changes that matters",
        )
    with contextlib.ExitStack() as stack:
        for path in files:
            stack.enter_context(_freezing(path))
        for path in files:
            _await_frozen(path.with_name("cgroup.events"), config)
        yield


@contextlib.contextmanager
def _freezing(path: Path) -> Generator[None]:
    # A session of its own: it has to outlive the Ctrl-C that ends us.
    with spawn(["sh", "-c", _FREEZER, str(path)], stdin=-1, new_session=True) as process:  # -1 is PIPE
        try:
            yield
        finally:
            cast("IO[bytes]", process.stdin).close()
            process.wait(timeout=_FREEZE_S)


def _await_frozen(events: Path, config: MachineConfig) -> None:
    deadline = time.monotonic() + _FREEZE_S
    while b"frozen 1" not in events.read_bytes():
        if time.monotonic() > deadline:
            raise BerthError(f"machine '{config.name}' could not be frozen", hint=f"berth stop {config.name}")
        time.sleep(0.005)
