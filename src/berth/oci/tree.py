"""A directory tree that no path leads out of. Owns how names below a directory are resolved; `layer` uses it.

Every component is opened by itself with O_NOFOLLOW. A parent that is a symbolic link is followed by us, inside the
tree: an absolute target starts at the tree's root and ``..`` stops there (what openat2 calls RESOLVE_IN_ROOT, and
docker FollowSymlinkInScope). Real images need that: a layer's ``lib/x`` belongs into ``usr/lib`` when the base has
merged /usr. Nobody else changes the tree meanwhile, so a resolved directory is kept open for the entries that follow.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Container
from typing import NamedTuple

from berth.errors import ImageFormatError

_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SEARCH = _DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)
_LINKS_MAX = 40  # as the kernel
_DEPTH_MAX = 256  # directories in each other; bounds recursion and open descriptors when a tree is removed
_PATH_MAX = 4095
_KEPT_OPEN = 128


class Place(NamedTuple):
    """An open directory of the tree. path: its true path below the root, without links; b"" is the root."""

    fd: int
    path: bytes

    def below(self, name: bytes) -> bytes:
        return self.path + b"/" + name if self.path else name


def split(name: bytes) -> bytes:
    """Normalize a name from an archive: relative, without empty and ``.`` components; b"" is the root itself.

    An absolute name counts from the tree's root, as everywhere. Raises ImageFormatError for ``..`` and undue length.
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ImageFormatError(f"the name {os.fsdecode(name)!r} leads upwards")
    if len(name) > _PATH_MAX or len(parts) > _DEPTH_MAX:
        raise ImageFormatError(f"the name {os.fsdecode(name[:60])!r}… is longer than any path may be")
    return b"/".join(parts)


