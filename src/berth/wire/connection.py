"""One end of a connection, sans-I/O: bytes in, events out; requests in, bytes out. Owns streams, credit, the handshake.

Used by the agent's client (`agent`, `session`), and by whoever plays the guest's side: a relay, the tests. No sockets.
Source: docs/protocol.md, "Hello", "Streams".

    connection = Connection("host", version="0.1.0")       # has its hello in `outgoing` already
    stream = connection.open(ExecRequest(argv=(b"true",)))
    … send connection.outgoing, receive into connection.buffer() …
    for event in connection.received(count): …
"""

from __future__ import annotations

from berth.errors import BusyError, InvalidArgumentError, ProtocolError
from berth.wire.frames import (
    CREDIT,
    KIND_NAMES,
    MAX_DATA,
    MAX_STREAMS,
    MESSAGE,
    STDERR,
    STDIN,
    STDOUT,
    WINDOW,
    Decoder,
    decode_credit,
    encode_credit,
    encode_frame,
    encode_header,
    max_message,
)
from berth.wire.jsontext import encode_object
from berth.wire.messages import (
    PROTOCOL,
    REQUESTS,
    Closed,
    Error,
    ExecRequest,
    Exit,
    Fatal,
    Hello,
    Message,
    Open,
    Result,
    Started,
    UnknownMessageError,
    decode_to_guest,
    decode_to_host,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from _typeshed import ReadableBuffer

    from berth.wire.frames import Side
    from berth.wire.messages import ToGuest, ToHost

CREDIT_STEP = WINDOW // 4  # consumed bytes are given back in steps of this


class MessageArrived:
    """A message; `stream` 0 is the connection's own hello."""

    __slots__ = ("message", "stream")

    def __init__(self, stream: int, message: ToGuest | ToHost) -> None:
        self.stream = stream
        self.message = message


class DataArrived:
    """Data; an empty payload is the end of file. The payload lives until the next `buffer` or `feed`.

    What was consumed is to be told to `Connection.consumed`, or the other side runs out of credit.
    """

    __slots__ = ("kind", "payload", "stream")

    def __init__(self, stream: int, kind: int, payload: memoryview) -> None:
        self.stream = stream
        self.kind = kind
        self.payload = payload


class CreditArrived:
    """More of a kind may be sent than before."""

    __slots__ = ("kind", "stream")

    def __init__(self, stream: int, kind: int) -> None:
        self.stream = stream
        self.kind = kind


if TYPE_CHECKING:
    Event: TypeAlias = MessageArrived | DataArrived | CreditArrived


class _Stream:
    """The books of one open stream, by kind of data."""

    __slots__ = ("credit", "detached", "owed", "received_end", "sent_end", "window")

    def __init__(self, *, detached: bool = False) -> None:
        self.credit = [WINDOW] * CREDIT  # what we may still send
        self.window = [WINDOW] * CREDIT  # what we may still receive
        self.owed = [0] * CREDIT  # what was consumed and not yet given back
        self.sent_end = [False] * CREDIT
        self.received_end = [False] * CREDIT
        self.detached = detached

    def is_ended_by(self, message: Message) -> bool:
        return isinstance(message, (Exit, Error, Result, Closed)) or (isinstance(message, Started) and self.detached)


class Connection:
    """One end. `outgoing` holds what is to be sent, in order; whoever sends takes it from there.

    side: which end this is. version: berth's own, for the hello. role: a client's; init: what a guest says of its own.
    What takes bytes raises ProtocolError when the other side breaks the protocol; only `fail` may follow.
    Bounded: streams by MAX_STREAMS, a message by its limit, unread data by one window per kind and stream (the caller
    holds it until it tells `consumed`).
    """

    def __init__(self, side: Side, *, version: str, role: str = "client", init: str = "unknown") -> None:
        self.side: Side = side
        self.outgoing: list[bytes | memoryview] = []
        self.hello: Hello | None = None  # the other side's
        self._decoder = Decoder(side)
        self._streams: dict[int, _Stream] = {}
        self._highest = [0, -1]  # the highest id that was opened, of the even and of the odd ones
        outputs, inputs = (STDOUT, STDERR), (STDIN,)
        self._sends: tuple[int, ...] = inputs if side == "host" else outputs
        self._receives: tuple[int, ...] = outputs if side == "host" else inputs
        self._role = role
        self._own_hello = Hello(version=version, role=role) if side == "host" else Hello(version=version, init=init)
        if side == "host":
            self.send(0, self._own_hello)

    # ---- sending

    def open(self, request: Message) -> int:
        """Send a request on a fresh stream and return its id.

        Raises BusyError when too many streams are open, InvalidArgumentError when the request is too long to be sent.
        """
        if len(self._streams) >= MAX_STREAMS:
            raise BusyError(f"{MAX_STREAMS} requests to the guest agent are under way already")
        parity = 1 if self.side == "host" else 0
        stream = self._highest[parity] + 2
        self.send(stream, request)
        self._highest[parity] = stream
        self._streams[stream] = _Stream(detached=isinstance(request, ExecRequest) and request.detach)
        return stream

    def send(self, stream: int, message: Message) -> None:
        """Send a message; a final one ends the stream. Raises InvalidArgumentError when it is too long."""
        payload = encode_object(message.document())
        limit = max_message("guest" if self.side == "host" else "host")
        if len(payload) > limit:
            raise InvalidArgumentError(f"the request has {len(payload)} bytes, more than {limit}: too many arguments")
        self.outgoing.append(encode_frame(stream, MESSAGE, payload))
        found = self._streams.get(stream)
        if found is not None and found.is_ended_by(message):
            del self._streams[stream]

    def credit(self, stream: int, kind: int) -> int:
        """Return how many bytes of a kind may be sent now; 0 for a stream that has ended."""
        found = self._streams.get(stream)
        return 0 if found is None or found.sent_end[kind] else found.credit[kind]

    def send_data(self, stream: int, kind: int, data: bytes | memoryview) -> None:
        """Send up to MAX_DATA bytes within the credit, without a copy: `data` must stay as it is until it is sent.

        Empty data is the end of file. Data for an ended stream is dropped, as the other side would drop it.
        """
        found = self._streams.get(stream)
        if found is None:
            return
        count = len(data)
        assert kind in self._sends, "that is for the other side to send"
        assert not found.sent_end[kind], "nothing follows the end of file"
        assert count <= min(MAX_DATA, found.credit[kind]), "more than one frame or the credit allows"
        found.credit[kind] -= count
        found.sent_end[kind] = count == 0
        self.outgoing.append(encode_header(stream, kind, count))
        if count:
            self.outgoing.append(data)

    def consumed(self, stream: int, kind: int, count: int) -> None:
        """Say that `count` received bytes are out of our hands, so that the other side may send as many again."""
        found = self._streams.get(stream)
        if found is None or found.received_end[kind]:
            return
        found.owed[kind] += count
        if found.owed[kind] >= CREDIT_STEP:
            found.window[kind] += found.owed[kind]
            self.outgoing.append(encode_credit(stream, kind, found.owed[kind]))
            found.owed[kind] = 0

    def fail(self, error: ProtocolError) -> None:
        """Send a last word to a side that broke the protocol; the caller sends what it can of it and closes."""
        self.outgoing.append(
            encode_frame(0, MESSAGE, encode_object(Fatal(code="protocol", message=error.message[:1000]).document()))
        )

    # ---- receiving

    def buffer(self) -> memoryview:
        """Return where the next bytes go (``recv_into``); ends the life of the payloads given out before."""
        return self._decoder.buffer()

    def received(self, count: int) -> Iterator[Event]:
        """Say that `count` bytes were put into `buffer`; go through the events before the next call."""
        self._decoder.received(count)
        return self._events()

    def feed(self, data: ReadableBuffer) -> Iterator[Event]:
        """Take all of `data`, by a copy; go through the events before the next call."""
        self._decoder.feed(data)
        return self._events()

    def ended(self) -> None:
        """Say that the other side closed the connection. Raises ProtocolError in the midst of a frame."""
        if not self._decoder.is_empty:
            raise ProtocolError("the connection ended in the midst of a frame")

    def is_open(self, stream: int) -> bool:
        """Say whether the stream's final message is still to come."""
        return stream in self._streams

    def _events(self) -> Iterator[Event]:
        while (frame := self._decoder.next_frame()) is not None:
            stream, kind, payload = frame
            event: Event | None
            if kind == MESSAGE:
                event = self._message(stream, payload)
            elif self.hello is None:
                raise ProtocolError(f"a {KIND_NAMES[kind]} frame before the hello")
            elif kind == CREDIT:
                event = self._credit(stream, payload)
            else:
                event = self._data(stream, kind, payload)
            if event is not None:
                yield event

    def _find(self, stream: int, kind: int) -> _Stream | None:
        """Return the books of a stream, None when it has ended."""
        found = self._streams.get(stream)
        if found is None and stream > self._highest[stream % 2]:
            raise ProtocolError(f"a {KIND_NAMES[kind]} frame on stream {stream}, which was never opened")
        return found

    def _data(self, stream: int, kind: int, payload: memoryview) -> DataArrived | None:
        if kind not in self._receives:
            raise ProtocolError(f"a {KIND_NAMES[kind]} frame towards the {self.side}")
        found = self._find(stream, kind)
        if found is None:
            return None
        if found.received_end[kind]:
            raise ProtocolError(f"{KIND_NAMES[kind]} goes on after its end of file")
        if len(payload) > found.window[kind]:
            raise ProtocolError(f"more {KIND_NAMES[kind]} than there was credit for")
        found.window[kind] -= len(payload)
        found.received_end[kind] = not payload
        return DataArrived(stream, kind, payload)

    def _credit(self, stream: int, payload: memoryview) -> CreditArrived | None:
        kind, count = decode_credit(payload)
        if kind not in self._sends:
            raise ProtocolError(f"credit for {KIND_NAMES[kind]}, which the {self.side} does not send")
        found = self._find(stream, CREDIT)
        if found is None:
            return None
        found.credit[kind] += count
        if found.credit[kind] > WINDOW:
            raise ProtocolError(f"more credit for {KIND_NAMES[kind]} than was spent")
        return CreditArrived(stream, kind)

    def _message(self, stream: int, payload: memoryview) -> MessageArrived | None:
        try:
            message = decode_to_host(payload) if self.side == "host" else decode_to_guest(payload)
        except UnknownMessageError as error:
            if not self._may_open(stream):
                raise
            self._accept(stream)
            self.send(stream, Error(code="unsupported", message=error.message))
            return None
        if stream == 0:
            return self._connection_message(message)
        if self.hello is None:
            raise ProtocolError(f"message '{message.type}' before the hello")
        if self._is_opening(message):
            return self._opening(stream, message)
        return self._stream_message(stream, message)

    def _connection_message(self, message: ToGuest | ToHost) -> MessageArrived:
        if isinstance(message, Fatal):
            who = "guest agent" if self.side == "host" else "client"
            raise ProtocolError(f"the {who} ended the connection: {message.message}")
        if not isinstance(message, Hello) or self.hello is not None:
            raise ProtocolError(f"message '{message.type}' on stream 0")
        if message.protocol != PROTOCOL:
            raise ProtocolError(_mismatch(self.side, message.protocol), hint="restart the machine: berth restart")
        self.hello = message
        if self.side == "guest":
            self._role = message.role or "client"
            self.send(0, self._own_hello)
        return MessageArrived(0, message)

    def _is_opening(self, message: ToGuest | ToHost) -> bool:
        return isinstance(message, Open) if self.side == "host" else message.type in REQUESTS

    def _may_open(self, stream: int) -> bool:
        if self.hello is None or (self.side == "host" and self._role != "keeper"):
            return False
        parity = 0 if self.side == "host" else 1
        return stream % 2 == parity and stream > self._highest[parity]

    def _has_ended(self, stream: int) -> bool:
        return stream <= self._highest[stream % 2] and stream not in self._streams

    def _accept(self, stream: int) -> None:
        self._highest[stream % 2] = stream
        self._streams[stream] = _Stream()

    def _opening(self, stream: int, message: ToGuest | ToHost) -> MessageArrived | None:
        if not self._may_open(stream):
            if self._has_ended(stream):
                return None
            raise ProtocolError(f"message '{message.type}' on stream {stream}, which can't be opened")
        full = len(self._streams) >= MAX_STREAMS
        self._accept(stream)
        if full:
            self.send(stream, Error(code="busy", message=f"{MAX_STREAMS} streams are open already"))
            return None
        self._streams[stream].detached = isinstance(message, ExecRequest) and message.detach
        return MessageArrived(stream, message)

    def _stream_message(self, stream: int, message: ToGuest | ToHost) -> MessageArrived | None:
        found = self._find(stream, MESSAGE)
        if found is None:
            return None
        if isinstance(message, (Hello, Fatal)):
            raise ProtocolError(f"message '{message.type}' on stream {stream}")
        if found.is_ended_by(message):
            del self._streams[stream]
        return MessageArrived(stream, message)


def _mismatch(side: Side, theirs: int) -> str:
    if side == "host":
        return f"the machine's agent speaks protocol {theirs}, this berth {PROTOCOL}"
    return f"this agent speaks protocol {PROTOCOL}, the client {theirs}: restart the machine"
