"""Bytes out of a descriptor, decompressed and bounded. Owns the codecs; the `oci` package uses it.

Everything works on open descriptors, because an image is unpacked inside a namespace that can't reach the store. The
codecs of the standard library are imported here at the top for the same reason. zstd is in it only from Python 3.14
on; before that the `zstd` program decompresses (a package from PyPI would have to be compiled or trusted for what
one small program that every distribution has does in parallel with us).
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import hashlib
import importlib
import lzma
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import IO, Protocol, cast

from berth.errors import ImageFormatError, UnsupportedError
from berth.oci.digest import Digest
from berth.proc import find_program, install_command, spawn

CHUNK = 1024 * 1024
_XZ_MEMORY = 1024**3  # bytes; xz -9 needs 65 MiB, a hostile header may ask for 4 GiB

_GZIP = b"\x1f\x8b"
_MAGICS = {_GZIP: "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2"}


def _nothing(_count: int) -> None: ...


class _Decompressor(Protocol):
    """What lzma, bz2 and compression.zstd have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def _find_zstd() -> ModuleType | None:
    try:
        return importlib.import_module("compression.zstd")  # Python >= 3.14
    except ImportError:
        return None


_ZSTD = _find_zstd()


class ByteStream:
    """A forward-only stream that knows its place and its end.

    chunks: the bytes, in pieces of any size. limit: bytes after which it is called a bomb; None for no limit.
    where: what the stream is, for messages. Raises ImageFormatError for a short read or beyond the limit.
    """

    __slots__ = ("_at", "_buffer", "_chunks", "_limit", "_seen", "where")

    def __init__(self, chunks: Iterator[bytes], *, where: str, limit: int | None = None) -> None:
        self._chunks = chunks
        self._buffer = b""
        self._at = 0
        self._seen = 0  # bytes that came out of `chunks`
        self._limit = limit
        self.where = where

    def read(self, count: int) -> bytes:
        """Read `count` bytes, fewer only at the end."""
        end = self._at + count
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            return data
        return b"".join(self._pieces(count))

    def read_exact(self, count: int) -> bytes:
        data = self.read(count)
        if len(data) != count:
            raise ImageFormatError(f"{self.where} is truncated: {count - len(data)} bytes are missing at its end")
        return data

    def pieces(self, count: int) -> Iterator[bytes]:
        """Read exactly `count` bytes in pieces of at most about 1 MiB, as they come."""
        left = count
        for piece in self._pieces(count):
            left -= len(piece)
            yield piece
        if left:
            raise ImageFormatError(f"{self.where} is truncated: {left} bytes are missing at its end")

    @property
    def offset(self) -> int:
        """Bytes read so far."""
        return self._seen - len(self._buffer) + self._at

    def skip(self, count: int) -> None:
        here = len(self._buffer) - self._at
        if isinstance(self._chunks, FileChunks) and count > here + CHUNK:
            self._at = len(self._buffer)
            if not self._chunks.jump(count - here):
                raise ImageFormatError(f"{self.where} is truncated: {count} bytes are missing at its end")
            self._seen += count - here
            return
        for _ in self.pieces(count):
            pass

    def drain(self) -> int:
        """Read to the end, so that the codec checks its trailer; return the number of bytes."""
        left = len(self._buffer) - self._at
        self._buffer, self._at = b"", 0
        while self._fill():
            left += len(self._buffer)
        return left

    def digest(self) -> Digest:
        """Read to the end and return the digest of what came."""
        hashed = hashlib.sha256()
        while piece := self.read(CHUNK):
            hashed.update(piece)
        return Digest(f"sha256:{hashed.hexdigest()}")

    def _pieces(self, count: int) -> Iterator[bytes]:
        while count > 0:
            if self._at == len(self._buffer) and not self._fill():
                return
            piece = self._buffer[self._at : self._at + count]
            self._at += len(piece)
            count -= len(piece)
            yield piece

    def _fill(self) -> bool:
        try:
            self._buffer = next(self._chunks, b"")
        except OSError as error:
            # What can't be read is not a bad image: a disk error must look like one.
            raise type(error)(error.errno, f"can't read {self.where}: {error.strerror}") from error
        self._at = 0
        self._seen += len(self._buffer)
        if self._limit is not None and self._seen > self._limit:
            raise ImageFormatError(f"{self.where} holds more than {self._limit} bytes when decompressed")
        return bool(self._buffer)


def codec_of(fd: int) -> str:
    """Name the compression of a seekable file by its first bytes: gzip, zstd, xz, bzip2 or "" for none.

    Its content decides, not the media type or the name: tools that mislabel layers exist, and mislabelling is harmless.
    """
    head = os.pread(fd, 8, 0)
    return next((name for magic, name in _MAGICS.items() if head.startswith(magic)), "")


