"""A machine becomes an image again: what it has changed, as one layer on the image it was made from. Layer 5.

`cli` and the API call `commit`. docs/building.md says what is in the layer and what is not. A container machine's
changes are its overlayfs upper directory, read on the host; a running one stands still meanwhile. The disk of a VM
machine can't be read without its kernel: that is refused, in words.
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
from berth.bundle import Bundle
from berth.config import BootConfig, MachineConfig
from berth.engine.crun import cgroups
from berth.errors import BerthError, InvalidStateError, UnsupportedError
from berth.images import StoredImage, storable
from berth.lifecycle import Machines
from berth.oci.derive import derive
from berth.oci.diff import layer_of
from berth.oci.spec import Descriptor
from berth.oci.store import Ingest, Store
from berth.proc import spawn
from berth.progress import Progress, Silent

_LOCK_S = 300.0
_FREEZE_S = 10.0
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

    A running machine is frozen while it is read. live: it is not, and files that change meanwhile may be torn.
    Raises NotFoundError, UnsupportedError for a VM machine, InvalidStateError for one that can't be frozen.
    """
    progress = progress or Silent()
    new = storable(reference)
    bundle = Bundle(machines.layout, machines.resolve(name))
    config, boot = bundle.load(), bundle.load_boot()
    if config.isolation == "vm":
        raise UnsupportedError(
            f"machine '{bundle.name}' is a VM: its disk can't be made an image yet",
            hint=f"berth run -n {bundle.name} --root -- tar -C / --one-file-system -c . | "
            f"berth image import /dev/stdin {reference}",
        )
    base = machines.images.find(config.image_digest)
    with _held(bundle), contextlib.ExitStack() as stack:
        if machines.inspect(bundle.name).status != "stopped" and not live:
            stack.enter_context(_frozen(config))
        progress.step(f"reading {bundle.name}")

        def fill(ingest: Ingest) -> Descriptor:
            with ingest.scratch() as layer:
                _write(bundle, config, boot, layer)
                stack.close()  # from here on the machine need not stand still
                layer.seek(0)
                return _derived(machines, base, ingest, layer, _told(config, message))

        return machines.images.add(fill, [new], progress=progress.advance)


def _write(bundle: Bundle, config: MachineConfig, boot: BootConfig, layer: IO[bytes]) -> None:
    lower = bundle.layout.template(config.image_digest) / "rootfs"
    upper = bundle.upper
    upper.mkdir(parents=True, exist_ok=True)  # of a machine that never ran
    layer_of(upper, layer, lower=lower if lower.exists() else None, exclude=left_out(config, boot))


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
