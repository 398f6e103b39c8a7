"""Messages: what is well-formed arrives unchanged, everything else is a ProtocolError."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import ProtocolError
from berth.wire.jsontext import encode_object
from berth.wire.messages import (
    SIGNALS,
    STATES,
    Close,
    Error,
    ExecRequest,
    Exit,
    Hello,
    Listening,
    Resize,
    Result,
    Signal,
    Started,
    TerminalSize,
    decode_to_guest,
    decode_to_host,
    parse_init,
    parse_signal,
    parse_status,
)
from berth.wire.record import Record

sizes = st.builds(TerminalSize, rows=st.integers(1, 65535), cols=st.integers(1, 65535))
requests = st.builds(
    ExecRequest,
    argv=st.lists(st.binary(max_size=50), max_size=5).map(tuple), shell=st.booleans(),
    env=st.lists(st.binary(max_size=50), max_size=5).map(tuple), cwd=st.none() | st.binary(max_size=50),
    cwd_optional=st.booleans(), user=st.none() | st.sampled_from(["root", "1000:1000", "ana:staff"]),
    tty=st.none() | sizes, detach=st.booleans(),
)  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=5), scalars, max_size=3)


@given(requests)
def test_a_request_arrives_as_it_was_made(request: ExecRequest) -> None:
    assert decode_to_guest(encode_object(request.document())) == request


TYPES = [
    "hello", "fatal", "started", "error", "closed", "exec", "resize", "signal", "close", "status", "wait", "poweroff",
    "dial", "listeners", "cancel", "console", "clock", "exit", "result", "listening", "open",
]  # fmt: skip
MEMBERS = [
    "protocol", "version", "role", "init", "code", "message", "pid", "argv", "shell", "env", "cwd", "cwdOptional",
    "user", "tty", "detach", "rows", "cols", "signal", "kind", "for", "port", "unixNanos", "ports", "service",
]  # fmt: skip


@given(st.sampled_from(TYPES), st.dictionaries(st.sampled_from(MEMBERS), values))
def test_anything_in_a_message_is_taken_or_refused(kind: str, members: dict[str, object]) -> None:
    text = encode_object({**members, "type": kind}) if _is_finite(members) else b"{}"
    for decode in (decode_to_host, decode_to_guest):
        try:
            message = decode(text)
        except ProtocolError:
            continue
        assert message.type == kind
        message.document()
        if isinstance(message, Exit):
            assert 0 <= message.status <= 255


@given(st.dictionaries(st.sampled_from(["init", "system", "version", "twin", "uptime"]), values))
def test_anything_in_a_result_is_taken_or_refused(members: dict[str, object]) -> None:
    for parse in (parse_status, parse_init):
        try:
            parse(Result(members=members))
        except ProtocolError:
            continue
        assert members["init"] in STATES


def _is_finite(value: object) -> bool:
    return "inf" not in repr(value).lower()


@pytest.mark.parametrize(
    ("text", "status"),
    [(b'{"type":"exit","code":0}', 0), (b'{"type":"exit","code":255}', 255), (b'{"type":"exit","signal":"TERM"}', 143),
     (b'{"type":"exit","signal":"KILL"}', 137), (b'{"type":"exit","signal":"34"}', 162)],
)  # fmt: skip
def test_status_is_what_a_shell_shows(text: bytes, status: int) -> None:
    message = decode_to_host(text)
    assert isinstance(message, Exit)
    assert message.status == status


@pytest.mark.parametrize("name", ["", "TERMX", "SIGTERM", "0", "65", "-1", "999999", "٣", "1e1", "\x1b[2J"])
def test_unknown_signals_are_refused(name: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_signal(name)
    assert caught.value.message.isprintable()


def test_signals_are_those_of_linux() -> None:
    assert (SIGNALS["USR1"], SIGNALS["CHLD"], parse_signal("WINCH")) == (10, 17, 28)


@pytest.mark.parametrize(
    "text",
    [
        b'{"type":"exit"}', b'{"type":"exit","code":256}', b'{"type":"exit","code":-1}', b'{"type":"exit","code":true}',
        b'{"type":"exit","code":1.0}', b'{"type":"exit","signal":"NOPE"}', b'{"type":"started","pid":0}',
        b'{"type":"error","code":"x"}', b'{"type":"error","code":1,"message":"x"}', b'{"type":"listening"}',
        b'{"type":"listening","ports":[0]}', b'{"type":"listening","ports":[65536]}',
        b'{"type":"listening","ports":[true]}',
        b'{"type":"hello","protocol":"1","version":"x"}', b'{"type":"exec","argv":[]}', b'{"type":"nonsense"}',
    ],
)  # fmt: skip
def test_malformed_messages_to_the_host_are_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_to_host(text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"type":"exec","argv":["@@@@"]}', b'{"type":"exec","argv":["YQ"]}', b'{"type":"exec","argv":["YQ==\\n"]}',
        b'{"type":"exec","argv":["\xc3\xa9"]}', b'{"type":"exec","argv":"YQ=="}', b'{"type":"exec","argv":[1]}',
        b'{"type":"exec","env":{}}', b'{"type":"exec","shell":1}', b'{"type":"exec","tty":[]}',
        b'{"type":"exec","tty":{"rows":0,"cols":80}}', b'{"type":"exec","tty":{"rows":24}}',
        b'{"type":"exec","user":0}',
        b'{"type":"resize","rows":24,"cols":70000}', b'{"type":"close","kind":1}', b'{"type":"close","kind":4}',
        b'{"type":"dial","port":0}', b'{"type":"wait","for":"rain"}', b'{"type":"clock","unixNanos":-1}',
        b'{"type":"signal","signal":9}',
    ],
)  # fmt: skip
def test_malformed_messages_to_the_guest_are_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_to_guest(text)


def test_missing_members_have_their_defaults() -> None:
    assert decode_to_guest(b'{"type":"exec"}') == ExecRequest(argv=())


def test_the_guests_words_are_harmless_on_a_terminal() -> None:
    message = decode_to_host(
        b'{"type":"error","code":"internal","message":"a\\u001b[2Jb\\ud800c\\nd' + b"x" * 9000 + b'"}'
    )
    assert isinstance(message, Error)
    assert message.message.startswith("a?[2Jb?c?dxxx")
    assert len(message.message) == 4096
    message.message.encode()


def test_status_is_parsed() -> None:
    text = b'{"type":"result","init":"running","system":"systemd","version":"1","twin":"ready","uptime":3}'
    result = decode_to_host(text)
    assert isinstance(result, Result)
    assert parse_status(result).uptime_s == 3.0
    assert parse_init(result) == "running"


@pytest.mark.parametrize("message", [
    Hello(version="1", role="client"), Started(pid=3), Started(), Exit(code=3), Exit(signal="HUP"),
    Listening(ports=(1, 2)), Result(members={"init": "running"}),
])  # fmt: skip
def test_messages_to_the_host_survive(message: Hello) -> None:
    assert decode_to_host(encode_object(message.document())) == message


@pytest.mark.parametrize("message", [
    Resize(size=TerminalSize(rows=1, cols=2)), Signal(signal="INT"), Close(kind=3),
])  # fmt: skip
def test_messages_to_the_guest_survive(message: Close) -> None:
    assert decode_to_guest(encode_object(message.document())) == message


def test_records_are_values() -> None:
    size = TerminalSize(rows=24, cols=80)
    assert size == TerminalSize(cols=80, rows=24)
    assert size != TerminalSize(rows=25, cols=80)
    assert hash(size) == hash(TerminalSize(rows=24, cols=80))
    assert repr(size) == "TerminalSize(rows=24, cols=80)"
    assert size != Record()
    with pytest.raises(AttributeError):
        size.rows = 3  # type: ignore[misc]  # pyright: ignore
    with pytest.raises(TypeError):
        TerminalSize(rows=1)  # type: ignore[call-arg]  # pyright: ignore
    with pytest.raises(TypeError):
        TerminalSize(rows=1, cols=2, depth=3)  # type: ignore[call-arg]  # pyright: ignore
