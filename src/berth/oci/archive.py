"""Where the blobs of a foreign image lie: a directory or a tar archive. Owns the look-up in both; `sources` uses it.

Nothing is extracted: an archive is indexed once (headers only), then its members are read where they are.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

from berth.errors import ImageFormatError, NotFoundError
from berth.oci import spec, stream, tar
from berth.oci.digest import hex_of
from berth.oci.spec import Descriptor
from berth.oci.store import Ingest, writing

_LINKS_MAX = 8
_MEMBERS_MAX = 1_000_000
_UNPACKED_MAX = 256 * 1024**3  # bytes of a compressed archive; see layer.Limits


class Files(Protocol):
    """Read access to named files. where: what it is, for messages."""

    @property
    def where(self) -> str: ...

    def has(self, name: str) -> bool: ...

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes. Raises ImageFormatError when it is missing."""
        ...


class DirectoryFiles:
    """Files of a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.where = str(path)

    def has(self, name: str) -> bool:
        return (self._path / name).is_file()

    def chunks(self, name: str) -> Iterator[bytes]:
        try:
            fd = os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageFormatError(f"{self.where}: can't read {name}: {error.strerror}") from error
        try:
            yield from stream.FileChunks(fd)
        finally:
            os.close(fd)


class ArchiveFiles:
    """Members of an uncompressed tar archive in a seekable file."""

    def __init__(self, fd: int, *, where: str) -> None:
        self._fd = fd
        self.where = where
        self._places: dict[str, tuple[int, int]] = {}  # offset, size
        self._links: dict[str, str] = {}
        data = stream.ByteStream(stream.FileChunks(fd), where=where)
        reader = tar.TarReader(data)
        for number, entry in enumerate(reader):
            if number > _MEMBERS_MAX:
                raise ImageFormatError(f"{where} has more than {_MEMBERS_MAX} members")
            self._add(entry, reader.data_offset)

    def _add(self, entry: tar.Entry, offset: int) -> None:
        name = posixpath.normpath(os.fsdecode(entry.name)).lstrip("/")
        match entry.kind:
            case tar.FILE if entry.sparse is None:
                self._places[name] = (offset, entry.size)
            case tar.SYMLINK:
                # docker save links layers that it has written before: ../ID/layer.tar
                self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), os.fsdecode(entry.link)))
            case tar.HARDLINK:
                self._links[name] = posixpath.normpath(os.fsdecode(entry.link))
            case _:
                pass

    def names(self) -> list[str]:
        return [*self._places, *self._links]

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def chunks(self, name: str) -> Iterator[bytes]:
        place = self._find(name)
        if place is None:
            raise ImageFormatError(f"{self.where}: {name} is missing")
        return iter(stream.FileChunks(self._fd, start=place[0], count=place[1]))

    def _find(self, name: str) -> tuple[int, int] | None:
        name = posixpath.normpath(name)
        for _ in range(_LINKS_MAX):
            if name in self._places:
                return self._places[name]
            if name not in self._links:
                return None
            name = self._links[name]
        return None


def read_json(files: Files, name: str) -> object:
    """Read a JSON document of bounded size. Raises ImageFormatError."""
    data = b""
    for chunk in files.chunks(name):
        data += chunk
        if len(data) > spec.DOCUMENT_MAX:
            break  # parse_json refuses it
    return spec.parse_json(data, where=f"{files.where}: {name}")


def blob_name(descriptor: Descriptor) -> str:
    return f"blobs/sha256/{hex_of(descriptor.digest)}"


@contextlib.contextmanager
def opened_archive(path: Path, ingest: Ingest) -> Generator[ArchiveFiles]:
    """Index an archive, which may be compressed or a pipe: then it is copied to a nameless file of the import first."""
    with opened_file(path) as fd, contextlib.ExitStack() as stack:
        fd = seekable(fd, ingest, stack, where=str(path))
        if stream.codec_of(fd):
            plain = stack.enter_context(ingest.scratch())
            with stream.opened(fd, where=str(path), limit=_UNPACKED_MAX) as data, writing(ingest.path):
                while piece := data.read(stream.CHUNK):
                    stream.write_all(plain.fileno(), piece)
            fd = plain.fileno()
        yield ArchiveFiles(fd, where=str(path))


@contextlib.contextmanager
def opened_file(path: Path) -> Generator[int]:
    """Open what the user named. Raises NotFoundError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFoundError(
            f"can't read {path}: {error.strerror}", hint="give the path of a file that you may read"
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


def seekable(fd: int, ingest: Ingest, stack: contextlib.ExitStack, *, where: str) -> int:
    """Return `fd`, or for a pipe a copy of all that comes out of it."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    if stat.S_ISDIR(mode):
        raise ImageFormatError(f"{where} is a directory, not an archive")
    copy = stack.enter_context(ingest.scratch())
    with writing(ingest.path):
        for chunk in stream.pipe_chunks(fd):
            stream.write_all(copy.fileno(), chunk)
    return copy.fileno()
