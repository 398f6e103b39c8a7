"""The monitor's client against a QEMU of ours at the other end of a socketpair, friendly and hostile."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from berth.engine.qemu import monitor as module
from berth.engine.qemu.monitor import Monitor
from berth.errors import BerthError, DeadlineError, InvalidStateError, ProtocolError

GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n'
ACCEPTED = b'{"return": {}, "id": 1}\r\n'
SOON = 0.05  # seconds: tests of deadlines wait that long


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


def connect(pair: Pair, *said: bytes, timeout_s: float = 5) -> Monitor:
    """Connect to a QEMU that has already said all it ever will."""
    ours, theirs = pair
    theirs.sendall(b"".join(said))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_connect", lambda _path, _timeout_s: ours)
        return Monitor(Path("monitor.sock"), timeout_s)


def test_a_command_and_what_it_returns(pair: Pair) -> None:
    event = b'{"event": "BALLOON_CHANGE", "data": {"actual": 1}, "timestamp": {}}\r\n'
    answer = b'{"return": {"status": "running", "running": true}, "id": 2}\r\n'
    with connect(pair, GREETING, event, ACCEPTED, event, event, answer) as monitor:
        assert monitor.command("query-status") == {"status": "running", "running": True}
    sent = [json.loads(line) for line in pair[1].recv(65536).splitlines()]
    assert sent == [
        {"execute": "qmp_capabilities", "arguments": {}, "id": 1},
        {"execute": "query-status", "arguments": {}, "id": 2},
    ]
    assert pair[1].recv(1) == b""  # it hung up


def test_arguments_are_sent(pair: Pair) -> None:
    with connect(pair, GREETING, ACCEPTED, b'{"return": {}, "id": 2}\n') as monitor:
        assert monitor.command("balloon", value=1 << 30) == {}
    assert json.loads(pair[1].recv(65536).splitlines()[1])["arguments"] == {"value": 1 << 30}


def test_a_refusal_leaves_the_connection_usable(pair: Pair) -> None:
    refusal = b'{"error": {"class": "CommandNotFound", "desc": "no such thing"}, "id": 2}\n'
    with connect(pair, GREETING, ACCEPTED, refusal, b'{"return": {}, "id": 3}\n') as monitor:
        with pytest.raises(BerthError, match="QEMU refused dance: no such thing"):
            monitor.command("dance")
        assert monitor.command("stop") == {}


@pytest.mark.parametrize("error", ["null", "7", '{"desc": 7}', "[]"])
def test_a_refusal_without_words(pair: Pair, error: str) -> None:
    with connect(pair, GREETING, ACCEPTED, b'{"error": %s, "id": 2}\n' % error.encode()) as monitor:
        with pytest.raises(BerthError, match="does not say why"):
            monitor.command("dance")


@pytest.mark.parametrize("value", ["[]", "null", "7", '"text"'])
def test_what_is_returned_is_always_an_object(pair: Pair, value: str) -> None:
    with connect(pair, GREETING, ACCEPTED, b'{"return": %s, "id": 2}\n' % value.encode()) as monitor:
        assert monitor.command("query-status") == {}


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", DeadlineError),  # it serves another client
        (b'{"QMP": ', DeadlineError),
        (b'{"hello": 1}\n', ProtocolError),
        (b"SSH-2.0\n", ProtocolError),
        (b"\xff\xfe\n", ProtocolError),
        (b"[]\n", ProtocolError),
        (b"[" * 100_000 + b"\n", ProtocolError),
        (GREETING, DeadlineError),
        (GREETING + b'{"return": {}, "id": 7}\n', DeadlineError),  # another's answer
        (GREETING + b'{"return": {}, "id": "1"}\n', DeadlineError),
    ],
)
def test_what_is_no_monitor(pair: Pair, said: bytes, error: type[BerthError]) -> None:
    with pytest.raises(error):
        connect(pair, said, timeout_s=SOON)
    assert pair[0].fileno() == -1  # nothing is left open


def test_a_line_without_end_is_not_kept(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LINE", 1000)
    with pytest.raises(ProtocolError, match="without end"):
        connect(pair, b"x" * 70_000)


def test_events_without_end_are_an_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LINES", 10)
    with pytest.raises(ProtocolError, match="did not answer qmp_capabilities in 10 lines"):
        connect(pair, GREETING, b'{"event": "RTC_CHANGE"}\n' * 20)


def test_a_qemu_that_ends(pair: Pair) -> None:
    with connect(pair, GREETING, ACCEPTED) as monitor:
        pair[1].close()
        with pytest.raises(InvalidStateError, match="it has ended"):
            monitor.command("quit")


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(InvalidStateError, match="no QEMU listens"):
        Monitor(tmp_path / "absent.sock", 1)
    with pytest.raises(InvalidStateError, match="no QEMU listens"):
        Monitor(tmp_path / ("x" * 200), 1)
