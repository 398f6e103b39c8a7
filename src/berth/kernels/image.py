"""What a kernel image is, by its bytes, and how to unpack it. Nothing in a file is believed before it is checked.

Sources: the kernel's Documentation/arch/x86/boot.rst (the setup header), Documentation/arch/arm64/booting.rst (the
Image header), drivers/firmware/efi/libstub/zboot-header.S; elf(5); xen/include/public/elfnote.h and the PVH boot
protocol (docs/misc/pvh.pandoc) for the note that names the entry point.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import struct
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Literal, cast

from berth.errors import BerthError, InvalidArgumentError, UnsupportedError
from berth.oci import stream
from berth.proc import find_program, install_command, spawn

Kind = Literal["bzimage", "elf", "image"]

_UNPACKED_MAX = 1024**3  # bytes; a kernel with all built in has 100 MiB
_PAYLOAD_MAX = 512 * 1024**2
_SCAN_MAX = 256 * 1024**2  # how far the version is looked for
_NOTE_MAX = 1024 * 1024
_HEADERS_MAX = 128  # program headers of an ELF file; Linux has 5
_PVH_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_ARM64 = b"ARM\x64"
_RELEASE = re.compile(rb"Linux version ([0-9][0-9A-Za-z.+~_-]{0,127}) ")
_HINT = "it has to be a bzImage or vmlinux for amd64, or an Image for arm64"


@dataclasses.dataclass(frozen=True, slots=True)
class KernelImage:
    """What a file turned out to be.

    kind: how it is booted once unpacked. arch: `amd64` or `arm64`. version: uname's release, "" when it does not say.
    packed: the whole file is packed (`gzip`, or `zboot`: an EFI program that unpacks itself): `unpack_image`.
    """

    kind: Kind
    arch: str
    version: str
    packed: Literal["", "gzip", "zboot"] = ""


def examine(path: Path) -> KernelImage:
    """Say what the kernel `path` is. Raises InvalidArgumentError for everything that berth can't boot."""
    try:
        with _opened(path) as file:
            return _examine(file)
    except _NotAKernelError as error:
        raise InvalidArgumentError(f"{path} is no kernel that can be booted: {error}", hint=_HINT) from error


def unpack_image(path: Path, target: Path) -> KernelImage:
    """Write a packed Image to `target`, a new file, as QEMU boots it. Raises InvalidArgumentError, UnsupportedError."""
    try:
        with _opened(path) as file:
            start, size = _zboot_payload(file) if file.head(8)[4:] == b"zimg" else (0, file.size)
            _unpack(file, start, size, target)
        with _opened(target) as unpacked:
            return _examine_image(unpacked)
    except _NotAKernelError as error:
        raise InvalidArgumentError(f"{path} is no kernel that can be booted: {error}", hint=_HINT) from error


def extract_vmlinux(path: Path, target: Path) -> str:
    """Write the vmlinux that the bzImage `path` holds to `target`, a new file, if QEMU can boot it directly.

    Returns "", or why there is none; `target` does not exist then, and the bzImage is what boots.
    """
    try:
        with _opened(path) as file:
            start, size = _bzimage_payload(file)
            expected = file.number("<I", start + size - 4)
            # All but gzip's own format have the size appended (scripts/Makefile.lib, size_append).
            packed = size if file.at(start, 2) == b"\x1f\x8b" else size - 4
            if _unpack(file, start, packed, target) != expected:
                raise _NotAKernelError("another number of bytes came out of it than it says")  # noqa: TRY301
        with _opened(target) as unpacked:
            _check_elf(unpacked)
    except (_NotAKernelError, UnsupportedError) as error:
        target.unlink(missing_ok=True)
        return str(error)
    return ""


class _NotAKernelError(Exception):
    """Why a file is no kernel for us: the end of a sentence."""


