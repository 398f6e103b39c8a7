"""A machine becomes an image again: what it has changed, as one layer on the image it was made from. Layer 5.

`cli` and the API call `commit`. docs/building.md says what is in the layer and what is not. How the changes are read is
the engine's business (`Engine.write_changes`).
"""

from __future__ import annotations

import dataclasses
from typing import IO

from berth.bundle import Bundle
from berth.config import BootConfig, MachineConfig
from berth.engine.base import Machine
from berth.engine.select import engine_for
from berth.images import StoredImage, storable
from berth.lifecycle import Machines
from berth.net import addresses
from berth.oci.derive import derive
from berth.oci.spec import Descriptor
from berth.oci.store import Ingest, Store
from berth.progress import Progress, Silent

# What berth makes in every machine, and what makes a machine this one and no other. Not in it: see docs/building.md.
_LEFT_OUT = (
    "dev", "proc", "sys", "run", "etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/machine-id",
    "var/lib/dbus/machine-id", "var/lib/systemd/random-seed", "var/lib/systemd/credential.secret",
    "var/lib/berth", "var/lib/docker", "var/lib/containers",
)  # fmt: skip


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
    machine = Machine(bundle, config, boot, addresses.allocate(machines.layout, bundle.name))
    engine = engine_for(config.isolation, machines.layout)

    def fill(ingest: Ingest) -> Descriptor:
        with ingest.scratch() as layer:
            engine.write_changes(machine, layer, exclude=left_out(config, boot), live=live, progress=progress)
            return _derived(machines, base, ingest, layer, _told(config, message))

    with machines.exclusive(bundle.name, "committing"):
        return machines.images.add(fill, [new], progress=progress.advance)


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
