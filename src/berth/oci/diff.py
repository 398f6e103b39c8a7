"""What a machine has changed, as a layer: the upper directory of an overlayfs into a tar archive. Layer 2.

Adapting an image and `commit` use it, while the machine does not run. Nothing that a machine left there is followed or
believed: every name is opened by itself, without following links, and only regular files are read.

overlayfs keeps its marks in extended attributes, `trusted.overlay.*` for root and `user.overlay.*` in a user namespace:

    whiteout             char device 0/0, or an empty file with the mark `whiteout`  →  `.wh.NAME`
    opaque = y           a directory that hides what is below it                     →  `.wh..wh..opq` in it
    redirect = PATH      a directory of the image that was renamed                   →  its whole content, opaque
    metacopy             a file whose data is the image's                            →  the whole file

What can't be in a layer is left out and counted: sockets, and files that are called like a whiteout.

Sources: OCI image-spec v1.1, layer.md; the kernel's Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import stat
import struct
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import IO, cast

from berth import rooted, userns
from berth.errors import BerthError, ImageFormatError
from berth.oci import tar
from berth.oci.digest import Digest, parse_digest
from berth.oci.layer import OPAQUE, WHITEOUT
from berth.oci.tarwriter import END, Member, encode_member, padding
from berth.userns import Extent, IdMap

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MARKS = ("trusted.overlay.", "user.overlay.")
_CAPABILITY = "security.capability"
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")
_CHUNK = 1024 * 1024
_DEPTH_MAX = 256  # directories in each other: no layer that is deeper can be unpacked again (`tree`)
_LINKS_MAX = 1_000_000  # files with several names that are remembered; further ones are stored twice
_PIECES_MAX = 10_000  # of a sparse file
_HOLES_MIN = 64 * 1024  # bytes of holes that make a file a sparse one
_NOBODY = 65534  # what an id that the machine does not have is shown as; user_namespaces(7)


@dataclasses.dataclass(frozen=True, slots=True)
class Digests:
    """What was written. diff_id: of the archive, uncompressed; size: its bytes; left_out: files no layer can hold."""

    diff_id: Digest
    size: int
    entries: int = 0
    whiteouts: int = 0
    left_out: int = 0

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: object) -> Digests:
        """Rebuild what `to_json` gave in another process of ours."""
        match document:
            case {"diff_id": str(digest), "size": int(size), "entries": int(entries), "whiteouts": int(whiteouts)}:
                left_out = cast("dict[str, int]", document)["left_out"]
                return cls(parse_digest(digest, where="a layer"), size, entries, whiteouts, left_out)
            case _:
                raise BerthError(f"unexpected answer from who made the layer: {document!r:.200}")


def write_layer(
    upper: int | str,
    out: IO[bytes],
    *,
    lower: int | str | None = None,
    exclude: Collection[str] = (),
    idmap: IdMap | None = None,
) -> Digests:
    """Write the changes in the directory `upper` to `out`, as an uncompressed layer; same directory, same bytes.

    lower: the root file system that it lay on; without it a renamed directory of the image can't be told, and an opaque
    mark is written where none is needed. exclude: paths below the root (``etc/hosts``), with what is in them. idmap:
    from the ids in the archive to those on the disk; None where we are in the machine's user namespace ourselves.

    Whoever calls may read the files and `trusted.*` attributes: the host's root with an idmap, or root of a user
    namespace. `layer_of` sees to that. Raises ImageFormatError for what no layer can tell, BerthError for a bad disk.
    """
    exclusions = frozenset(os.fsencode(path.strip("/")) for path in exclude)
    with _opened(upper) as upper_fd, _opened(lower) as lower_fd:
        assert upper_fd is not None
        layer = _Layer(out, lower_fd, _Ids(idmap), exclusions)
        try:
            layer.walk(b"", upper_fd, b"" if lower_fd is not None else None, complete=False, depth=0)
            return layer.finish()
        except OSError as error:
            raise BerthError(f"the changes can't be made a layer: {error.strerror}: {error.filename or ''}") from error


def layer_of(upper: Path, out: IO[bytes], *, lower: Path | None = None, exclude: Collection[str] = ()) -> Digests:
    """`write_layer` for a machine's upper directory and its template, from where both can be read.

    Root sees all of it, an ordinary user as root of the machine's kind of user namespace. `out` has a descriptor.
    """
    idmap = userns.plan_idmap(os.getuid(), os.getgid())
    if os.geteuid() == 0:
        return write_layer(str(upper), out, lower=None if lower is None else str(lower), exclude=exclude, idmap=idmap)
    out.flush()
    with contextlib.ExitStack() as stack:
        # O_PATH: whatever mode the machine's root gave to its /.
        folders = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in (upper, lower) if path is not None]
        for fd in folders:
            stack.callback(os.close, fd)
        arguments = {
            "upper": folders[0], "out": out.fileno(), "lower": folders[1] if lower is not None else None,
            "exclude": list(exclude),
        }  # fmt: skip
        return Digests.from_json(
            userns.call("berth.oci.diff:write_inside", arguments, idmap=idmap, pass_fds=[*folders, out.fileno()])
        )


def write_inside(upper: int, out: int, lower: int | None, exclude: list[str]) -> dict[str, object]:
    """`write_layer` for `userns.call`: descriptors and plain values in, plain values out."""
    with open(out, "wb", closefd=False) as file:
        return write_layer(upper, file, lower=lower, exclude=exclude).to_json()


@contextlib.contextmanager
def _opened(place: int | str | None) -> Generator[int | None]:
    """Open a directory; one that came as a descriptor once more, for reading, and with a position of its own."""
    if place is None:
        yield None
        return
    fd = os.open(".", _FOLDER, dir_fd=place) if isinstance(place, int) else os.open(place, _FOLDER)
    try:
        yield fd
    finally:
        os.close(fd)


class _Layer:
    """One layer being written."""

    def __init__(self, out: IO[bytes], lower: int | None, ids: _Ids, exclude: frozenset[bytes]) -> None:
        self._out = out
        self._lower = lower
        self._ids = ids
        # Root's machines may write user.* attributes of their own: only what the guest can't set is a mark.
        self._marks = "trusted.overlay." if ids.are_mapped else "user.overlay."
        self._exclude = exclude
        self._hash = hashlib.sha256()
        self._size = 0
        self._entries = 0
        self._whiteouts = 0
        self._left_out = 0
        self._links: dict[tuple[int, int], bytes] = {}  # device and inode to the first name

    def finish(self) -> Digests:
        self._write(END)
        self._out.flush()
        digest = Digest(f"sha256:{self._hash.hexdigest()}")
        return Digests(digest, self._size, self._entries, self._whiteouts, self._left_out)

    def walk(self, path: bytes, upper: int | None, origin: bytes | None, *, complete: bool, depth: int) -> None:
        """Write what is in the directory `path`.

        upper: it, open; None where only the image has it. origin: where the image has it, None where it has nothing to
        do with it. complete: all of its content is to be written, for it was renamed, or is in something that was.
        """
        if depth > _DEPTH_MAX:
            raise ImageFormatError(f"{os.fsdecode(path[:60])}… is nested deeper than {_DEPTH_MAX} directories")
        own = set(map(os.fsencode, os.listdir(upper))) if upper is not None else set[bytes]()
        with self._image_folder(origin if complete else None) as image:
            theirs = set(map(os.fsencode, os.listdir(image))) if image is not None else set[bytes]()
            for name in sorted(own | theirs):
                below = path + b"/" + name if path else name
                if below in self._exclude:
                    continue
                if name.startswith(WHITEOUT):
                    self._left_out += 1
                elif name in own:
                    assert upper is not None
                    self._own(below, upper, name, origin, complete=complete, depth=depth)
                elif image is not None:
                    self._image(below, image, name, origin, depth)

    def _own(self, path: bytes, folder: int, name: bytes, origin: bytes | None, *, complete: bool, depth: int) -> None:
        """Write what the machine has put into its own directory `folder` under `name`."""
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if self._is_whiteout(folder, name, status):
            if not complete:
                self._whiteout(path)
            return
        if not stat.S_ISDIR(status.st_mode):
            self._node(path, folder, name, status, origin)
            return
        fd = os.open(name, _FOLDER, dir_fd=folder)
        try:
            redirect = self._mark(fd, "redirect")
            is_opaque = self._mark(fd, "opaque") == b"y"
            below = None if is_opaque or origin is None else _join(origin, name)
            if redirect is not None:
                below = self._redirected(path, origin, redirect)
            self._directory(path, fd)
            if not complete and (redirect is not None or is_opaque) and self._hides(origin, name):
                self._whiteout(path + b"/" + OPAQUE, marker=True)
            self.walk(path, fd, below, complete=complete or redirect is not None, depth=depth + 1)
        finally:
            os.close(fd)

    def _image(self, path: bytes, folder: int, name: bytes, origin: bytes | None, depth: int) -> None:
        """Write what the image has in its directory `folder`, because a directory above it was renamed."""
        assert origin is not None
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            self._node(path, folder, name, status, None)
            return
        fd = os.open(name, _FOLDER, dir_fd=folder)
        try:
            self._directory(path, fd)
        finally:
            os.close(fd)
        self.walk(path, None, _join(origin, name), complete=True, depth=depth + 1)

    def _redirected(self, path: bytes, origin: bytes | None, redirect: bytes) -> bytes:
        if self._lower is None:
            raise ImageFormatError(f"/{os.fsdecode(path)} was renamed, and the image that it is of is not at hand")
        if redirect.startswith(b"/"):
            return redirect.strip(b"/")
        return _join(origin or b"", redirect)

    def _hides(self, origin: bytes | None, name: bytes) -> bool:
        """Say whether the image has something at a place; True when nobody knows."""
        if self._lower is None:
            return True
        if origin is None:
            return False
        try:
            os.close(rooted.resolve(self._lower, os.fsdecode(_join(origin, name)), flags=os.O_PATH | os.O_NOFOLLOW))
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def _image_folder(self, origin: bytes | None) -> Generator[int | None]:
        """Open a directory of the image; None when it is none."""
        if origin is None or self._lower is None:
            yield None
            return
        try:
            fd = rooted.resolve(self._lower, os.fsdecode(origin) or ".", flags=_FOLDER)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)

    # Marks

    def _is_whiteout(self, folder: int, name: bytes, status: os.stat_result) -> bool:
        if stat.S_ISCHR(status.st_mode):
            return status.st_rdev == 0
        if not stat.S_ISREG(status.st_mode) or status.st_size or self._mark(folder, "opaque") != b"x":
            return False
        fd = os.open(name, _FILE, dir_fd=folder)
        try:
            return self._mark(fd, "whiteout") is not None
        finally:
            os.close(fd)

    def _mark(self, fd: int, name: str) -> bytes | None:
        """Read one of overlayfs' marks; None when it is not set."""
        try:
            return os.getxattr(fd, self._marks + name)
        except OSError:
            return None

    # Members

    def _whiteout(self, path: bytes, *, marker: bool = False) -> None:
        head, _, name = path.rpartition(b"/")
        hidden = path if marker else _join(head, WHITEOUT + name)
        self._whiteouts += 1
        self._add(Member(hidden, tar.FILE, 0, 0, 0, 0, 0))

    def _directory(self, path: bytes, fd: int) -> None:
        self._add(self._member(path, tar.DIRECTORY, os.fstat(fd), xattrs=self._xattrs(fd)))

    def _node(self, path: bytes, folder: int, name: bytes, status: os.stat_result, origin: bytes | None) -> None:
        if self._is_linked(path, status):
            return
        mode = status.st_mode
        if stat.S_ISREG(mode):
            self._file(path, folder, name, origin)
        elif stat.S_ISLNK(mode):
            self._add(self._member(path, tar.SYMLINK, status, link=os.readlink(name, dir_fd=folder)))
        elif stat.S_ISFIFO(mode):
            self._add(self._member(path, tar.FIFO, status))
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            kind = tar.CHAR if stat.S_ISCHR(mode) else tar.BLOCK_DEVICE
            device = (os.major(status.st_rdev), os.minor(status.st_rdev))
            self._add(self._member(path, kind, status, device=device))
        else:
            self._left_out += 1

    def _is_linked(self, path: bytes, status: os.stat_result) -> bool:
        """Write a hard link when the file is in the archive already; remember it when it may come again."""
        if status.st_nlink < 2 or stat.S_ISSOCK(status.st_mode):
            return False
        first = self._links.get((status.st_dev, status.st_ino))
        if first is not None:
            self._add(self._member(path, tar.HARDLINK, status, link=first))
            return True
        if len(self._links) < _LINKS_MAX:
            self._links[status.st_dev, status.st_ino] = path
        return False

    def _file(self, path: bytes, folder: int, name: bytes, origin: bytes | None) -> None:
        fd = os.open(name, _FILE, dir_fd=folder)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ImageFormatError(f"/{os.fsdecode(path)} changes while it is read")
            with self._data_of(path, fd, name, origin) as data:
                pieces = _pieces(data, status)
                self._add(self._member(path, tar.FILE, status, xattrs=self._xattrs(fd), sparse=pieces))
                for offset, length in [(0, status.st_size)] if pieces is None else pieces:
                    self._copy(data, offset, length)
                total = status.st_size if pieces is None else sum(length for _, length in pieces)
                self._write(padding(total))
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _data_of(self, path: bytes, fd: int, name: bytes, origin: bytes | None) -> Generator[int]:
        """Give the descriptor that has a file's data: its own, or with the mark `metacopy` that of the image's file."""
        if self._mark(fd, "metacopy") is None:
            yield fd
            return
        where = self._redirected(path, origin, self._mark(fd, "redirect") or name)
        assert self._lower is not None
        data = rooted.resolve(self._lower, os.fsdecode(where), flags=_FILE)
        try:
            yield data
        finally:
            os.close(data)

    def _member(
        self,
        path: bytes,
        kind: bytes,
        status: os.stat_result,
        *,
        link: bytes = b"",
        device: tuple[int, int] = (0, 0),
        xattrs: dict[bytes, bytes] | None = None,
        sparse: list[tuple[int, int]] | None = None,
    ) -> Member:
        return Member(
            path, kind, stat.S_IMODE(status.st_mode), self._ids.uid(status.st_uid), self._ids.gid(status.st_gid),
            status.st_size if kind == tar.FILE else 0, status.st_mtime_ns, link, device, xattrs or {}, sparse,
        )  # fmt: skip

    def _xattrs(self, fd: int) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for key in _list_xattrs(fd):
            # A PAX record ends its key at the first equals sign: such an attribute would come back as another.
            if key.startswith(_MARKS) or "=" in key or not (key.startswith("user.") or key in (_CAPABILITY, *_ACLS)):
                continue
            value = os.getxattr(fd, key)
            if key == _CAPABILITY:
                value = self._ids.capability(value)
            elif key in _ACLS:
                value = self._ids.acl(value)
            found[os.fsencode(key)] = value
        return found

    # Bytes

    def _add(self, member: Member) -> None:
        self._entries += 1
        self._write(encode_member(member))

    def _copy(self, fd: int, offset: int, length: int) -> None:
        """Copy exactly `length` bytes: a file that has become shorter meanwhile ends in zeros."""
        while length:
            data = os.pread(fd, min(length, _CHUNK), offset) or bytes(min(length, _CHUNK))
            self._write(data)
            offset += len(data)
            length -= len(data)

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._hash.update(data)
        self._size += len(data)