class _File:
    """Reads of an untrusted file; whatever lies beyond its end is an error."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size

    def head(self, count: int) -> bytes:
        return os.pread(self.fd, count, 0)

    def at(self, offset: int, count: int) -> bytes:
        # Before the read: what a hostile header says need not even be a number that the kernel takes.
        if offset < 0 or count < 0 or offset + count > self.size:
            raise _NotAKernelError("it is truncated")
        data = os.pread(self.fd, count, offset)
        if len(data) != count:
            raise _NotAKernelError("it is truncated")
        return data

    def number(self, form: str, offset: int) -> int:
        return int(struct.unpack(form, self.at(offset, struct.calcsize(form)))[0])


@contextlib.contextmanager
def _opened(path: Path) -> Generator[_File]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hold us up
    except OSError as error:
        raise _NotAKernelError(str(error.strerror).lower()) from error
    try:
        yield _File(fd)
    except OSError as error:
        raise _NotAKernelError(str(error.strerror).lower()) from error
    finally:
        os.close(fd)


def _examine(file: _File) -> KernelImage:
    head = file.head(1024)
    if head[0x202:0x206] == b"HdrS":
        return _examine_bzimage(file)
    if head.startswith(b"\x7fELF"):
        _check_elf(file)
        return KernelImage("elf", "amd64", _find_release(file))
    if head[0x38:0x3C] == _ARM64:
        return _examine_image(file)
    if head[4:8] == b"zimg":
        _zboot_payload(file)
        return KernelImage("image", "arm64", "", "zboot")
    if head.startswith(b"\x1f\x8b"):
        return KernelImage("image", "arm64", "", "gzip")
    raise _NotAKernelError("it begins like none")


# x86 --------------------------------------------------------------------------------------------------------------


def _examine_bzimage(file: _File) -> KernelImage:
    protocol = file.number("<H", 0x206)
    if protocol < 0x20C or not file.number("<H", 0x236) & 1:  # xloadflags: XLF_KERNEL_64, since protocol 2.12
        raise _NotAKernelError("it is older than Linux 3.8, or for 32 bits")
    if not file.number("<B", 0x211) & 1:  # loadflags: LOADED_HIGH
        raise _NotAKernelError("it is a zImage")
    _bzimage_payload(file)
    return KernelImage("bzimage", "amd64", _setup_release(file))


def _setup_release(file: _File) -> str:
    offset = file.number("<H", 0x20E)
    text = os.pread(file.fd, 128, offset + 0x200) if offset else b""
    match = re.match(rb"[0-9][0-9A-Za-z.+~_-]*(?=[ \0])", text)
    return match[0].decode() if match else ""


def _bzimage_payload(file: _File) -> tuple[int, int]:
    """Return where the compressed kernel is, and its size."""
    sectors = file.number("<B", 0x1F1) or 4
    offset, size = file.number("<I", 0x248), file.number("<I", 0x24C)
    start = (sectors + 1) * 512 + offset
    if not 4 < size <= _PAYLOAD_MAX or start + size > file.size:
        raise _NotAKernelError("it is truncated")
    return start, size


def _check_elf(file: _File) -> None:
    """Check that a vmlinux is one that QEMU can enter. Raises _NotAKernelError."""
    head = file.at(0, 64)
    kind, machine = struct.unpack_from("<HH", head, 16)
    if head[4:6] != b"\x02\x01" or kind not in (
        2,
        3,
    ):  # 64 bits, little-endian; executable (position independent or not)
        raise _NotAKernelError("it is an ELF file, but no 64-bit program")
    if machine == 183:
        raise _NotAKernelError("it is a vmlinux for arm64, which QEMU can't boot; take arch/arm64/boot/Image")
    if machine != 62:
        raise _NotAKernelError("it is an ELF file for another processor")
    table, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
    if size != 56 or count > _HEADERS_MAX:
        raise _NotAKernelError("its program headers are damaged")
    headers = struct.iter_unpack("<IIQQQQQQ", file.at(table, size * count))
    if not any(_has_pvh_note(file, offset, length) for kind, _, offset, _, _, length, _, _ in headers if kind == 4):
        raise _NotAKernelError("it has no PVH entry point (build it with CONFIG_PVH=y, or take the bzImage)")


def _has_pvh_note(file: _File, offset: int, length: int) -> bool:
    data = file.at(offset, min(length, _NOTE_MAX))
    at = 0
    while at + 12 <= len(data):
        name, text, kind = struct.unpack_from("<III", data, at)
        if kind == _PVH_ENTRY and data[at + 12 : at + 12 + name] == b"Xen\0":
            return True
        at += 12 + name + -name % 4 + text + -text % 4
    return False


# arm64 ------------------------------------------------------------------------------------------------------------


def _examine_image(file: _File) -> KernelImage:
    if file.at(0x38, 4) != _ARM64:
        raise _NotAKernelError("what it holds is no Image for arm64")
    if file.number("<Q", 24) & 1:
        raise _NotAKernelError("it is for a big-endian processor")
    return KernelImage("image", "arm64", _find_release(file))


def _zboot_payload(file: _File) -> tuple[int, int]:
    start, size = file.number("<I", 8), file.number("<I", 12)
    codec = file.at(24, 8).partition(b"\0")[0]
    if codec not in (b"gzip", b"lz4", b"zstd", b"xz"):
        raise _NotAKernelError(f"it is compressed by {codec.decode(errors='replace')!r}")
    if not 0 < size <= _PAYLOAD_MAX or start + size > file.size:
        raise _NotAKernelError("it is truncated")
    return start, size


# Both -------------------------------------------------------------------------------------------------------------


def _find_release(file: _File) -> str:
    """Look for the kernel's own banner; "" when it is not there."""
    step, overlap = 4 * 1024 * 1024, 256
    for offset in range(0, min(file.size, _SCAN_MAX), step):
        match = _RELEASE.search(os.pread(file.fd, step + overlap, offset))
        if match:
            return match[1].decode()
    return ""


