"""Frames: a 9-byte header and a payload. Owns their encoding, decoding and limits; sans-I/O, no sockets.

Used by `wire.connection`; a relay may use `Decoder` and `encode_header` alone. Source: docs/protocol.md, "Frames".
"""

from __future__ import annotations

from struct import Struct

from berth.errors import ProtocolError

TYPE_CHECKING = False  # what type checkers want, without the 10 ms that `import typing` costs
if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    from _typeshed import ReadableBuffer

    Side: TypeAlias = Literal["host", "guest"]
    # Stream id, kind, payload. A plain tuple: thousands a second are made.
    Frame: TypeAlias = tuple[int, int, memoryview]

MESSAGE, STDIN, STDOUT, STDERR, CREDIT = range(5)
KIND_NAMES = ("message", "stdin", "stdout", "stderr", "credit")

HEADER_SIZE = 9
MAX_DATA = 262144
MAX_MESSAGE_TO_GUEST = 4194304
MAX_MESSAGE_TO_HOST = 65536
WINDOW = 1048576  # bytes of credit that each data kind of a stream starts with
MAX_STREAMS = 1024  # open at a time in one connection

_HEADER = Struct(">IIB")
_CREDIT = Struct(">BI")
_FIRST_CAPACITY = 65536  # what most connections never outgrow
_BULK = 16384  # from so many missing bytes on, a read ends where the frame ends


def max_message(receiver: Side) -> int:
    """Return how many bytes a message towards `receiver` may have."""
    return MAX_MESSAGE_TO_GUEST if receiver == "guest" else MAX_MESSAGE_TO_HOST


def encode_header(stream: int, kind: int, length: int) -> bytes:
    """Make the header of a frame whose payload has `length` bytes."""
    return _HEADER.pack(length, stream, kind)


def encode_frame(stream: int, kind: int, payload: ReadableBuffer) -> bytes:
    """Make a whole frame, by a copy; bulk data is better sent as header and payload."""
    view = memoryview(payload).cast("B")
    return b"".join((_HEADER.pack(len(view), stream, kind), view))


def encode_credit(stream: int, kind: int, count: int) -> bytes:
    """Make the frame that gives `count` bytes of credit back."""
    return _HEADER.pack(_CREDIT.size, stream, CREDIT) + _CREDIT.pack(kind, count)


def decode_credit(payload: memoryview) -> tuple[int, int]:
    """Read the kind and count in a CREDIT frame. Raises ProtocolError."""
    if len(payload) != _CREDIT.size:
        raise ProtocolError(f"a credit frame of {len(payload)} bytes")
    kind: int
    count: int
    kind, count = _CREDIT.unpack(payload)
    if kind not in (STDIN, STDOUT, STDERR):
        raise ProtocolError(f"credit for kind {kind}")
    if count == 0:
        raise ProtocolError("credit of nothing")
    return kind, count


class Decoder:
    """Takes bytes as they come and gives whole frames.

    Either ``recv_into(decoder.buffer())`` then ``decoder.received(count)``, which copies nothing, or ``feed(data)``;
    then `next_frame` until it gives None. A payload is a view into the decoder's buffer and lives until the next call
    of `buffer` or `feed`. Memory: one frame of the longest allowed kind, and one read. Broken once, it stays broken.
    """

    __slots__ = ("_broken", "_buffer", "_end", "_limits", "_start", "_view", "_wanted")

    def __init__(self, receiver: Side) -> None:
        self._limits = (max_message(receiver), MAX_DATA, MAX_DATA, MAX_DATA, _CREDIT.size)
        self._buffer = bytearray(_FIRST_CAPACITY)
        self._view = memoryview(self._buffer)
        self._start: int = 0  # from here to _end is what is not yet decoded
        self._end: int = 0
        self._wanted = HEADER_SIZE  # size of the frame that begins at _start, as far as it is known
        self._broken: str | None = None

    @property
    def is_empty(self) -> bool:
        """Say whether the bytes so far end with a whole frame: the one place where a connection may end."""
        return self._start == self._end

    def buffer(self) -> memoryview:
        """Return where the next bytes go: at least one byte of room, more for more of a reader's luck."""
        self._make_room()
        missing = self._wanted - (self._end - self._start)
        if missing >= _BULK:
            # End this read where the frame ends, but for the next header: then nothing needs to be moved.
            return self._view[self._end : self._end + missing + HEADER_SIZE]
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """Say how many bytes were put into `buffer`."""
        self._end += count

    def feed(self, data: ReadableBuffer) -> None:
        """Take all of `data`, by a copy, whatever its length."""
        view = memoryview(data).cast("B")
        self._make_room(len(view))
        self._view[self._end : self._end + len(view)] = view
        self._end += len(view)

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, None when more bytes are needed. Raises ProtocolError."""
        if self._broken is not None:
            raise ProtocolError(self._broken)
        start = self._start
        available = self._end - start
        if available < HEADER_SIZE:
            self._wanted = HEADER_SIZE
            return None
        length: int
        stream: int
        kind: int
        length, stream, kind = _HEADER.unpack_from(self._buffer, start)
        if kind > CREDIT or length > self._limits[kind] or (stream == 0 and kind != MESSAGE):
            self._refuse(length, kind)
        self._wanted = HEADER_SIZE + length
        if available < self._wanted:
            return None
        self._start = start + self._wanted
        payload = self._view[start + HEADER_SIZE : self._start]
        self._wanted = HEADER_SIZE
        return stream, kind, payload

    def _refuse(self, length: int, kind: int) -> None:
        if kind > CREDIT:
            self._broken = f"a frame of unknown kind {kind}"
        elif length > self._limits[kind]:
            self._broken = f"a {KIND_NAMES[kind]} frame of {length} bytes, more than {self._limits[kind]}"
        else:
            self._broken = f"a {KIND_NAMES[kind]} frame on stream 0"
        raise ProtocolError(self._broken)

    def _make_room(self, count: int = 1) -> None:
        """Have room for `count` bytes more and for the rest of the frame that has begun."""
        pending = self._end - self._start
        if pending == 0:
            self._start = self._end = 0
        needed = max(pending + count, self._wanted + HEADER_SIZE)
        if needed > len(self._buffer) or (pending == 0 and len(self._buffer) > MAX_DATA + _FIRST_CAPACITY):
            # Payloads given out keep the old buffer alive, unharmed. A long message's room is given back.
            old = self._view[self._start : self._end]
            self._buffer = bytearray(max(needed, _FIRST_CAPACITY))
            self._view = memoryview(self._buffer)
            self._view[:pending] = old
            self._start, self._end = 0, pending
        elif self._start + needed > len(self._buffer):
            self._view[:pending] = self._view[self._start : self._end]
            self._start, self._end = 0, pending
