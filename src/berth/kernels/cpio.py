"""Write cpio archives, format "newc": what the kernel unpacks into its first root file system. Pure.

The same nodes give the same bytes, whoever makes them and when: no times, owner root, inodes in order.
Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst; cpio(5), "New ASCII Format".
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterable

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_BLOCK = 512  # archives may follow one another, each at such a boundary
_SIZE_MAX = 2**32 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One name in the archive. name: relative, without a leading slash. mode: with its file type.

    device: major and minor number of a device node.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, permissions: int = 0o755) -> Node:
    return Node(name, stat.S_IFDIR | permissions)


def file(name: str, data: bytes, permissions: int = 0o644) -> Node:
    return Node(name, stat.S_IFREG | permissions, data)


def character_device(name: str, major: int, minor: int, permissions: int = 0o600) -> Node:
    return Node(name, stat.S_IFCHR | permissions, device=(major, minor))


def archive(nodes: Iterable[Node]) -> bytes:
    """Write `nodes`, parents before what is in them, and pad the archive so that another may follow."""
    parts: list[bytes] = []
    for inode, node in enumerate(nodes, 1):
        parts.append(_member(node, inode))
    parts.append(_member(Node(_TRAILER, 0), 0))
    size = sum(map(len, parts))
    return b"".join([*parts, bytes(-size % _BLOCK)])


def _member(node: Node, inode: int) -> bytes:
    name = node.name.encode() + b"\0"
    assert len(node.data) <= _SIZE_MAX, node.name
    links = 2 if stat.S_ISDIR(node.mode) else 1
    # inode, mode, uid, gid, links, mtime, size, major and minor of the file system and of the node, name size, checksum
    fields = (inode, node.mode, 0, 0, links, 0, len(node.data), 0, 0, *node.device, len(name), 0)
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head) + _padded(node.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