class Tree:
    """The tree below `root_fd`, which stays the caller's; close it after use.

    Places that it hands out are valid until the next `trim`.
    """

    def __init__(self, root_fd: int, *, made: Callable[[bytes], None] = lambda _path: None) -> None:
        """made: told the true path of every directory that is made because a name implies it."""
        self.root = Place(os.open(b".", _SEARCH, dir_fd=root_fd), b"")
        self._made = made
        self._open: dict[bytes, Place] = {}  # by true path, the longest unused first
        self._alias: dict[bytes, bytes] = {}  # a path as written, with links in it, to the true path
        self._stale: list[int] = []
        self._links = 0  # followed for the current name

    def close(self) -> None:
        self.forget()
        self.trim()
        os.close(self.root.fd)

    def forget(self) -> None:
        """Believe nothing that is remembered: a directory or a link was removed, so names may lead elsewhere now."""
        self._stale += [place.fd for place in self._open.values()]
        self._open.clear()
        self._alias.clear()

    def trim(self) -> None:
        """Close what is not of use any more."""
        while len(self._open) > _KEPT_OPEN:
            self._stale.append(self._open.pop(next(iter(self._open))).fd)
        while self._stale:
            os.close(self._stale.pop())

    def directory(self, path: bytes, *, make: bool) -> Place | None:
        """Open the directory `path` (from `split`), following links inside the tree.

        make: make what is missing (0755), and replace what is neither directory nor link; else None is returned.
        Raises ImageFormatError for a loop of links and for a tree that gets too deep.
        """
        self._links = 0
        return self._resolve(path, make=make)

    def parent(self, path: bytes, *, make: bool) -> Place | None:
        """Open the directory that `path` lies in; its last component may be anything."""
        return self.directory(path.rpartition(b"/")[0], make=make)

    def remove(self, place: Place, name: bytes) -> None:
        """Remove a file or a whole directory, if it is there."""
        try:
            mode = os.stat(name, dir_fd=place.fd, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            _remove_directory(place.fd, name)
        else:
            os.unlink(name, dir_fd=place.fd)
        if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            self.forget()

    def purge(self, place: Place, keep: Container[bytes]) -> None:
        """Remove all that is below `place` but the true paths in `keep`, and what those directories hold of them."""
        self.forget()
        _purge(open_directory(b".", place.fd), place.path, keep)

    def _resolve(self, path: bytes, *, make: bool) -> Place | None:
        place = self._remembered(path)
        if place is not None:
            return place
        # The longest beginning that is known, then step by step.
        cut = len(path)
        while place is None:
            cut = path.rfind(b"/", 0, cut)
            place = self.root if cut < 0 else self._remembered(path[:cut])
        for name in path[cut + 1 :].split(b"/"):
            place = self._step(place, name, make=make)
            if place is None:
                return None
        if place.path != path:
            self._alias[path] = place.path
        return place

    def _remembered(self, path: bytes) -> Place | None:
        if not path:
            return self.root
        place = self._open.pop(self._alias.get(path, path), None)
        if place is not None:
            self._open[place.path] = place
        return place

    def _step(self, place: Place, name: bytes, *, make: bool) -> Place | None:
        """Enter `name`, which may be a link, from the true directory `place`."""
        path = place.below(name)
        known = self._remembered(path)
        if known is not None:
            return known
        if path.count(b"/") >= _DEPTH_MAX or len(path) > _PATH_MAX:
            raise ImageFormatError(f"the directory {os.fsdecode(path[:60])!r}… is nested too deep")
        try:
            fd = os.open(name, _SEARCH, dir_fd=place.fd)
        except FileNotFoundError:
            return self._make(place, name) if make else None
        except NotADirectoryError:
            return self._follow(place, name, make=make)
        except OSError as error:
            if error.errno != errno.ELOOP:  # what systems other than Linux say of a link here
                raise
            return self._follow(place, name, make=make)
        self._open[path] = Place(fd, path)
        return self._open[path]

    def _make(self, place: Place, name: bytes) -> Place:
        make_directory(name, place.fd)
        path = place.below(name)
        self._made(path)
        self._open[path] = Place(os.open(name, _SEARCH, dir_fd=place.fd), path)
        return self._open[path]

    def _follow(self, place: Place, name: bytes, *, make: bool) -> Place | None:
        try:
            target = os.readlink(name, dir_fd=place.fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if not make:
                return None
            os.unlink(name, dir_fd=place.fd)  # a file of a lower layer that has become a directory
            return self._make(place, name)
        # In all, not in depth: links to links that fan out would take exponential time.
        self._links += 1
        if self._links > _LINKS_MAX:
            raise ImageFormatError(f"too many links on the way: {os.fsdecode(place.below(name))!r}")
        at = self.root if target.startswith(b"/") else place
        for part in target.split(b"/"):
            if part in (b"", b"."):
                continue
            up = part == b".."
            found = self._resolve(at.path.rpartition(b"/")[0], make=make) if up else self._step(at, part, make=make)
            if found is None:
                return None
            at = found
        return at


def make_directory(name: bytes, dir_fd: int) -> None:
    """Make a directory that everybody may enter, whatever our umask."""
    os.mkdir(name, 0o755, dir_fd=dir_fd)
    os.chmod(name, 0o755, dir_fd=dir_fd)  # noqa: S103 (what every directory of a root file system has)


def open_directory(name: bytes, dir_fd: int) -> int:
    """Open a directory for reading, also one whose mode forbids it to its owner."""
    flags = os.O_RDONLY | _DIRECTORY
    try:
        return os.open(name, flags, dir_fd=dir_fd)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=dir_fd)
        return os.open(name, flags, dir_fd=dir_fd)


def _remove_directory(dir_fd: int, name: bytes) -> None:
    _purge(open_directory(name, dir_fd), b"", ())
    os.rmdir(name, dir_fd=dir_fd)


def _purge(fd: int, path: bytes, keep: Container[bytes]) -> None:
    """Empty the directory `fd` at the true path `path` but for `keep`, and close it."""
    try:
        with os.scandir(fd) as entries:
            found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_directory in found:
            below = path + b"/" + name if path else name
            if below not in keep:
                _remove_directory(fd, name) if is_directory else os.unlink(name, dir_fd=fd)
            elif is_directory:
                _purge(open_directory(name, fd), below, keep)
    finally:
        os.close(fd)