@contextlib.contextmanager
def opened(
    fd: int, *, where: str, limit: int | None = None, consumed: Callable[[int], None] = _nothing
) -> Generator[ByteStream]:
    """Read a seekable file from its beginning, decompressed by what it is.

    consumed: told the number of (compressed) bytes of every piece read. zstd's program moves the file's offset.
    """
    chunks: Iterator[bytes]
    codec = codec_of(fd)
    match codec:
        case "":
            chunks = FileChunks(fd, consumed=consumed)
        case "gzip":
            chunks = _gunzip(FileChunks(fd, consumed=consumed), where)
        case "zstd" if _ZSTD is None:
            chunks = _zstd_program(fd, where, consumed)
        case _:
            chunks = _decompress(_maker(codec), FileChunks(fd, consumed=consumed), where)
    try:
        yield ByteStream(chunks, where=where, limit=limit)
    finally:
        if isinstance(chunks, Generator):
            chunks.close()


class FileChunks(Iterator[bytes]):
    """Reads a seekable file by pread, from `start` on, `count` bytes or to its end; its offset is left alone."""

    def __init__(
        self, fd: int, *, start: int = 0, count: int | None = None, consumed: Callable[[int], None] = _nothing
    ) -> None:
        self._fd = fd
        self._at = start
        self._end = os.fstat(fd).st_size if count is None else start + count
        self._consumed = consumed

    def __next__(self) -> bytes:
        data = os.pread(self._fd, max(0, min(CHUNK, self._end - self._at)), self._at)
        if not data:
            raise StopIteration
        self._at += len(data)
        self._consumed(len(data))
        return data

    def jump(self, count: int) -> bool:
        """Go on `count` bytes further; False when that is beyond the end."""
        self._at += count
        self._consumed(count)
        return self._at <= self._end


def pipe_chunks(fd: int) -> Generator[bytes]:
    """Read a pipe to its end."""
    while data := os.read(fd, CHUNK):
        yield data


def _gunzip(chunks: Iterator[bytes], where: str) -> Generator[bytes]:
    """zlib by hand: half again as fast as gzip.GzipFile, and it says what is wrong."""
    data = next(chunks, b"")
    while data.startswith(_GZIP):
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            try:
                out = member.decompress(data, CHUNK)
            except zlib.error as error:
                raise ImageFormatError(f"{where} is damaged: {error}") from error
            if out:
                yield out
            data = member.unconsumed_tail
            # Output may wait inside though the input is used up: only then is more input the way on.
            if not data and not member.eof and len(out) < CHUNK:
                data = next(chunks, b"")
                if not data:
                    raise ImageFormatError(f"{where} is truncated: its gzip stream has no end")
        data = member.unused_data
        if len(data) < len(_GZIP):  # the next member's magic may straddle two chunks
            data += next(chunks, b"")
    # What follows the last member is padding or garbage; gzip(1) ignores it as well.
    for _ in chunks:
        pass


def _maker(codec: str) -> Callable[[], _Decompressor]:
    if codec == "xz":
        return lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    if codec == "bzip2":
        return bz2.BZ2Decompressor
    return cast("Callable[[], _Decompressor]", cast("ModuleType", _ZSTD).ZstdDecompressor)


def _decompress(make: Callable[[], _Decompressor], chunks: Iterator[bytes], where: str) -> Generator[bytes]:
    data = next(chunks, b"")
    while data:
        stream = make()
        while not stream.eof:
            try:
                out = stream.decompress(data, CHUNK)
            except Exception as error:  # lzma.LZMAError, OSError of bz2, zstd.ZstdError: each has its own
                raise ImageFormatError(f"{where} is damaged: {error}") from error
            if out:
                yield out
            data = b""
            if stream.needs_input and not stream.eof:
                data = next(chunks, b"")
                if not data:
                    raise ImageFormatError(f"{where} is truncated: its compressed stream has no end")
        data = (stream.unused_data or next(chunks, b"")).lstrip(b"\0")  # xz pads with zeros


def _zstd_program(fd: int, where: str, consumed: Callable[[int], None]) -> Generator[bytes]:
    if find_program("zstd") is None:
        raise UnsupportedError(f"{where} is compressed with zstd", hint=install_command("zstd"))
    size = os.fstat(fd).st_size
    os.lseek(fd, 0, os.SEEK_SET)
    with spawn(["zstd", "-dcq"], stdin=fd, stdout=-1, stderr=-1) as process:  # -1 is PIPE
        stdout, stderr = cast("IO[bytes]", process.stdout), cast("IO[bytes]", process.stderr)
        try:
            yield from pipe_chunks(stdout.fileno())
        except GeneratorExit:
            process.kill()
            raise
        said = stderr.read().decode(errors="replace").strip()  # a line: it fits into the pipe
    if process.returncode:
        raise ImageFormatError(f"{where} is damaged: {said.removeprefix('zstd: ') or 'not a zstd stream'}")
    consumed(size)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`. Raises OSError, ENOSPC also for a write that the kernel cut short."""
    view = memoryview(data)
    while view:
        written = os.write(fd, view)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[written:]
