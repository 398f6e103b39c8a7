"""Images as root file systems for VMs: one ext4 file system per manifest digest and size, shared by all disks on it.

Owns `layout.disks`; `disks`, the engine and `lifecycle`'s prune call it. A template is never changed, and one that is
lost can't be made again for the disks on it: two runs of mke2fs place a file's blocks differently.

    disks/sha256-…/root-64G.raw     the file system, sparse; the number is its size
    disks/sha256-…/template.json    what the image takes in it, which says which sizes can hold it
    disks/sha256-….partial          a template that is being made; left over after a crash, swept by the next
    disks/disks.lock                held while one is made or removed
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator
from pathlib import Path
from typing import cast

from berth import files, locks, trees, userns
from berth.engine.qemu.sizes import disk_size, template_size
from berth.engine.unpacking import Ahead, Layers, find_unpacked, give, unpack
from berth.errors import BerthError, BusyError
from berth.host import compare_version, tool_version
from berth.layout import Layout
from berth.log import log
from berth.proc import require_program
from berth.progress import Progress
from berth.units import GIB

_SCHEMA = 1  # of template.json
_LOCK_S = 3600.0
_PREZEROED = (1, 47)  # the first e2fsprogs that knows assume_storage_prezeroed


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """One file system in the store. size: of the file system, usage: what it takes on the host's disk; bytes."""

    digest: str
    size: int
    path: Path

    @classmethod
    def at(cls, layout: Layout, digest: str, size: int) -> Template:
        """Say where the template of this size is, or would be."""
        return cls(digest, size, layout.disk(digest) / f"root-{size // GIB}G.raw")

    @property
    def usage(self) -> int:
        return self.path.stat().st_blocks * 512


def has_template(layout: Layout, digest: str, disk: int | None) -> bool:
    """Say whether an image has the template that a new disk of `disk` bytes (None: the default size) is made on."""
    return find_template(layout, digest, disk) is not None


def find_template(layout: Layout, digest: str, disk: int | None) -> Template | None:
    """Find the template for a new disk of this size. Raises InvalidArgumentError when the image can't fit in it."""
    content = _known_content(layout, digest)
    if content is None:
        return None
    template = Template.at(layout, digest, template_size(disk, content))
    return template if template.path.exists() else None


def list_templates(layout: Layout) -> list[Template]:
    """Return every whole template, by digest and size."""
    digests = sorted(path.name.replace("-", ":", 1) for path in layout.disks.glob("*") if "." not in path.name)
    return [item for digest in digests for item in _of(layout, digest)]


def remove_template(layout: Layout, digest: str) -> None:
    """Remove all templates of an image; idempotent. The caller sees to it that no machine's disk is on one."""
    with _lock(layout):
        doomed = _aside(layout, digest)
        with contextlib.suppress(FileNotFoundError):
            layout.disk(digest).rename(doomed)
            trees.delete(doomed)


def template_uuid(path: Path) -> str:
    """Read which file system a template is. Raises BerthError when there is none in it, FileNotFoundError."""
    # Source: the kernel's Documentation/filesystems/ext4/super.rst: s_magic at 0x38, s_uuid at 0x68.
    with path.open("rb") as file:
        file.seek(1024)
        block = file.read(1024)
    if block[0x38:0x3A] != b"\x53\xef":
        raise BerthError(f"{path} is damaged: it holds no ext4 file system")
    return block[0x68:0x78].hex()


def make_template(
    layout: Layout, digest: str, layers: Layers, disk: int | None, progress: Progress,
    ahead: Ahead | None = None,
) -> None:  # fmt: skip
    """Make a template for disks of `disk` bytes from `layers` (open blob descriptor, media type; bottom first).

    Idempotent, atomic. The image is unpacked and its files are read in a user namespace, as root too, so that nothing
    of it can have the host's rights and the owners in the file system are the image's; what the container engine has
    unpacked already is used, or what `ahead` has. Raises InvalidArgumentError when the image does not fit,
    UnsupportedError without mke2fs or without subordinate ids, BerthError when the host's disk is full.
    """
    for program in ("mke2fs", "debugfs"):
        require_program(program, package="e2fsprogs")
    with _lock(layout):
        if has_template(layout, digest, disk):
            return
        partial = _aside(layout, digest)
        # Closed to the host's other users: what is setuid inside must not be reachable.
        partial.mkdir(mode=0o700)
        try:
            with _unpacked(layout, digest, partial, layers, progress, ahead) as tree:
                size = _build(layout, digest, partial / "root.raw", tree, disk, progress)
            # Before it is made durable: what of the unpacked files is not on the disk yet never has to go there.
            trees.delete(partial / "rootfs")
            _sync(partial / "root.raw")
            (partial / "root.raw").rename(Template.at(layout, digest, size).path)
            files.sync_directory(layout.disk(digest))
            files.sync_directory(layout.disks)
        finally:
            trees.delete(partial)