def _unpack(file: _File, start: int, size: int, target: Path) -> int:
    """Decompress a part of `file` to `target`, a new file 0644; return the bytes written."""
    with _copied(file, start, size) as packed, open(target, "xb") as out:
        os.fchmod(out.fileno(), 0o644)
        try:
            out.writelines(_decompressed(packed))
        except UnsupportedError:
            raise
        except BerthError as error:
            raise _NotAKernelError(error.message) from error
        out.flush()
        return out.tell()


@contextlib.contextmanager
def _copied(file: _File, start: int, size: int) -> Generator[int]:
    """Copy a part of `file` to a file of its own: the decompressing programs read from the beginning to the end."""
    with tempfile.TemporaryFile() as copy:
        for at in range(0, size, stream.CHUNK):
            copy.write(file.at(start + at, min(stream.CHUNK, size - at)))
        copy.flush()
        yield copy.fileno()


def _decompressed(fd: int) -> Iterator[bytes]:
    where = "its payload"
    if os.pread(fd, 4, 0) == _LZ4_LEGACY:
        with contextlib.closing(_unlz4(fd)) as chunks:
            data = stream.ByteStream(chunks, where=where, limit=_UNPACKED_MAX)
            yield from iter(lambda: data.read(stream.CHUNK), b"")
        return
    if not stream.codec_of(fd):
        raise _NotAKernelError("its payload is compressed in a way that is unknown")
    with stream.opened(fd, where=where, limit=_UNPACKED_MAX) as data:
        yield from iter(lambda: data.read(stream.CHUNK), b"")


def _unlz4(fd: int) -> Generator[bytes]:
    """Run lz4: the standard library has none, and in Python it would take minutes."""
    if find_program("lz4") is None:
        raise UnsupportedError("it is compressed with lz4", hint=install_command("lz4"))
    os.lseek(fd, 0, os.SEEK_SET)
    with spawn(["lz4", "-dcq"], stdin=fd, stdout=-1, stderr=-1) as process:  # -1 is PIPE
        stdout, stderr = cast("IO[bytes]", process.stdout), cast("IO[bytes]", process.stderr)
        try:
            yield from stream.pipe_chunks(stdout.fileno())
        except GeneratorExit:
            process.kill()
            raise
        said = stderr.read(4096).decode(errors="replace").strip()
    if process.returncode:
        raise _NotAKernelError(f"its payload is damaged: {said or 'no lz4 stream'}")
