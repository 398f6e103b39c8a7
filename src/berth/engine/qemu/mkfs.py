"""An image's files to an ext4 file system: what of `templates` runs inside the user namespace. Plain values in and out.

There the owners of the files are the image's own, and what only their owner may read can be read. mke2fs(8) copies
modes, owners, links, holes, file capabilities, ACLs and times (whole seconds) of all below the root; the root's own
owner and mode are set besides. Sockets, which no layer can hold, are left out.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from berth.engine.qemu.sizes import BYTES_PER_INODE, find_size
from berth.errors import BerthError, CommandError
from berth.proc import run
from berth.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

LABEL = "berth-root"
# What every kernel from 5.10 on mounts, whatever newer mke2fs add by themselves (orphan_file needs 5.15).
_FEATURES = (
    "none", "has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit", "flex_bg",
    "sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize", "metadata_csum",
)  # fmt: skip
_BLOCK = 4096
# Written over and over, so a journal costs its size on every disk, whatever is deleted: mke2fs would take up to 1 GiB.
_JOURNAL_MIB = 64
# Growing writes one transaction of 1030 blocks (the reserved descriptors), which may fill a quarter of the journal.
_SMALL_JOURNAL_MIB = 32
# Reserves room for as many group descriptors as the format can: mounted, it grows to 8 TiB in place, and beyond that
# the kernel changes the layout of the rest to meta_bg by itself (ext4_resize_fs).
_GROWTH = "16T"
_FULL = 16 * MIB  # less than this free: the host's disk is why mke2fs failed
_DEADLINE_S = 3600.0


def make_filesystem(tree: int, disk: int, wanted: int, prezeroed: bool) -> dict[str, object]:  # noqa: FBT001 (JSON)
    """Make the file system of the directory `tree` in the empty file `disk`, for a machine's disk of `wanted` bytes.

    Returns ``{"content": bytes, "size": bytes or None}``: what the image takes, and the size that the file system got;
    None when the image does not fit in `wanted`.
    """
    os.fchdir(tree)
    content = measure(".")
    size = find_size(wanted, content)
    if size is not None:
        os.ftruncate(disk, size)
        root = os.stat(".")
        path = f"/proc/self/fd/{disk}"
        try:
            _run(mke2fs_command(path, size, root, prezeroed=prezeroed), disk)
            _run(["debugfs", "-w", "-f", "/dev/stdin", path], disk, input=root_mode_command(root))
        except CommandError as error:
            _explain(disk, error)
            raise
    return {"content": content, "size": size}


def _run(argv: list[str], disk: int, *, input: bytes | None = None) -> None:
    # Debian's defaults, or a site's, must not decide what is in the file system.
    run(argv, input=input, env={"MKE2FS_CONFIG": "/dev/null"}, pass_fds=[disk], timeout_s=_DEADLINE_S)


def _explain(disk: int, error: CommandError) -> None:
    facts = os.fstatvfs(disk)
    if facts.f_bavail * facts.f_frsize < _FULL:
        raise BerthError(
            "the disk of the host is full: the image's root disk can't be made", hint="berth system prune"
        ) from error


def mke2fs_command(path: str, size: int, root: os.stat_result, *, prezeroed: bool) -> list[str]:
    """Say how to make the file system of the current directory in the file `path`, which must be `size` empty bytes.

    prezeroed: this mke2fs can be told that the file reads as zeros, so that no guest ever writes them.
    """
    extended = [
        f"resize={_GROWTH}", f"root_owner={root.st_uid}:{root.st_gid}", "lazy_itable_init=1", "lazy_journal_init=1",
        *(["assume_storage_prezeroed=1"] if prezeroed else []),
    ]  # fmt: skip
    journal = _JOURNAL_MIB if size >= 4 * GIB else _SMALL_JOURNAL_MIB
    return [
        "mke2fs", "-q", "-F", "-L", LABEL, "-b", str(_BLOCK), "-I", "256", "-i", str(BYTES_PER_INODE),
        # Of 64 GiB, the customary 5 % for root alone would be 3 GiB; -e: a damaged disk is not written any further.
        "-m", "1", "-e", "remount-ro", "-J", f"size={journal}",
        "-O", ",".join(_FEATURES), "-E", ",".join(extended), "-d", ".", path,
    ]  # fmt: skip


def root_mode_command(root: os.stat_result) -> bytes:
    """Give the root directory its mode and time, for debugfs(8): mke2fs copies what is below it only."""
    mode = stat.S_IFDIR | stat.S_IMODE(root.st_mode)
    seconds = min(max(0, int(root.st_mtime)), 2**31 - 1)
    return f"set_inode_field / mode 0{mode:o}\nset_inode_field / mtime @{seconds}\n".encode()


def measure(path: str) -> int:
    """Count the bytes that a tree takes in our file system: its blocks, or its inodes' share where that is more."""
    seen: set[tuple[int, int]] = set()
    blocks = 0
    for status in _entries(path):
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            # A host's file system may keep small files inside the inode; ours gives each a block.
            least = min(_BLOCK, status.st_size) if stat.S_ISREG(status.st_mode) else 0
            blocks += -(-max(status.st_blocks * 512, least) // _BLOCK) * _BLOCK
    return max(blocks, len(seen) * BYTES_PER_INODE)


def _entries(path: str) -> Iterator[os.stat_result]:
    for folder, names, files in os.walk(path):
        for name in (*names, *files):
            yield os.lstat(os.path.join(folder, name))
