"""The kernel that this host runs, as a kernel for VMs: where there is no apt, but its files can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from berth import host
from berth.errors import UnsupportedError
from berth.kernels.gather import Gathered, Gatherer
from berth.oci.stream import CHUNK
from berth.progress import Progress

_ROOT = Path("/")


def gather(arch: str, folder: Path, progress: Progress, *, root: Path = _ROOT) -> Gathered:
    """Copy it with its modules into `folder`, which is empty. Raises UnsupportedError when it can't be had."""
    release = host.facts().release
    image = _find_image(root, release) if arch == host.architecture() else None
    if image is None:
        raise UnsupportedError(
            f"this host has no package source for a kernel for linux/{arch}",
            hint="take a kernel of your own, with everything a VM needs built in: --kernel PATH",
        )
    progress.step(f"copying this host's kernel {release}")
    gatherer = Gatherer(folder)
    _copy(gatherer, f"boot/vmlinuz-{release}", image)
    modules = root / "lib/modules" / release
    for parent, _, names in os.walk(modules):
        for name in names:
            path = Path(parent, name)
            _copy(gatherer, f"lib/modules/{release}/{path.relative_to(modules)}", path)
    _copy(gatherer, "usr/sbin/e2fsck.static", root / "usr/sbin/e2fsck.static")
    return Gathered(gatherer.version(), f"{image}")


def _find_image(root: Path, release: str) -> Path | None:
    names = (f"boot/vmlinuz-{release}", f"usr/lib/modules/{release}/vmlinuz", f"lib/modules/{release}/vmlinuz")
    return next((root / name for name in names if os.access(root / name, os.R_OK)), None)


def _copy(gatherer: Gatherer, name: str, path: Path) -> None:
    if gatherer.versions and name.endswith("/vmlinuz"):
        return  # the image, once more
    target = gatherer.place(name) if path.is_file() else None
    if target is not None:
        gatherer.write(target, _pieces(path))


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            yield piece
