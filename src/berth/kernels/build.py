"""From a kernel's pieces to a stored kernel: what takes time is done here, once. Used by `store` only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from berth.errors import BerthError
from berth.kernels import image
from berth.kernels.gather import PACKED_IMAGE, Gathered, modules_folder
from berth.kernels.moduledisk import make_module_disk
from berth.kernels.record import IMAGE, MODULES_DISK, VMLINUX, save
from berth.proc import require_program, run
from berth.progress import Progress


def complete(folder: Path, gathered: Gathered, arch: str, progress: Progress) -> None:
    """Turn what was gathered in `folder` into a stored kernel, and have all of it on the disk. Raises BerthError."""
    _make_image(folder, arch)
    modules = modules_folder(folder, gathered.version)
    if modules.is_dir():
        progress.step(f"making the disk with the modules of {gathered.version}")
        _index(folder, gathered.version)
        make_module_disk(modules.parent, folder / MODULES_DISK)
    else:
        progress.note(f"{gathered.source} has no modules: everything has to be built in")
    save(folder, gathered.version, arch, gathered.source)


def _make_image(folder: Path, arch: str) -> None:
    packed = folder / PACKED_IMAGE
    kind = image.examine(packed)
    if kind.arch != arch:
        raise BerthError(f"the kernel that was found is for linux/{kind.arch}, not for linux/{arch}")
    if kind.packed:
        image.unpack_image(packed, folder / IMAGE)
        packed.unlink()
    else:
        packed.rename(folder / IMAGE)
    if kind.kind == "bzimage":
        image.extract_vmlinux(folder / IMAGE, folder / VMLINUX)  # where there is none, the bzImage boots


def _index(folder: Path, version: str) -> None:
    """Make modules.dep and its like. Packages leave that to their installation."""
    if (modules_folder(folder, version) / "modules.dep").exists():
        return
    require_program("depmod", package="kmod")
    run(["depmod", "-b", str(folder), version], timeout_s=300.0)
    for path in modules_folder(folder, version).glob("modules.*"):
        path.chmod(0o644)


def copy_custom(path: Path, folder: Path, source: str) -> None:
    """Make `folder` a kernel from a person's own image. Raises InvalidArgumentError when it is none that boots."""
    kind = image.examine(path)
    if kind.packed:
        kind = image.unpack_image(path, folder / IMAGE)
    else:
        # QEMU may run as somebody who can't read the original.
        shutil.copyfile(path, folder / IMAGE)
        (folder / IMAGE).chmod(0o644)
    if kind.kind == "bzimage":
        image.extract_vmlinux(folder / IMAGE, folder / VMLINUX)
    elif kind.kind == "elf":
        os.link(folder / IMAGE, folder / VMLINUX)
    save(folder, kind.version, kind.arch, source)
