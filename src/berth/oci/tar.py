"""Read a tar archive. Owns the format (ustar, PAX, GNU, V7; sparse files in all four forms); the `oci` package uses it.

The standard library's tarfile takes a damaged header in the middle for the archive's end, reads PAX headers of any
size into memory and decodes names; a layer is hostile until proven, names are bytes, and we want it four times as fast.

Sources: POSIX pax(1), "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format",
"Storing Sparse Files", "Extensions"; libarchive tar(5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from berth.errors import ImageFormatError
from berth.oci.stream import ByteStream

BLOCK = 512
_META_MAX = 16 * 1024 * 1024  # bytes of one PAX header or long name; the largest legal xattr is 64 KiB
_SPARSE_MAX = 1_000_000  # pieces of one file
_INT64 = 2**63
_ID_MAX = 2**32 - 2  # the id after it is -1, which tells chown(2) to change nothing
_ZERO_BLOCK = bytes(BLOCK)

FILE, HARDLINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_HEADER_ONLY = frozenset({HARDLINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO})
_KINDS = _HEADER_ONLY | {FILE}

_Pax = list[tuple[bytes, bytes]]  # in order and with repetitions: sparse format 0.0 needs both


@dataclasses.dataclass(slots=True)
class Entry:
    """One member of an archive. Names are as written; sizes in bytes; `kind` is one of the constants above.

    data_size: the bytes in the archive that `TarReader.pieces` yields. sparse: where they go, as (offset, length), when
    the file has holes; `size` is then the file's full size.
    """

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: bytes
    major: int
    minor: int
    data_size: int
    xattrs: dict[bytes, bytes]
    sparse: list[tuple[int, int]] | None = None


class TarReader:
    """Iterates over the entries of a stream; `pieces` gives the data of the entry that came last.

    Raises ImageFormatError for everything that is not a whole, well-formed archive. An archive without the two zero
    blocks at its end is accepted when it ends between two entries, or in the padding of the last, as docker does.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._left = 0  # bytes of data not yet read
        self._padding = 0
        self._global: dict[bytes, bytes] = {}
        self._meta = 0  # bytes of extended headers of the entry that is being read
        self._count = 0

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self._next()) is not None:
            self._count += 1
            yield entry

    def pieces(self) -> Iterator[bytes]:
        """Yield the current entry's data, in pieces of at most 1 MiB."""
        left, self._left = self._left, 0
        yield from self._stream.pieces(left)

    def peek(self, count: int) -> bytes:
        """Return the first bytes of the current entry's data, which `pieces` then does not yield any more."""
        count = min(count, self._left)
        self._left -= count
        return self._stream.read_exact(count)

    @property
    def data_offset(self) -> int:
        """Where in the archive the rest of the current entry's data lies."""
        return self._stream.offset

    def _wrong(self, what: str) -> ImageFormatError:
        return ImageFormatError(f"{self._stream.where} is damaged: entry {self._count + 1}: {what}")

    def _next(self) -> Entry | None:
        pax: _Pax = []
        name = link = b""
        self._meta = 0
        while True:
            self._stream.skip(self._left)
            # Padding that is cut short is no loss: umoci's last entry has none, and Go's reader minds as little.
            self._stream.read(self._padding)
            self._left = self._padding = 0
            block = self._stream.read(BLOCK)
            if not block or block == _ZERO_BLOCK:
                if pax or name or link:
                    raise self._wrong("an extended header with nothing after it")
                return None
            if len(block) < BLOCK:
                raise ImageFormatError(f"{self._stream.where} is truncated: it ends within a header")
            entry = self._parse(block)
            match entry.kind:
                case b"x" | b"X":
                    pax += self._parse_pax(self._read_meta(entry.size))
                case b"g":
                    self._read_global(entry.size)
                case b"L":
                    name = self._read_meta(entry.size).rstrip(b"\0")
                case b"K":
                    link = self._read_meta(entry.size).rstrip(b"\0")
                case b"V":  # a volume's label
                    self._begin(entry.size)
                case _:
                    entry.name, entry.link = name or entry.name, link or entry.link
                    return self._complete(entry, block, pax)

    def _read_global(self, size: int) -> None:
        """Take records that hold for all entries to come; a later value replaces an earlier one."""
        self._global |= dict(self._parse_pax(self._read_meta(size)))
        if sum(len(key) + len(value) for key, value in self._global.items()) > _META_MAX:
            raise self._wrong("its global headers are too long")

    def _read_meta(self, size: int) -> bytes:
        self._meta += size  # of all headers of one entry, or a chain of them would fill the memory
        if self._meta > _META_MAX:
            raise self._wrong(f"extended headers of {self._meta} bytes are longer than {_META_MAX}")
        self._begin(size)
        self._left = 0
        return self._stream.read_exact(size)

    def _begin(self, size: int) -> None:
        self._left = size
        self._padding = -size % BLOCK

    def _parse(self, block: bytes) -> Entry:
        """Read one header block. Source: POSIX ustar: name 100, mode 8, uid 8, gid 8, size 12, mtime 12, chksum 8 …"""
        said = self._number(block[148:156])
        if said != sum(block) - sum(block[148:156]) + 256 and said != _signed_sum(block):
            raise self._wrong("its checksum is wrong")
        name = _text(block[0:100])
        kind = block[156:157]
        posix = block[257:263] == b"ustar\0"
        if posix and block[345]:
            name = _text(block[345:500]) + b"/" + name
        if kind in (b"\0", b"7"):
            kind = FILE
        device = kind in (CHAR, BLOCK_DEVICE)
        size = self._number(block[124:136])
        if not 0 <= size < _INT64:
            raise self._wrong(f"its size is {size}")
        return Entry(
            name, kind, self._number(block[100:108]) & 0o7777, self._number(block[108:116]),
            self._number(block[116:124]), size, self._number(block[136:148]) * 1_000_000_000, _text(block[157:257]),
            self._number(block[329:337]) if device else 0, self._number(block[337:345]) if device else 0, size, {},
        )  # fmt: skip

    def _number(self, field: bytes) -> int:
        """Read octal digits, or GNU's base 256 when the first bit is set."""
        if field[0] & 0x80:
            negative = field[0] == 0xFF
            value = int.from_bytes(field if negative else bytes([field[0] & 0x7F]) + field[1:], "big", signed=negative)
            if not -_INT64 <= value < _INT64:
                raise self._wrong("a number is too large")
            return value
        digits = _text(field).strip(b" ")
        if not digits:
            return 0
        if not digits.isdigit() or b"8" in digits or b"9" in digits:
            raise self._wrong(f"{field!r} is no octal number")
        return int(digits, 8)

    def _parse_pax(self, data: bytes) -> _Pax:
        records: _Pax = []
        at = 0
        while at < len(data):
            space = data.find(b" ", at, at + 12)
            digits = data[at:space]
            length = int(digits) if space > 0 and digits.isdigit() else 0
            record = data[space + 1 : at + length]
            key, equals, value = record[:-1].partition(b"=")
            if length < 5 or at + length > len(data) or not record.endswith(b"\n") or not equals or not key:
                if not data[at:].strip(b"\0"):
                    break  # some writers pad with zeros within the header's size
                raise self._wrong("a PAX record is malformed")
            records.append((key, value))
            at += length
        return records

    def _complete(self, entry: Entry, block: bytes, pax: _Pax) -> Entry:
        if entry.kind == b"S":
            entry.kind = FILE
            entry.sparse = self._gnu_sparse(block)
            entry.size = self._number(block[483:495])
        elif entry.kind == b"D":  # GNU's incremental dump: a directory whose data lists its names
            entry.kind = DIRECTORY
            self._begin(entry.size)
            entry.size = entry.data_size = 0
        if entry.kind not in _KINDS:
            raise self._wrong(f"unknown type {entry.kind!r}")
        records = [*self._global.items(), *pax]
        if records:
            self._apply_pax(entry, records)
        if entry.kind == FILE and not entry.data_size and entry.name.endswith(b"/"):
            entry.kind = DIRECTORY  # V7 had no type for directories
        if entry.kind in _HEADER_ONLY:
            # As Go and docker: the size of a link or a directory means nothing, no data follows.
            entry.size = entry.data_size = 0
        elif entry.sparse is None:
            entry.size = entry.data_size
        if not self._left:
            self._begin(entry.data_size)
        if records and entry.kind == FILE:
            self._pax_sparse(entry, records)
        if entry.sparse is not None:
            self._check_sparse(entry, entry.sparse)
        self._check(entry)
        return entry

    def _check(self, entry: Entry) -> None:
        if b"\0" in entry.name or b"\0" in entry.link:
            raise self._wrong("a name holds a NUL byte")
        if not entry.name:
            raise self._wrong("it has no name")
        if not (0 <= entry.uid <= _ID_MAX and 0 <= entry.gid <= _ID_MAX):
            raise self._wrong(f"its owner {entry.uid}:{entry.gid} is no valid id")

    def _apply_pax(self, entry: Entry, records: _Pax) -> None:
        for key, value in records:
            match key:
                case b"path" | b"GNU.sparse.name":
                    entry.name = value
                case b"linkpath":
                    entry.link = value
                case b"size":
                    entry.data_size = self._decimal(value)
                case b"uid":
                    entry.uid = self._decimal(value)
                case b"gid":
                    entry.gid = self._decimal(value)
                case b"mtime":
                    entry.mtime_ns = self._nanoseconds(value)
                case _ if key.startswith(b"SCHILY.xattr."):
                    entry.xattrs[key.removeprefix(b"SCHILY.xattr.")] = value
                case _:
                    pass  # names of users, access times, comments: not ours to keep

    def _decimal(self, value: bytes) -> int:
        number = int(value) if value.isdigit() and len(value) < 20 else _INT64
        if number >= _INT64:
            raise self._wrong(f"{value!r:.40} is no valid number")
        return number

    def _nanoseconds(self, value: bytes) -> int:
        sign = -1 if value.startswith(b"-") else 1
        whole, _, fraction = value.lstrip(b"-").partition(b".")
        if not (whole or b"0").isdigit() or not (fraction or b"0").isdigit() or len(whole) > 12:
            raise self._wrong(f"{value!r:.40} is no valid time")
        return sign * (int(whole or b"0") * 1_000_000_000 + int((fraction + b"000000000")[:9]))

    def _gnu_sparse(self, block: bytes) -> list[tuple[int, int]]:
        """Read the map of GNU's old format: 4 pieces in the header, then blocks of 21 while a flag says so."""
        pieces: list[tuple[int, int]] = []
        fields, count, more = block[386:482], 4, block[482]
        while True:
            for at in range(0, count * 24, 24):
                if fields[at] in (0, 0x20):
                    continue
                pieces.append((self._number(fields[at : at + 12]), self._number(fields[at + 12 : at + 24])))
            if not more:
                return pieces
            if len(pieces) > _SPARSE_MAX:
                raise self._wrong("too many pieces in a sparse file")
            fields = self._stream.read_exact(BLOCK)
            count, more = 21, fields[504]

    def _pax_sparse(self, entry: Entry, records: _Pax) -> None:
        """Find the map of a sparse file in its PAX records (formats 0.0, 0.1) or before its data (1.0)."""
        pax = dict(records)
        if b"GNU.sparse.major" in pax:
            entry.sparse = self._sparse_map_in_data(entry)
        elif b"GNU.sparse.map" in pax:
            entry.sparse = self._pairs(pax[b"GNU.sparse.map"].split(b","))
        elif b"GNU.sparse.numblocks" in pax:
            wanted = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
            entry.sparse = self._pairs([value for key, value in records if key in wanted])
        size = pax.get(b"GNU.sparse.realsize", pax.get(b"GNU.sparse.size"))
        if size is not None and entry.sparse is not None:
            entry.size = self._decimal(size)

    def _pairs(self, values: list[bytes]) -> list[tuple[int, int]]:
        numbers = [self._decimal(value) for value in values if value]
        if len(numbers) % 2 or len(numbers) > 2 * _SPARSE_MAX:
            raise self._wrong("the map of a sparse file is malformed")
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def _sparse_map_in_data(self, entry: Entry) -> list[tuple[int, int]]:
        """Read the map of PAX format 1.0: decimal numbers, a line each, before the data, padded to a block."""
        lines: list[bytes] = []
        rest = b""
        wanted = 1
        while len(lines) < wanted:
            if self._left < BLOCK:
                raise self._wrong("the map of a sparse file is cut short")
            *complete, rest = (rest + self._stream.read_exact(BLOCK)).split(b"\n")
            self._left -= BLOCK
            lines += complete
            if lines:
                wanted = 1 + 2 * self._decimal(lines[0])
            if wanted > 2 * _SPARSE_MAX or len(rest) > BLOCK:
                raise self._wrong("too many pieces in a sparse file")
        entry.data_size = self._left
        return self._pairs(lines[1:wanted])

    def _check_sparse(self, entry: Entry, pieces: list[tuple[int, int]]) -> None:
        end = total = 0
        for offset, length in pieces:
            if offset < end or length < 0:
                raise self._wrong("the pieces of a sparse file overlap")
            end = offset + length
            total += length
        if not end <= entry.size < _INT64 or total != entry.data_size:
            raise self._wrong("the map of a sparse file does not fit its size")


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _signed_sum(block: bytes) -> int:
    """The checksum as some old writers computed it, with signed bytes."""
    rest = block[:148] + block[156:]
    return 256 + sum(rest) - 256 * sum(byte > 127 for byte in rest)