def sweep_templates(layout: Layout) -> None:
    """Remove the templates that a killed berth never finished, unless somebody is making one now."""
    if layout.disks.exists():
        with contextlib.suppress(BusyError), _lock(layout, timeout_s=0):
            pass


@contextlib.contextmanager
def _lock(layout: Layout, timeout_s: float = _LOCK_S) -> Generator[None]:
    """Hold the store's lock. Nobody makes or removes a template then: what is half-made or half-gone is left over."""
    files.make_private_directory(layout.data)
    files.make_private_directory(layout.disks)
    with locks.hold(layout.disks / "disks.lock", timeout_s=timeout_s, what="the image"):
        for path in layout.disks.glob("*.partial"):
            log.debug("sweeping %s", path)
            trees.delete(path)
        yield


def _aside(layout: Layout, digest: str) -> Path:
    directory = layout.disk(digest)
    return directory.with_name(f"{directory.name}.partial")


def _of(layout: Layout, digest: str) -> list[Template]:
    """List the templates of one image, the smallest first."""
    found: list[Template] = []
    for path in layout.disk(digest).glob("root-*G.raw"):
        number = path.name.removeprefix("root-").removesuffix("G.raw")
        if number.isdecimal():
            found.append(Template.at(layout, digest, int(number) * GIB))
    return sorted(found, key=lambda item: item.size)


def _known_content(layout: Layout, digest: str) -> int | None:
    """Return the bytes that the image takes in a file system; None before they were measured."""
    try:
        document = files.load_json(layout.disk(digest) / "template.json", schema=_SCHEMA)
    except FileNotFoundError:
        return None
    content = document.get("content")
    return content if isinstance(content, int) else None


def _build(layout: Layout, digest: str, path: Path, tree: int, disk: int | None, progress: Progress) -> int:
    """Make the file system in the file `path`, and the folder that it will go to; return its size."""
    progress.step("making a root disk")
    content, size = _make_filesystem(path, tree, disk_size(disk), userns.plan_idmap(os.getuid(), os.getgid()))
    directory = layout.disk(digest)
    directory.mkdir(mode=0o700, exist_ok=True)
    files.save_json(directory / "template.json", {"digest": digest, "content": content}, schema=_SCHEMA)
    return size if size is not None else template_size(disk, content)  # which raises: it does not fit


@contextlib.contextmanager
def _unpacked(
    layout: Layout, digest: str, partial: Path, layers: Layers, progress: Progress,
    ahead: Ahead | None,
) -> Generator[int]:  # fmt: skip
    """Open the image's files: those that the container engine keeps, or unpacked into `partial`."""
    kept = find_unpacked(layout, digest)
    if kept is None:
        unpack(partial, digest, layers, progress, ahead)
    # O_PATH: the image may have closed its root to all but an owner of its own, and it is read in the namespace only.
    tree = os.open(kept or partial / "rootfs", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield tree
    finally:
        os.close(tree)


def _make_filesystem(path: Path, tree: int, disk: int, idmap: userns.IdMap) -> tuple[int, int | None]:
    """Return the bytes of the image's content, and the size of the file system; None when the content does not fit."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        give(fd, idmap)
        prezeroed = compare_version(tool_version(("mke2fs", "-V")) or "0", _PREZEROED)
        answer = userns.call(
            "berth.engine.qemu.mkfs:make_filesystem",
            {"tree": tree, "disk": fd, "wanted": disk, "prezeroed": prezeroed},
            idmap=idmap,
            pass_fds=[tree, fd],
        )
        os.fchown(fd, os.geteuid(), os.getegid())
        # A QEMU that runs as nobody in particular may open its inherited descriptor anew; the folders above are closed.
        os.fchmod(fd, 0o644)
    finally:
        os.close(fd)
    match cast("dict[str, object]", answer):
        case {"content": int(content), "size": int() | None as size}:
            return content, size
        case _:
            raise BerthError(f"unexpected answer from inside the namespace: {answer!r:.200}")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