class _Ids:
    """Turns ids as they are on the disk into those of the machine."""

    def __init__(self, idmap: IdMap | None) -> None:
        self._idmap = idmap

    @property
    def are_mapped(self) -> bool:
        return self._idmap is not None

    def uid(self, outside: int) -> int:
        return outside if self._idmap is None else _inside(self._idmap.uids, outside)

    def gid(self, outside: int) -> int:
        return outside if self._idmap is None else _inside(self._idmap.gids, outside)

    def capability(self, value: bytes) -> bytes:
        """Take the namespace's root out of a file's capabilities: what was granted in the machine is meant for any.

        Source: linux/capability.h, vfs_ns_cap_data (revision 3) and vfs_cap_data (revision 2).
        """
        if len(value) != 24 or value[3] != 3:
            return value
        return value[:3] + b"\x02" + value[4:20]

    def acl(self, value: bytes) -> bytes:
        """Map the ids in an access control list. Source: linux/posix_acl_xattr.h, version 2."""
        if self._idmap is None or len(value) < 4 or (len(value) - 4) % 8:
            return value
        entries = [struct.unpack_from("<HHI", value, at) for at in range(4, len(value), 8)]
        by_tag = {0x02: self.uid, 0x08: self.gid}
        mapped = [(tag, rights, by_tag[tag](number) if tag in by_tag else number) for tag, rights, number in entries]
        return value[:4] + b"".join(struct.pack("<HHI", *entry) for entry in mapped)


def _inside(extents: tuple[Extent, ...], outside: int) -> int:
    for extent in extents:
        if extent.outside <= outside < extent.outside + extent.size:
            return extent.inside + outside - extent.outside
    return _NOBODY


def _list_xattrs(fd: int) -> list[str]:
    try:
        return sorted(os.listxattr(fd))
    except OSError:
        return []  # a file system without


def _pieces(fd: int, status: os.stat_result) -> list[tuple[int, int]] | None:
    """Return where a file with holes has data, as (offset, length); None when it is to be stored as it is."""
    if status.st_size - status.st_blocks * 512 < _HOLES_MIN:
        return None
    found: list[tuple[int, int]] = []
    for piece in _data_in(fd, status.st_size):
        found.append(piece)
        if len(found) > _PIECES_MAX:
            return None
    # GNU tar's way to say where the file ends, which some readers rely on.
    return found if found and sum(found[-1]) == status.st_size else [*found, (status.st_size, 0)]


def _data_in(fd: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole
                return
            raise
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < at:
            yield start, at - start
        else:
            return


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name
