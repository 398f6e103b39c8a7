"""A machine becomes an image again: what it has changed, as one layer on the image it was made from. Layer 5.

`cli` and the API call `commit`. docs/building.md says what is in the layer and what is not. A container machine's
changes are its overlayfs upper directory, read on the host; a running one stands still meanwhile. A VM's are on a disk
that no program of the host reads: a VM of our own does (`engine.qemu.changes`), from a copy, and only for the time of
copying does the file system of a running machine stand still.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import IO, cast

from berth import locks
from berth.agent import connect
from berth.bundle import Bundle
from berth.config import BootConfig, MachineConfig
from berth.engine.base import Machine
from berth.engine.crun import cgroups
from berth.engine.qemu.engine import VmEngine
from berth.engine.qemu.freezing import frozen
from berth.errors import BerthError, InvalidStateError
from berth.images import StoredImage, storable
from berth.lifecycle import Machines
from berth.net import addresses
from berth.oci.derive import derive
from berth.oci.diff import layer_of
from berth.oci.hostile import check_layer
from berth.oci.spec import Descriptor
from berth.oci.store import Ingest, Store
from berth.proc import spawn
from berth.progress import Progress, Silent

_LOCK_S = 300.0
_FREEZE_S = 10.0
_CONNECT_S = 10.0
# What berth makes in every machine, and what makes a machine this one and no other. Not in it: see docs/building.md.
_LEFT_OUT = (
    "dev", "proc", "sys", "run", "etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/machine-id",
    "var/lib/dbus/machine-id", "var/lib/systemd/random-seed", "var/lib/systemd/credential.secret",
    "var/lib/berth", "var/lib/docker", "var/lib/containers",
)  # fmt: skip
# Freezes a cgroup for as long as its stdin is open: when berth is killed, the machine goes on.
_FREEZER = 'echo 1 >"$0" && cat >/dev/null; echo 0 >"$0"'


def commit(
    machines: Machines,
    name: str,
    reference: str,
    *,
    message: str = "",
    live: bool = False,
    progress: Progress | None = None,
) -> StoredImage:
    """Store what a machine has become as the image `reference`; return it.

    A running machine is frozen while it is read. live: a container is not, and files that change meanwhile may be torn.
    Raises NotFoundError, InvalidStateError for a machine that can't be frozen.
    """
    progress = progress or Silent()
    new = storable(reference)
    bundle = Bundle(machines.layout, machines.resolve(name))
    config, boot = bundle.load(), bundle.load_boot()
    base = machines.images.find(config.image_digest)
    with _held(bundle), contextlib.ExitStack() as stack:
        is_running = machines.inspect(bundle.name).status != "stopped"
        if is_running and config.isolation == "container" and not live:
            stack.enter_context(_frozen(config))
        progress.step(f"reading {bundle.name}")

        def fill(ingest: Ingest) -> Descriptor:
            with ingest.scratch() as layer:
                if config.isolation == "vm":
                    _write_disk(bundle, config, boot, layer, progress, is_running=is_running)
                else:
                    _write_upper(bundle, config, boot, layer)
                    stack.close()  # from here on the machine need not stand still
                return _derived(machines, base, ingest, layer, _told(config, message))

        return machines.images.add(fill, [new], progress=progress.advance)


def _write_upper(bundle: Bundle, config: MachineConfig, boot: BootConfig, layer: IO[bytes]) -> None:
    lower = bundle.layout.template(config.image_digest) / "rootfs"
    upper = bundle.upper
    upper.mkdir(parents=True, exist_ok=True)  # of a machine that never ran
    layer_of(upper, layer, lower=lower if lower.exists() else None, exclude=left_out(config, boot))
    layer.seek(0)


def _write_disk(
    bundle: Bundle, config: MachineConfig, boot: BootConfig, layer: IO[bytes], progress: Progress, *, is_running: bool
) -> None:
    machine = Machine(bundle, config, boot, addresses.allocate(bundle.layout, bundle.name))
    exclude = [*left_out(config, boot), "lost+found"]
    # Also with `live`: what would be torn are the tables of the disk itself.
    path = bundle.layout.agent_socket(bundle.name)
    still = frozen(lambda: connect(path, timeout_s=_CONNECT_S), bundle.name) if is_running else contextlib.nullcontext()
    found = VmEngine(bundle.layout).write_changes(machine, layer, exclude=exclude, still=still, progress=progress)
    paths = [os.fsencode(path) for path in exclude]
    check_layer(layer.fileno(), start=found.start, size=found.size, exclude=paths, where="the new layer")
    layer.seek(found.start)


def left_out(config: MachineConfig, boot: BootConfig) -> list[str]:
    """Say which paths of a machine are not in its image, relative to its root: berth's own, and the host's."""
    home = [] if boot.home_mount == "none" else [config.user.home]
    return [*_LEFT_OUT, *(path.strip("/") for path in (*home, *(mount.destination for mount in boot.mounts)))]


def _derived(machines: Machines, base: StoredImage, ingest: Ingest, layer: IO[bytes], created_by: str) -> Descriptor:
    store = Store(machines.layout.images)
    listed = next(entry for entry in store.entries() if entry.digest == base.digest)
    plain = dataclasses.replace(listed, annotations={}, platform=None)
    return derive(store, ingest, plain, layer, created_by=created_by, annotations={})


def _told(config: MachineConfig, message: str) -> str:
    return f"berth commit {config.name}" + (f": {message}" if message else "")


@contextlib.contextmanager
def _held(bundle: Bundle) -> Generator[None]:
    """Hold the machine's run.lock: it is neither started, stopped nor removed meanwhile."""
    with locks.hold(bundle.run_lock, timeout_s=_LOCK_S, what=f"machine '{bundle.name}'") as fd:
        os.ftruncate(fd, 0)
        os.write(fd, b"committing")
        yield


@contextlib.contextmanager
def _frozen(config: MachineConfig) -> Generator[None]:
    """Let the machine's processes stand still. Source: the kernel's cgroup-v2.rst, cgroup.freeze."""
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
