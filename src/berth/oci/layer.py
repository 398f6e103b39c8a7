"""Apply one layer to a directory. Owns the rules of the image-spec for that, and their defence; `unpack` uses it.

What the rules are, and where a choice was made, is told in docs/images.md, "How a layer is applied". Nothing that a
layer says is believed: names are resolved by `tree`, sizes are bounded by `Limits`, and what would make the kernel do
more than keep a file (devices, overlayfs' own attributes) is left out and counted.

Source: OCI image-spec v1.1, layer.md.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Mapping
from typing import Literal

from berth.errors import BerthError, ImageFormatError, UnsupportedError
from berth.oci import tar
from berth.oci.stream import ByteStream, write_all
from berth.oci.tree import Place, Tree, make_directory, open_directory, split
from berth.units import GIB

Devices = Literal["make", "skip"]

# Source: layer.md, "Whiteouts", "Opaque Whiteout".
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."  # metadata of docker's first storage driver
_NO_FOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW
_HOLE = 64 * 1024  # bytes of zeros, aligned, that become a hole
_ZEROS = bytes(_HOLE)
_TIME_MAX_NS = 2**62  # the year 2116: clocks beyond it are no use, and every file system's limits are further
# Source: systemd's "The Case for the /usr Merge"; in a merged system these links are what /bin/sh and ld.so hang on.
MERGED = frozenset({b"bin", b"sbin", b"lib", b"lib32", b"lib64", b"libx32", b"libo32"})
_XATTRS = (b"user.", b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default")
_OVERLAY = (b"user.overlay.", b"trusted.overlay.")
# What setxattr says when a file system or a user namespace can't hold an attribute.
_NO_XATTR = frozenset({
    errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL, errno.ERANGE, errno.E2BIG, errno.EOVERFLOW,
})  # fmt: skip
_BAD_NAME = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ})


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What an image may ask for at most. Generous: the largest public images have 1 M files and 50 GiB.

    stream: decompressed bytes of one layer. size: of one file, holes included. entries: of one layer.
    """

    stream: int = 256 * GIB
    size: int = 16 * 1024 * GIB
    entries: int = 8_000_000


@dataclasses.dataclass(slots=True)
class UnpackReport:
    """What was done, and what was left out. data: bytes written, without holes."""

    layers: int = 0
    entries: int = 0
    data: int = 0
    whiteouts: int = 0
    devices_skipped: int = 0
    dev_skipped: int = 0  # entries below /dev, which the machine mounts anew
    xattrs_skipped: dict[str, int] = dataclasses.field(default_factory=dict[str, int])

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> UnpackReport:
        """Rebuild what `to_json` gave in another process of ours."""
        return cls(**document)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def apply_layer(
    stream: ByteStream, root_fd: int, report: UnpackReport, *, devices: Devices, limits: Limits | None = None
) -> None:
    """Apply the decompressed layer in `stream` to the directory `root_fd`, adding to `report`.

    Directories get their modes and times at the end. After an error the tree is half-made and the caller's to remove.
    Raises ImageFormatError for a layer that breaks its format or tries to get out, UnsupportedError for ids that don't
    exist in this user namespace, BerthError for what the file system refuses.
    """
    layer = _Layer(stream, root_fd, report, devices, limits or Limits())
    try:
        layer.apply()
    finally:
        layer.close()


@dataclasses.dataclass(slots=True)
class _Directory:
    """What a directory gets at the end."""

    uid: int
    gid: int
    mode: int
    mtime_ns: int
    xattrs: Mapping[bytes, bytes]


