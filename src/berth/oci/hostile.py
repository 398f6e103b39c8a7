"""Check a layer that a guest has made, before it is stored. Owns what may be in one; layer 2; the VM engine calls it.

The rules are those by which a layer is applied (`layer`, `tree`, `tar`), so that a machine can't put an image into the
store that nothing can be made from; and nothing may be in it that was to be left out. Memory is bounded by the number
of files with several names.
"""

from __future__ import annotations

from collections.abc import Collection

from berth.errors import ImageFormatError
from berth.oci import tar
from berth.oci.layer import OPAQUE, WHITEOUT, Limits
from berth.oci.stream import ByteStream, FileChunks
from berth.oci.tree import split

_MEMORY_MAX = 256 * 1024 * 1024  # bytes; a million files of several names, which is what `diff` remembers
_NAME = 100  # bytes that a name takes here, besides its letters


def check_layer(
    fd: int, *, start: int, size: int, exclude: Collection[bytes], where: str, limits: Limits | None = None
) -> int:
    """Read the layer that is `size` bytes of a file, from `start` on; return the number of its entries.

    exclude: relative paths that must not be in it, nor anything below them. Raises ImageFormatError.
    """
    checker = _Checker(frozenset(exclude), limits or Limits())
    count = 0
    for links_too in (False, True):
        if links_too and not checker.targets:
            break
        stream = ByteStream(FileChunks(fd, start=start, count=size), where=where)
        for count, entry in enumerate(tar.TarReader(stream), 1):
            try:
                checker.check_target(entry) if links_too else checker.check(entry, count)
            except ImageFormatError as error:
                raise ImageFormatError(f"{where}: {ascii(entry.name[:200])[2:-1]}: {error.message}") from error
        if stream.read(tar.BLOCK + 1) != bytes(tar.BLOCK):  # the reader has taken the first of the two
            raise ImageFormatError(f"{where} does not end where it says")
    return count


class _Checker:
    def __init__(self, exclude: frozenset[bytes], limits: Limits) -> None:
        self.targets: set[bytes] = set()  # of hard links
        self._exclude = exclude
        self._limits = limits
        self._seen: set[bytes] = set()  # those of the targets that were
        self._taken = 0  # bytes of memory, about

    def check(self, entry: tar.Entry, count: int) -> None:
        if count > self._limits.entries:
            raise ImageFormatError(f"more than {self._limits.entries} entries")
        path = split(entry.name)
        *folders, name = path.split(b"/")
        if not name:
            raise ImageFormatError("it is the root itself")
        if any(folder.startswith(WHITEOUT) for folder in folders):
            raise ImageFormatError("a directory has the name of a whiteout")
        if name.startswith(WHITEOUT):
            name = self._hidden(name, entry)
        self._check_place(folders, name)
        if entry.kind == tar.FILE and entry.size > self._limits.size:
            raise ImageFormatError(f"its size is {entry.size} bytes")
        if entry.kind == tar.SYMLINK and not entry.link:
            raise ImageFormatError("a symbolic link to nothing")
        if entry.kind == tar.HARDLINK:
            self._remember(split(entry.link))

    def check_target(self, entry: tar.Entry) -> None:
        path = split(entry.name)
        if entry.kind == tar.HARDLINK:
            if split(entry.link) not in self._seen:
                raise ImageFormatError("a hard link to what is not there")
        elif entry.kind != tar.DIRECTORY and path in self.targets:
            self._seen.add(path)

    def _remember(self, target: bytes) -> None:
        if target not in self.targets:
            self._taken += _NAME + len(target)
            if self._taken > _MEMORY_MAX:
                raise ImageFormatError("more files with several names than fit in memory")
            self.targets.add(target)

    def _hidden(self, name: bytes, entry: tar.Entry) -> bytes:
        """Return the name that a whiteout hides; an opaque directory's is the directory's own business."""
        if entry.kind != tar.FILE or entry.size:
            raise ImageFormatError("a whiteout that is no empty file")
        if name == OPAQUE:
            return b""
        hidden = name.removeprefix(WHITEOUT)
        if hidden in (b"", b".", b"..") or hidden.startswith(WHITEOUT):
            raise ImageFormatError("a whiteout hides no valid name")
        return hidden

    def _check_place(self, folders: list[bytes], name: bytes) -> None:
        for count in range(1, len(folders) + 1):
            if b"/".join(folders[:count]) in self._exclude:
                raise ImageFormatError("it lies where nothing of a machine's is taken from")
        if name and b"/".join((*folders, name)) in self._exclude:
            raise ImageFormatError("it is not to be in an image")
