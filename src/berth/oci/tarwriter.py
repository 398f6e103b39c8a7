"""Write the members of a tar archive (PAX). Owns the encoding, as `tar` owns the decoding; `diff` uses it.

The standard library's tarfile decodes names, loses nanoseconds and knows no sparse files. Here names are bytes, times
exact; what the old header has no room for goes into PAX records, so that small members stay small.

Sources: POSIX pax(1), "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Storing Sparse Files", 1.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from berth.oci.tar import BLOCK, DIRECTORY

END = bytes(2 * BLOCK)
_NAME = 100  # bytes of the old header's fields for names
_ID_MAX = 0o7777777
_SIZE_MAX = 0o77777777777
_SECOND = 1_000_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One member, without its data. size: bytes of data in the archive, or of the whole file when `sparse` is given.

    sparse: where the data goes, as (offset, length), when the file has holes.
    """

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[bytes, bytes] = dataclasses.field(default_factory=dict[bytes, bytes])
    sparse: Sequence[tuple[int, int]] | None = None


def encode_member(member: Member) -> bytes:
    """Return all that comes before the data: PAX records where needed, the header, a sparse file's map."""
    name = member.name + b"/" if member.kind == DIRECTORY else member.name
    records: dict[bytes, bytes] = {}
    size, sparse_map = member.size, b""
    if member.sparse is not None:
        sparse_map = _sparse_map(member.sparse)
        records = {
            b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": name,
            b"GNU.sparse.realsize": b"%d" % member.size,
        }  # fmt: skip
        size = len(sparse_map) + sum(length for _, length in member.sparse)
    if len(name) > _NAME or not name.isascii():
        records[b"path"] = name
    if len(member.link) > _NAME or not member.link.isascii():
        records[b"linkpath"] = member.link
    for key, value, most in ((b"uid", member.uid, _ID_MAX), (b"gid", member.gid, _ID_MAX), (b"size", size, _SIZE_MAX)):
        if value > most:
            records[key] = b"%d" % value
    if member.mtime_ns % _SECOND or not 0 <= member.mtime_ns // _SECOND <= _SIZE_MAX:
        records[b"mtime"] = _seconds(member.mtime_ns)
    records.update({b"SCHILY.xattr." + key: value for key, value in sorted(member.xattrs.items())})
    return _pax_header(records) + _header(member, name, size) + sparse_map


def padding(size: int) -> bytes:
    """Return what fills the last block of `size` bytes of data."""
    return bytes(-size % BLOCK)


def _header(member: Member, name: bytes, size: int) -> bytes:
    block = bytearray(BLOCK)
    block[0 : len(name[:_NAME])] = name[:_NAME]
    block[100:124] = _octal(member.mode, 8) + _octal(member.uid, 8) + _octal(member.gid, 8)
    block[124:148] = _octal(size, 12) + _octal(max(0, member.mtime_ns) // _SECOND, 12)
    block[156:157] = member.kind
    block[157 : 157 + len(member.link[:_NAME])] = member.link[:_NAME]
    block[257:265] = b"ustar\x0000"
    block[329:345] = _octal(member.device[0], 8) + _octal(member.device[1], 8)
    return _with_checksum(block)


def _pax_header(records: Mapping[bytes, bytes]) -> bytes:
    if not records:
        return b""
    body = b"".join(_record(key, value) for key, value in records.items())
    block = bytearray(BLOCK)
    block[0:3] = b"pax"
    block[100:124] = _octal(0o644, 8) + _octal(0, 8) * 2
    block[124:148] = _octal(len(body), 12) + _octal(0, 12)
    block[156:157] = b"x"
    block[257:265] = b"ustar\x0000"
    return _with_checksum(block) + body + padding(len(body))


def _record(key: bytes, value: bytes) -> bytes:
    """Encode ``LENGTH key=value``; the length counts its own digits."""
    rest = b" %s=%s\n" % (key, value)
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d%s" % (length, rest)


def _sparse_map(pieces: Sequence[tuple[int, int]]) -> bytes:
    text = b"".join(b"%d\n" % number for number in (len(pieces), *(number for piece in pieces for number in piece)))
    return text + padding(len(text))


def _seconds(time_ns: int) -> bytes:
    sign, value = (b"-", -time_ns) if time_ns < 0 else (b"", time_ns)
    return b"%s%d.%09d" % (sign, value // _SECOND, value % _SECOND)


def _octal(value: int, width: int) -> bytes:
    """Encode a number; one that is too large is all sevens here and whole in a PAX record."""
    return b"%0*o\0" % (width - 1, min(value, 8 ** (width - 1) - 1))


def _with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)