class _Layer:
    """One layer being applied."""

    def __init__(
        self, stream: ByteStream, root_fd: int, report: UnpackReport, devices: Devices, limits: Limits
    ) -> None:
        self._stream = stream
        self._reader = tar.TarReader(stream)
        # True paths that this layer brought: its whiteouts don't hide them (layer.md, "Whiteouts").
        self._fresh: set[bytes] = set()
        self._tree = Tree(root_fd, made=self._made)
        self._report = report
        self._devices = devices
        self._limits = limits
        self._directories: dict[bytes, _Directory] = {}
        self._merged: set[bytes] = set()

    def close(self) -> None:
        self._tree.close()

    def apply(self) -> None:
        count = 0
        for entry in self._reader:
            count += 1
            if count > self._limits.entries:
                raise ImageFormatError(f"{self._stream.where} has more than {self._limits.entries} entries")
            self._tree.trim()
            try:
                self._apply(entry)
            except ImageFormatError as error:
                raise ImageFormatError(f"{self._stream.where}: {_show(entry.name)}: {error.message}") from error
            except OSError as error:
                raise self._explain(error, entry) from error
        self._stream.drain()
        self._finish_directories()
        self._report.entries += count
        self._report.layers += 1

    def _explain(self, error: OSError, entry: tar.Entry) -> BerthError:
        name, where = _show(entry.name), self._stream.where
        if error.errno in _BAD_NAME:
            return ImageFormatError(f"{where}: {name}: {error.strerror}")
        if error.errno == errno.EINVAL and max(entry.uid, entry.gid) >= 65536:
            return UnsupportedError(
                f"{where}: {name} belongs to {entry.uid}:{entry.gid}, an id that this user namespace does not have",
                hint="a larger range in /etc/subuid and /etc/subgid, or an image without such owners",
            )
        return BerthError(f"can't unpack {where}: {name}: {error.strerror}")

    def _apply(self, entry: tar.Entry) -> None:
        path = split(entry.name)
        if path.startswith(b"dev/"):
            self._report.dev_skipped += 1
            return
        if WHITEOUT in path and self._apply_whiteout(path):
            return
        if not path:
            self._apply_root(entry)
            return
        place = self._tree.parent(path, make=True)
        assert place is not None  # `make` never gives None
        name = path.rpartition(b"/")[2]
        if entry.kind == tar.DIRECTORY:
            self._directory(entry, place, name)
            return
        match entry.kind:
            case tar.FILE:
                self._file(entry, place, name)
            case tar.HARDLINK:
                self._hard_link(entry, place, name)
            case tar.SYMLINK:
                self._symlink(entry, place, name)
            case _:
                self._special(entry, place, name)
        self._fresh.add(place.below(name))

    # Whiteouts

    def _apply_whiteout(self, path: bytes) -> bool:
        """Apply `path` if it is a whiteout; say whether it was (or is to be left out)."""
        head, _, name = path.rpartition(b"/")
        if any(part.startswith(_AUFS) for part in path.split(b"/")) and name != OPAQUE:
            return True
        if any(part.startswith(WHITEOUT) for part in head.split(b"/")):
            raise ImageFormatError("a directory has the name of a whiteout")
        if not name.startswith(WHITEOUT):
            return False
        self._report.whiteouts += 1
        if name == OPAQUE:
            self._opaque(head)
        else:
            self._whiteout(path, name.removeprefix(WHITEOUT))
        return True

    def _whiteout(self, path: bytes, hidden: bytes) -> None:
        if hidden in (b"", b".", b".."):
            raise ImageFormatError("a whiteout hides no valid name")
        place = self._tree.parent(path, make=False)
        if place is None:
            return
        target = place.below(hidden)
        if target not in self._fresh:
            self._tree.remove(place, hidden)
            return
        # This layer brought something of that name: what lower layers had in it is hidden, that itself is not.
        inside = self._tree.directory(target, make=False)
        if inside is not None and inside.path == target:
            self._tree.purge(inside, self._fresh)

    def _opaque(self, path: bytes) -> None:
        if path in self._merged:
            # An opaque directory is a new one: it does mean to replace the link into /usr after all.
            self._merged.discard(path)
            self._tree.remove(self._tree.root, path)
            make_directory(path, self._tree.root.fd)
            self._made(path)
        place = self._tree.directory(path, make=False)
        if place is not None:
            self._tree.purge(place, self._fresh)

    def _made(self, path: bytes) -> None:
        """Take note of a directory that a name implied: what was said of an earlier one at its place is void."""
        self._fresh.add(path)
        self._directories.pop(path, None)

    # Directories

    def _apply_root(self, entry: tar.Entry) -> None:
        if entry.kind == tar.DIRECTORY:
            self._directories[b""] = _at_the_end(entry)

    def _directory(self, entry: tar.Entry, place: Place, name: bytes) -> None:
        path = place.below(name)
        try:
            os.mkdir(name, 0o700, dir_fd=place.fd)
        except FileExistsError:
            mode = os.stat(name, dir_fd=place.fd, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode) and path in MERGED and self._leads_into_usr(path):
                self._merged.add(path)
                return
            if not stat.S_ISDIR(mode):
                self._tree.remove(place, name)
                os.mkdir(name, 0o700, dir_fd=place.fd)
            elif mode & 0o700 != 0o700 and os.geteuid() != 0:
                os.chmod(name, mode | 0o700, dir_fd=place.fd)
        self._fresh.add(path)
        self._directories[path] = _at_the_end(entry)

    def _leads_into_usr(self, path: bytes) -> bool:
        place = self._tree.directory(path, make=False)
        return place is not None and place.path == b"usr/" + path

    def _finish_directories(self) -> None:
        """Give the directories their modes and times, the deepest first: a mode may shut us out of what is below."""
        for path in sorted(self._directories, reverse=True):
            self._tree.trim()
            place = self._tree.directory(path, make=False)
            if place is None or place.path != path:
                continue  # it was replaced by something else later in the layer
            try:
                self._finish_directory(place, self._directories[path])
            except OSError as error:
                raise BerthError(f"can't unpack {self._stream.where}: {_show(path)}: {error.strerror}") from error

    def _finish_directory(self, place: Place, end: _Directory) -> None:
        fd = open_directory(b".", place.fd)
        try:
            os.fchown(fd, end.uid, end.gid)
            self._set_xattrs(fd, end.xattrs)
            os.fchmod(fd, end.mode)
            os.utime(fd, ns=(end.mtime_ns, end.mtime_ns))
        finally:
            os.close(fd)

    # Everything else

    def _file(self, entry: tar.Entry, place: Place, name: bytes) -> None:
        if entry.size > self._limits.size:
            raise ImageFormatError(f"its size is {entry.size} bytes, more than {self._limits.size}")
        try:
            fd = os.open(name, _CREATE, 0o600, dir_fd=place.fd)
        except FileExistsError:
            self._tree.remove(place, name)
            fd = os.open(name, _CREATE, 0o600, dir_fd=place.fd)
        try:
            if entry.sparse is not None:
                self._write_sparse(fd, entry, entry.sparse)
            elif entry.size:
                self._write(fd, entry.size)
            # In this order: a change of owner clears the setuid bits and the capabilities.
            os.fchown(fd, entry.uid, entry.gid)
            if entry.xattrs:
                self._set_xattrs(fd, entry.xattrs)
            os.fchmod(fd, entry.mode)
            mtime = _bounded(entry.mtime_ns)
            os.utime(fd, ns=(mtime, mtime))
        finally:
            os.close(fd)

    def _write(self, fd: int, size: int) -> None:
        if size < _HOLE:
            data = b"".join(self._reader.pieces())
            write_all(fd, data)
            self._report.data += size
            return
        at = 0
        for piece in self._reader.pieces():
            self._write_piece(fd, piece, at)
            at += len(piece)
        os.ftruncate(fd, size)  # it may end in a hole

    def _write_piece(self, fd: int, piece: bytes, at: int) -> None:
        """Write one piece at the offset `at`, leaving out aligned runs of zeros."""
        start = 0  # of what is to be written
        for step in range(-at % _HOLE, len(piece) - _HOLE + 1, _HOLE):
            if piece.startswith(_ZEROS, step):
                self._write_at(fd, piece[start:step], at + start)
                start = step + _HOLE
        self._write_at(fd, piece[start:], at + start)

    def _write_at(self, fd: int, data: bytes, at: int) -> None:
        view = memoryview(data)
        self._report.data += len(data)
        while view:
            written = os.pwrite(fd, view, at)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            at += written
            view = view[written:]

    def _write_sparse(self, fd: int, entry: tar.Entry, sparse: list[tuple[int, int]]) -> None:
        os.ftruncate(fd, entry.size)
        pieces = self._reader.pieces()
        rest = b""
        for offset, length in sparse:
            while length:
                rest = rest or next(pieces)
                data, rest = rest[:length], rest[length:]
                self._write_piece(fd, data, offset)
                offset += len(data)
                length -= len(data)

    def _hard_link(self, entry: tar.Entry, place: Place, name: bytes) -> None:
        target = split(entry.link)
        if target.startswith(b"dev/"):
            self._report.dev_skipped += 1
            return
        source = self._tree.parent(target, make=False)
        source_name = target.rpartition(b"/")[2]
        if source is None or not target:
            raise ImageFormatError(f"a hard link to {_show(entry.link)}, which is not there")
        if source.below(source_name) == place.below(name):
            return  # to itself: removing the old name first would lose the file
        try:
            self._link(source, source_name, place, name)
        except FileNotFoundError as error:
            raise ImageFormatError(f"a hard link to {_show(entry.link)}, which is not there") from error
        except PermissionError as error:
            raise ImageFormatError(f"a hard link to {_show(entry.link)}, which is a directory") from error

    def _link(self, source: Place, source_name: bytes, place: Place, name: bytes) -> None:
        for attempt in (1, 2):
            try:
                os.link(source_name, name, src_dir_fd=source.fd, dst_dir_fd=place.fd, follow_symlinks=False)
                return
            except FileExistsError:
                if attempt == 2:
                    raise
                self._tree.remove(place, name)

    def _symlink(self, entry: tar.Entry, place: Place, name: bytes) -> None:
        if not entry.link:
            raise ImageFormatError("a symbolic link to nothing")
        try:
            os.symlink(entry.link, name, dir_fd=place.fd)
        except FileExistsError:
            self._tree.remove(place, name)
            os.symlink(entry.link, name, dir_fd=place.fd)
        os.chown(name, entry.uid, entry.gid, dir_fd=place.fd, follow_symlinks=False)
        mtime = _bounded(entry.mtime_ns)
        os.utime(name, ns=(mtime, mtime), dir_fd=place.fd, follow_symlinks=False)
        for key in entry.xattrs:
            self._skip_xattr(key)  # user.* is not for links, and security.* would need a path

    def _special(self, entry: tar.Entry, place: Place, name: bytes) -> None:
        self._tree.remove(place, name)
        if entry.kind == tar.FIFO:
            os.mkfifo(name, 0o600, dir_fd=place.fd)
        elif not self._make_device(entry, place, name):
            self._report.devices_skipped += 1
            return
        os.chown(name, entry.uid, entry.gid, dir_fd=place.fd, follow_symlinks=False)
        os.chmod(name, entry.mode, dir_fd=place.fd)
        mtime = _bounded(entry.mtime_ns)
        os.utime(name, ns=(mtime, mtime), dir_fd=place.fd)

    def _make_device(self, entry: tar.Entry, place: Place, name: bytes) -> bool:
        # A character device 0/0 is overlayfs' own whiteout: it would hide what other layers brought.
        if self._devices == "skip" or (entry.kind == tar.CHAR and entry.major == entry.minor == 0):
            return False
        if entry.major >= 2**12 or entry.minor >= 2**20:  # what the kernel's dev_t holds
            raise ImageFormatError(f"there is no device {entry.major}:{entry.minor}")
        kind = stat.S_IFCHR if entry.kind == tar.CHAR else stat.S_IFBLK
        os.mknod(name, kind | 0o600, os.makedev(entry.major, entry.minor), dir_fd=place.fd)
        return True

    def _set_xattrs(self, fd: int, xattrs: Mapping[bytes, bytes]) -> None:
        for key, value in xattrs.items():
            if not key.startswith(_XATTRS) or key.startswith(_OVERLAY) or b"\0" in key:
                self._skip_xattr(key)
                continue
            try:
                os.setxattr(fd, key, value)
            except OSError as error:
                if error.errno not in _NO_XATTR:
                    raise
                self._skip_xattr(key)

    def _skip_xattr(self, key: bytes) -> None:
        shown = _show(key)[:256]
        counts = self._report.xattrs_skipped
        if shown in counts or len(counts) < 1000:  # a hostile layer may invent a name for every file
            counts[shown] = counts.get(shown, 0) + 1


def _at_the_end(entry: tar.Entry) -> _Directory:
    return _Directory(entry.uid, entry.gid, entry.mode, _bounded(entry.mtime_ns), entry.xattrs)


def _bounded(mtime_ns: int) -> int:
    return max(-_TIME_MAX_NS, min(mtime_ns, _TIME_MAX_NS))


def _show(name: bytes) -> str:
    """Print a name of any bytes in one line. No codec but UTF-8: others would be loaded, from files out of reach."""
    text = name.decode(errors="backslashreplace")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
