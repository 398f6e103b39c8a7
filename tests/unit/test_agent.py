"""The client of the agent's short requests, against a played agent."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.agent import AgentClient, connect
from berth.errors import AgentError, BerthError, DeadlineError, ProtocolError
from berth.wire.frames import STDOUT, encode_frame
from berth.wire.jsontext import encode_object
from berth.wire.messages import (
    Error,
    ExecRequest,
    Exit,
    PowerOffRequest,
    Result,
    Started,
    StatusRequest,
    WaitRequest,
)
from peer import Peer, played

STATUS = Result(members={"init": "degraded", "system": "openrc", "version": "0.1.0", "twin": "ready", "uptime": 1.5})


def test_hello_tells_the_state_of_the_init() -> None:
    def story(peer: Peer) -> None:
        peer.next_message()
        peer.flush()
        assert peer.is_left()

    with played(story) as sock, AgentClient(sock) as agent:
        assert agent.hello().init == "running"
        assert agent.hello().version == "0.1.0"


def test_status_and_wait() -> None:
    def story(peer: Peer) -> None:
        assert isinstance(peer.accept(), StatusRequest)
        peer.send(STATUS)
        assert isinstance(peer.next_message(), WaitRequest)
        peer.send(Result(members={"init": "running"}))
        assert peer.is_left()

    with played(story) as sock, AgentClient(sock) as agent:
        status = agent.status()
        assert (status.init, status.system, status.twin, status.uptime_s) == ("degraded", "openrc", "ready", 1.5)
        assert agent.wait_init(5.0) == "running"


def test_a_refusal_has_the_agents_word_for_it() -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        peer.send(Error(code="busy", message="too much"))

    with played(story) as sock, AgentClient(sock) as agent, pytest.raises(AgentError, match="too much") as caught:
        agent.status()
    assert caught.value.agent_code == "busy"


def test_a_detached_command_has_a_pid() -> None:
    request = ExecRequest(argv=(b"sleep", b"60"), detach=True)

    def story(peer: Peer) -> None:
        assert peer.accept() == request
        peer.send(Started(pid=4711))

    with played(story) as sock, AgentClient(sock) as agent:
        assert agent.start_detached(request) == 4711


def test_a_guest_that_powers_off_at_once_did_what_was_asked() -> None:
    def story(peer: Peer) -> None:
        assert isinstance(peer.accept(), PowerOffRequest)

    with played(story) as sock, AgentClient(sock) as agent:
        agent.power_off()


def test_a_power_off_that_is_refused_is_told() -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        peer.send(Error(code="internal", message="no init"))

    with played(story) as sock, AgentClient(sock) as agent, pytest.raises(AgentError, match="no init"):
        agent.power_off()


def test_an_agent_that_hangs_up_is_lost() -> None:
    with played(lambda peer: peer.sock.close()) as sock, AgentClient(sock) as agent:
        with pytest.raises(AgentError) as caught:
            agent.status()
        assert caught.value.agent_code == "lost"


def test_an_agent_that_says_nothing_meets_the_deadline() -> None:
    def story(peer: Peer) -> None:
        while peer.sock.recv(4096):
            pass

    with played(story) as sock, AgentClient(sock, timeout_s=0.01) as agent, pytest.raises(DeadlineError):
        agent.hello()


def test_a_flood_does_not_move_the_deadline() -> None:
    """What belongs to a stream that has ended is dropped; there may be no end of it."""
    flood = encode_frame(1, 0, encode_object({"type": "result"})) * 100_000

    def story(peer: Peer) -> None:
        peer.accept()
        peer.send(STATUS)
        peer.next_message()
        with contextlib.suppress(OSError):
            peer.sock.sendall(flood)
            peer.send(Result(members={"init": "running"}))

    with played(story) as sock, AgentClient(sock, timeout_s=5) as agent:
        agent.status()
        with pytest.raises(DeadlineError):
            agent.wait_init(0.001)


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next() -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        first = peer.stream
        assert isinstance(peer.next_message(), StatusRequest)
        peer.connection.send(first, Result(members={"init": "starting"}))
        peer.send(STATUS)

    with played(story) as sock, AgentClient(sock) as agent:
        with pytest.raises(DeadlineError):
            agent.wait_init(0.01)
        assert agent.status().init == "degraded"


@pytest.mark.parametrize(
    "answer", [Exit(code=0), Started(pid=1), Result(members={}), Result(members={"init": "tired"})]
)
def test_an_answer_of_another_kind_breaks_the_protocol(answer: Exit) -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        peer.send(answer)

    with played(story) as sock, AgentClient(sock) as agent, pytest.raises(ProtocolError):
        agent.status()


def test_data_that_nobody_asked_for_breaks_the_protocol() -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        peer.write(STDOUT, b"surprise")

    with played(story) as sock, AgentClient(sock) as agent, pytest.raises(ProtocolError, match="nobody asked for"):
        agent.status()


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_noise_is_a_protocol_error_or_a_loss(noise: list[bytes]) -> None:
    def story(peer: Peer) -> None:
        with contextlib.suppress(ConnectionError):  # it need not hear us out
            for data in noise:
                peer.sock.sendall(data)

    with played(story) as sock, AgentClient(sock) as agent, pytest.raises((ProtocolError, AgentError)):
        agent.status()


def test_nobody_listening_is_unreachable(scratch: Path) -> None:
    with pytest.raises(AgentError, match=r"no guest agent answers at .*/agent\.sock") as caught:
        connect(scratch / "agent.sock", 1.0)
    assert caught.value.agent_code == "unreachable"
    stale = scratch / "stale.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
        with pytest.raises(AgentError):
            connect(stale, 1.0)


def test_a_path_that_is_too_long_is_unreachable(scratch: Path) -> None:
    with pytest.raises(BerthError):
        connect(scratch / ("x" * 200), 1.0)


def test_a_connection_waits_for_its_place_in_the_queue(scratch: Path) -> None:
    path = scratch / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen(0)
        queued = connect(path, 1.0)
        with pytest.raises(DeadlineError, match=r"within 0\.01 s"):
            connect(path, 0.01)
        listener.accept()[0].close()
        connect(path, 1.0).close()
        queued.close()
