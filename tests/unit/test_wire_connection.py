"""Connections: two ends joined in memory, credit, streams, and a guest that sends anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import BusyError, InvalidArgumentError, ProtocolError
from berth.wire.connection import CREDIT_STEP, Connection, CreditArrived, DataArrived, MessageArrived
from berth.wire.frames import (
    MAX_DATA,
    MAX_STREAMS,
    MESSAGE,
    STDERR,
    STDIN,
    STDOUT,
    WINDOW,
    encode_credit,
    encode_frame,
    encode_header,
)
from berth.wire.jsontext import encode_object
from berth.wire.messages import (
    Closed,
    Error,
    ExecRequest,
    Exit,
    Fatal,
    Hello,
    Open,
    Result,
    Started,
    StatusRequest,
    TerminalSize,
)

TRUE = ExecRequest(argv=(b"true",))


def flush(source: Connection, target: Connection) -> list[MessageArrived | DataArrived | CreditArrived]:
    """Carry what `source` has to say over to `target`; payloads are copied."""
    data = b"".join(source.outgoing)
    source.outgoing.clear()
    return [
        DataArrived(event.stream, event.kind, memoryview(bytes(event.payload)))
        if isinstance(event, DataArrived)
        else event
        for event in target.feed(data)
    ]


def pair(role: str = "client") -> tuple[Connection, Connection]:
    """Return a host's and a guest's end that know each other."""
    host = Connection("host", version="1", role=role)
    guest = Connection("guest", version="2", init="running")
    flush(host, guest)
    flush(guest, host)
    return host, guest


def send_raw(stream: int, message: dict[str, object]) -> bytes:
    return encode_frame(stream, MESSAGE, encode_object(message))


def test_the_handshake_tells_both_who_the_other_is() -> None:
    host, guest = pair("keeper")
    assert host.hello == Hello(protocol=1, version="2", init="running")
    assert guest.hello == Hello(protocol=1, version="1", role="keeper")


def test_requests_may_be_pipelined_with_the_hello() -> None:
    host, guest = Connection("host", version="1"), Connection("guest", version="1")
    assert host.open(TRUE) == 1
    assert host.open(StatusRequest()) == 3
    events = flush(host, guest)
    assert [(e.stream, e.message.type) for e in events if isinstance(e, MessageArrived)] == [
        (0, "hello"),
        (1, "exec"),
        (3, "status"),
    ]


@pytest.mark.parametrize("side", ["host", "guest"])
def test_another_protocol_is_said_clearly(side: str) -> None:
    connection = Connection("host" if side == "host" else "guest", version="1")
    hello = send_raw(0, {"type": "hello", "protocol": 7, "version": "9", "role": "client", "init": "running"})
    with pytest.raises(ProtocolError, match="protocol") as caught:
        list(connection.feed(hello))
    assert "7" in caught.value.message
    assert "1" in caught.value.message
    assert caught.value.hint == "restart the machine: berth restart"
    connection.outgoing.clear()
    connection.fail(caught.value)
    assert b'"fatal"' in b"".join(connection.outgoing)


def test_a_fatal_message_is_repeated_to_the_person() -> None:
    host, _ = pair()
    with pytest.raises(ProtocolError, match="this agent speaks protocol 2"):
        list(host.feed(send_raw(0, Fatal(code="protocol", message="this agent speaks protocol 2").document())))


def test_a_command_from_start_to_exit() -> None:
    host, guest = pair()
    stream = host.open(TRUE)
    host.send_data(stream, STDIN, b"in")
    host.send_data(stream, STDIN, b"")
    arrived = [bytes(e.payload) for e in flush(host, guest) if isinstance(e, DataArrived)]
    assert arrived == [b"in", b""]
    guest.send(stream, Started(pid=9))
    guest.send_data(stream, STDOUT, b"out")
    for kind in (STDOUT, STDERR):
        guest.send_data(stream, kind, b"")
    guest.send(stream, Exit(code=3))
    assert not guest.is_open(stream)
    events = flush(guest, host)
    assert [e.message for e in events if isinstance(e, MessageArrived)] == [Started(pid=9), Exit(code=3)]
    assert not host.is_open(stream)
    host.send_data(stream, STDIN, b"nobody listens any more")
    host.consumed(stream, STDOUT, 3)
    assert host.credit(stream, STDIN) == 0
    assert host.outgoing == []


def test_a_detached_command_ends_its_stream_by_starting() -> None:
    host, guest = pair()
    stream = host.open(ExecRequest(argv=(b"sleep", b"9"), detach=True))
    flush(host, guest)
    guest.send(stream, Started(pid=9))
    assert not guest.is_open(stream)
    flush(guest, host)
    assert not host.is_open(stream)


def test_credit_is_spent_and_given_back() -> None:
    host, guest = pair()
    stream = host.open(TRUE)
    flush(host, guest)
    guest.send(stream, Started(pid=9))
    for _ in range(WINDOW // MAX_DATA):
        guest.send_data(stream, STDOUT, bytes(MAX_DATA))
    assert guest.credit(stream, STDOUT) == 0
    assert guest.credit(stream, STDERR) == WINDOW
    flush(guest, host)
    host.consumed(stream, STDOUT, CREDIT_STEP - 1)
    assert host.outgoing == []
    host.consumed(stream, STDOUT, 1)
    (event,) = flush(host, guest)
    assert isinstance(event, CreditArrived)
    assert guest.credit(stream, STDOUT) == CREDIT_STEP


def test_more_than_the_credit_is_refused() -> None:
    host, guest = pair()
    stream = host.open(TRUE)
    flush(host, guest)
    data = encode_frame(stream, STDOUT, bytes(MAX_DATA)) * (WINDOW // MAX_DATA)
    list(host.feed(data))
    with pytest.raises(ProtocolError, match="more stdout than there was credit for"):
        list(host.feed(encode_frame(stream, STDOUT, b"x")))
    data = encode_frame(stream, STDIN, bytes(MAX_DATA)) * (WINDOW // MAX_DATA)
    list(guest.feed(data))
    with pytest.raises(ProtocolError, match="more stdin than there was credit for"):
        list(guest.feed(encode_frame(stream, STDIN, b"x")))


def test_our_own_rules_hold_for_us() -> None:
    host, _ = pair()
    stream = host.open(TRUE)
    with pytest.raises(AssertionError):
        host.send_data(stream, STDOUT, b"x")
    with pytest.raises(AssertionError):
        host.send_data(stream, STDIN, bytes(MAX_DATA + 1))
    host.send_data(stream, STDIN, b"")
    with pytest.raises(AssertionError):
        host.send_data(stream, STDIN, b"x")


def test_a_request_that_is_too_long_is_not_sent() -> None:
    host, _ = pair()
    with pytest.raises(InvalidArgumentError, match="too many arguments"):
        host.open(ExecRequest(argv=(bytes(4 << 20),)))
    assert host.outgoing == []
    assert host.open(TRUE) == 1


def test_streams_are_limited_on_both_sides() -> None:
    host, guest = pair()
    for _ in range(MAX_STREAMS):
        host.open(StatusRequest())
    with pytest.raises(BusyError):
        host.open(StatusRequest())
    flush(host, guest)
    events = list(guest.feed(send_raw(2 * MAX_STREAMS + 1, {"type": "status"})))
    assert events == []
    assert b'"busy"' in b"".join(guest.outgoing)
    guest.outgoing.clear()
    guest.send(1, Result(members={}))
    flush(guest, host)
    assert host.open(StatusRequest()) == 2 * MAX_STREAMS + 1


def test_a_request_on_a_stream_that_has_ended_is_dropped() -> None:
    host, guest = pair()
    for stream in (1, 3):
        list(guest.feed(send_raw(stream, {"type": "status"})))
    guest.send(1, Result(members={}))
    assert list(guest.feed(send_raw(1, {"type": "status"}))) == []
    with pytest.raises(ProtocolError, match="stream 3"):
        list(guest.feed(send_raw(3, {"type": "status"})))
    assert host.hello is not None


def test_an_unknown_request_is_answered_not_fatal() -> None:
    host, guest = pair()
    stream = host.open(StatusRequest())
    host.outgoing.clear()
    assert list(guest.feed(send_raw(stream, {"type": "teleport"}))) == []
    (event,) = flush(guest, host)
    assert isinstance(event, MessageArrived)
    assert isinstance(event.message, Error)
    assert event.message.code == "unsupported"
    with pytest.raises(ProtocolError, match="unknown type 'teleport'"):
        list(host.feed(send_raw(0, {"type": "teleport"})))


def test_the_agent_opens_streams_towards_a_keeper_only() -> None:
    host, guest = pair("keeper")
    stream = guest.open(Open(service="ssh-agent"))
    assert stream == 2
    (event,) = flush(guest, host)
    assert isinstance(event, MessageArrived)
    host.send(stream, Started())
    host.send_data(stream, STDIN, b"answer")
    events = flush(host, guest)
    assert isinstance(events[1], DataArrived)
    guest.send_data(stream, STDOUT, b"question")
    guest.send(stream, Closed())
    assert len(flush(guest, host)) == 2
    client, _ = pair()
    with pytest.raises(ProtocolError, match="can't be opened"):
        list(client.feed(send_raw(2, {"type": "open", "service": "ssh-agent"})))


def test_an_end_in_the_midst_of_a_frame_is_noticed() -> None:
    host, _ = pair()
    host.ended()
    list(host.feed(b"\0\0"))
    with pytest.raises(ProtocolError, match="midst of a frame"):
        host.ended()


def bulk_frame(stream: int, kind: int) -> bytes:
    """Make the longest data frame."""
    return encode_frame(stream, kind, bytes(MAX_DATA))


def exit_message(code: int) -> dict[str, object]:
    """Make an exit, valid or not."""
    return {"type": "exit", "code": code}


MESSAGES: list[dict[str, object]] = [
    {"type": "hello", "protocol": 1, "version": "x", "init": "running"}, {"type": "started", "pid": 4},
    {"type": "started"}, {"type": "result"}, {"type": "closed"}, {"type": "error", "code": "a", "message": "b"},
    {"type": "open", "service": "x"}, {"type": "listening", "ports": [1]}, {"type": "cancel"}, {"nothing": 1},
    {"type": "fatal", "code": "a", "message": "b"}, {"type": "exec", "argv": ["YQ=="]}, {"type": "status"},
    {"type": "resize", "rows": 1, "cols": 1}, {"type": "close", "kind": 2}, {"type": "unheard of"},
    {"type": "exec", "argv": [], "detach": True},
]  # fmt: skip
messages = st.builds(exit_message, st.integers(-1, 256)) | st.sampled_from(MESSAGES)
streams = st.integers(0, 8) | st.integers(0, 2**32 - 1)
frames = st.one_of(
    st.builds(send_raw, streams, messages),
    st.builds(encode_frame, streams, st.integers(1, 3), st.binary(max_size=50)),
    st.builds(encode_credit, streams, st.integers(0, 5), st.integers(0, 2**32 - 1)),
    st.builds(bulk_frame, streams, st.integers(1, 3)),
    st.builds(encode_header, streams, st.integers(0, 255), st.integers(0, 2**32 - 1)),
    st.binary(max_size=30),
)


@given(
    st.sampled_from(["host", "guest"]),
    st.sampled_from(["client", "keeper"]),
    st.lists(frames, max_size=30),
    st.booleans(),
)
def test_whatever_comes_is_an_event_or_a_protocol_error(side: str, role: str, sent: list[bytes], greet: bool) -> None:
    connection = Connection("host" if side == "host" else "guest", version="1", role=role)
    if side == "host":
        for _ in range(3):
            connection.open(ExecRequest(argv=(), tty=TerminalSize(rows=1, cols=1)))
    if greet:
        sent = [send_raw(0, {"type": "hello", "protocol": 1, "version": "x", "init": "running", "role": role}), *sent]
    try:
        for data in sent:
            receive(connection, data, side)
    except ProtocolError as error:
        connection.fail(error)


def receive(connection: Connection, data: bytes, side: str) -> None:
    """Take the events of `data`, checking what holds for every one of them."""
    for event in connection.feed(data):
        if isinstance(event, DataArrived):
            assert event.kind in ((STDOUT, STDERR) if side == "host" else (STDIN,))
            assert len(event.payload) <= MAX_DATA
        elif isinstance(event, CreditArrived):
            assert connection.credit(event.stream, event.kind) <= WINDOW
