"""The record of a stored kernel, kernel.json: written last, checked whenever a kernel is loaded.

Used by `store` and `build`. Light to import: every start of a VM loads a kernel.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

from berth import files
from berth.errors import StateFormatError
from berth.kernels.model import ARCHITECTURES, VERSION, Kernel
from berth.units import utc_now

SCHEMA = 1
RECORD = "kernel.json"
IMAGE = "image"
VMLINUX = "vmlinux"
MODULES_DISK = "modules.ext4"
E2FSCK = "e2fsck"
_PARTS = (IMAGE, VMLINUX, MODULES_DISK, E2FSCK)


def save(folder: Path, version: str, arch: str, source: str) -> None:
    """Write the record of what is in `folder`, last of all, and wait until everything is on the disk."""
    names = [name for name in _PARTS if (folder / name).exists()]
    folder.chmod(0o755)
    document: dict[str, object] = {
        "version": version, "arch": arch, "source": source, "createdDate": utc_now(),
        "files": {name: {"size": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names},
    }  # fmt: skip
    # A thousand modules, one fsync each, would take longer than the download.
    from berth.proc import run  # here, not above: who only reads need not pay for subprocess

    run(["sync", "--file-system", str(folder)], timeout_s=300.0)
    files.save_json(folder / RECORD, document, schema=SCHEMA)


def load(folder: Path, *, digests: bool = False) -> Kernel:
    """Read the record, and check that its files are there and whole: by their sizes, or with `digests` by every byte.

    Raises StateFormatError, FileNotFoundError when `folder` is no kernel.
    """
    document = files.load_json(folder / RECORD, schema=SCHEMA)
    match document:
        case {"version": str(version), "arch": str(arch), "source": str(source), "files": dict()}:
            parts = cast("dict[str, object]", document["files"])
        case _:
            raise StateFormatError(f"{folder / RECORD} is damaged")
    if arch not in ARCHITECTURES or (version and not VERSION.fullmatch(version)) or IMAGE not in parts:
        raise StateFormatError(f"{folder / RECORD} is damaged")
    present = {name: folder / name for name in _PARTS if name in parts}
    for name, path in present.items():
        _check(path, parts[name], digests=digests)
    modules = folder / "lib/modules" / version
    if MODULES_DISK in parts and not (modules / "modules.dep").is_file():
        raise StateFormatError(f"{modules}/modules.dep is missing", hint="berth system kernel fetch")
    return Kernel(
        version=version, arch=arch, image=present[IMAGE], vmlinux=present.get(VMLINUX),
        modules=modules if MODULES_DISK in parts else None, modules_disk=present.get(MODULES_DISK),
        e2fsck=present.get(E2FSCK), source=source,
    )  # fmt: skip


def _check(path: Path, expected: object, *, digests: bool) -> None:
    match expected:
        case {"size": int(size), "sha256": str(digest)}:
            whole = path.is_file() and path.stat().st_size == size and (not digests or _digest(path) == digest)
        case _:
            whole = False
    if not whole:
        raise StateFormatError(f"{path} is damaged", hint="berth system kernel fetch")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
