"""The initial RAM file system of a VM: the agent as its /init, and the modules it needs to reach the root.

Owns the layout's initramfs directory. docs/protocol.md ("How the agent is started") says what the agent finds in it.
The launcher appends what is true of one boot only: the boot document, and e2fsck when the root is to be checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from berth.errors import BerthError, ImageFormatError
from berth.files import make_private_directory, sweep_partials, write_atomic
from berth.kernels import cpio
from berth.kernels.model import Kernel
from berth.kernels.modules import EARLY, LATER, load_index, module_name
from berth.layout import Layout

_FORMAT = 1  # part of the key: change it whenever the same kernel and agent would give other bytes
_KEPT = 4  # files; machines with different kernels, or agents while developing, take turns
_MODULE_MAX = 64 * 1024 * 1024  # bytes of one module when decompressed
_DIRECTORIES = ("dev", "proc", "sys", "run", "newroot", "modules")


def make_initramfs(layout: Layout, kernel: Kernel, agent: Path) -> Path:
    """Return the file for `kernel` with `agent`, made when it is not there yet. Idempotent, safe among processes.

    Raises BerthError when a module or the agent can't be read.
    """
    path = layout.initramfs / f"{_key(kernel, agent)}.cpio"
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)  # in use: the sweep takes the others first
        return path
    make_private_directory(layout.cache)
    make_private_directory(layout.initramfs)
    try:
        data = cpio.archive(_nodes(kernel, agent.read_bytes()))
        write_atomic(path, data, mode=0o644)
    except OSError as error:
        raise BerthError(f"cannot make the initial RAM file system {path}: {error}") from error
    _sweep(layout.initramfs)
    return path


def document_cpio(document: Mapping[str, object]) -> bytes:
    """Write the boot document as an archive that follows the initial RAM file system."""
    return cpio.archive([cpio.file("boot.json", json.dumps(document).encode(), 0o600)])


def check_cpio(e2fsck: Path) -> bytes:
    """Write e2fsck as an archive that follows: for a root that may not be clean."""
    return cpio.archive([cpio.file("e2fsck", e2fsck.read_bytes(), 0o755)])


def _key(kernel: Kernel, agent: Path) -> str:
    """Name the result by what goes into it, without reading that: an equal key means equal bytes."""
    parts: list[object] = [_FORMAT, kernel.arch, kernel.version, kernel.source, EARLY, LATER, _identity(agent)]
    if kernel.modules:
        parts.append(_identity(kernel.modules / "modules.dep"))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _nodes(kernel: Kernel, agent: bytes) -> Iterator[cpio.Node]:
    yield from map(cpio.directory, _DIRECTORIES)
    # The kernel opens it for the init's standard files before devtmpfs is mounted.
    yield cpio.character_device("dev/console", 5, 1)
    yield cpio.file("init", agent, 0o755)
    early, later = _order(kernel)
    lines = [f"/modules/{module_name(path)}.ko" for path in early]
    lines += ["--", *(f"/modules/{module_name(path)}.ko" for path in later)]
    yield cpio.file("modules.order", "".join(f"{line}\n" for line in lines).encode())
    for path in (*early, *later):
        assert kernel.modules
        yield cpio.file(f"modules/{module_name(path)}.ko", _read_module(kernel.modules / path))


def _order(kernel: Kernel) -> tuple[list[str], list[str]]:
    if kernel.modules is None:
        return [], []
    index = load_index(kernel.modules)
    early = index.order(EARLY)
    return early, index.order(LATER, loaded=early)


def _read_module(path: Path) -> bytes:
    """Read a module, decompressed: not every kernel decompresses them itself."""
    from berth.oci import stream  # here, not above: with a cached file, a start needs no decompressors

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with stream.opened(fd, where=str(path), limit=_MODULE_MAX) as data:
            return data.read(_MODULE_MAX)
    except ImageFormatError as error:
        raise BerthError(error.message, hint="berth system kernel fetch") from error
    finally:
        os.close(fd)


def _sweep(folder: Path) -> None:
    """Remove all but the last used; a file that QEMU is reading lives on until it has."""
    found: list[tuple[float, Path]] = []
    for path in folder.glob("*.cpio"):
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found, reverse=True)[_KEPT:]:
        path.unlink(missing_ok=True)
    sweep_partials(folder)
