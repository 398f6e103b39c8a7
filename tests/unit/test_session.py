"""The session of `berth run` against a played agent: bytes, ends, credit, statuses, a guest that misbehaves."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import AgentError, DeadlineError, InvalidArgumentError, ProtocolError
from berth.session import OutputError, StartError, run_captured, run_session
from berth.wire.connection import DataArrived
from berth.wire.frames import MAX_DATA, STDERR, STDIN, STDOUT, WINDOW, encode_credit, encode_frame, encode_header
from berth.wire.jsontext import encode_object
from berth.wire.messages import Close, Error, ExecRequest, Exit, Fatal, Listening, Message, Result, Started
from peer import Peer, played

TRUE = ExecRequest(argv=(b"true",))


@contextmanager
def pipe() -> Generator[tuple[int, int]]:
    """Yield the ends of a pipe, closing what the block left open."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        with suppress(OSError):
            os.close(fd)


@contextmanager
def reading(fd: int) -> Generator[list[bytes]]:
    """Read `fd` to its end in a thread; the list has all of it, as one item, after the block."""
    found: list[bytes] = []

    def read() -> None:
        data = bytearray()
        while piece := os.read(fd, 1 << 16):
            data += piece
        found.append(bytes(data))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield found
    thread.join(10)


def run(sock: socket.socket, out: int, err: int, *, stdin: int | None = None, request: ExecRequest = TRUE) -> int:
    """Run a session without a terminal."""
    return run_session(sock, request, stdin_fd=stdin, stdout_fd=out, stderr_fd=err, tty=False)


def started(story: Callable[[Peer], None]) -> Callable[[Peer], None]:
    """Make a story that begins with a command that runs."""

    def whole(peer: Peer) -> None:
        peer.accept()
        peer.send(Started(pid=7))
        story(peer)

    return whole


def silent(peer: Peer) -> None:
    """Run a command that says nothing."""
    peer.finish(Exit(code=0))


# ---- output


def test_stdout_and_stderr_arrive_exactly_and_apart() -> None:
    out, err = os.urandom(3 * WINDOW + 17), os.urandom(WINDOW + 1)

    def story(peer: Peer) -> None:
        peer.write(STDOUT, out[:100])
        peer.write(STDERR, err)
        peer.write(STDOUT, out[100:])
        peer.finish(Exit(code=0))

    with pipe() as (out_end, stdout), pipe() as (err_end, stderr), played(started(story)) as sock:
        with reading(out_end) as found_out, reading(err_end) as found_err:
            assert run(sock, stdout, stderr) == 0
            os.close(stdout)
            os.close(stderr)
    assert found_out == [out]
    assert found_err == [err]


def test_output_to_files_and_sockets(tmp_path: Path) -> None:
    data = os.urandom(WINDOW)

    def story(peer: Peer) -> None:
        peer.write(STDOUT, data)
        peer.write(STDERR, data)
        peer.finish(Exit(code=0))

    ours, theirs = socket.socketpair()
    with (tmp_path / "out").open("wb") as file, closing(ours), played(started(story)) as sock:
        with reading(theirs.detach()) as found:
            assert run(sock, file.fileno(), ours.fileno()) == 0
            ours.close()
    assert (tmp_path / "out").read_bytes() == data
    assert found == [data]


def test_output_where_a_pipe_cannot_be_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe of another user's: it is written to as it is, in pieces that don't block."""
    data = os.urandom(WINDOW // 2)

    def story(peer: Peer) -> None:
        peer.write(STDOUT, data)
        peer.finish(Exit(code=0))

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    with pipe() as (out_end, stdout), played(started(story)) as sock, reading(out_end) as found:
        with monkeypatch.context() as patch:
            patch.setattr("berth.outputs.os.open", refuse)
            assert run(sock, stdout, stdout) == 0
        os.close(stdout)
    assert found == [data]


def test_a_stalled_stdout_stalls_nothing_else() -> None:
    """stdout's reader sleeps: stderr goes on, and no more than a window of stdout is taken in."""

    def story(peer: Peer) -> None:
        peer.write(STDOUT, bytes(WINDOW))
        peer.write(STDERR, b"still here")
        assert peer.connection.credit(peer.stream, STDOUT) == 0
        go_on.wait(10)
        peer.write(STDOUT, b"the end")
        peer.finish(Exit(code=0))

    go_on = threading.Event()
    with pipe() as (out_end, stdout), pipe() as (err_end, stderr):
        with played(started(story)) as sock, reading(err_end) as errors:
            status: list[int] = []
            thread = threading.Thread(target=lambda: status.append(run(sock, stdout, stderr)))
            thread.start()
            assert os.read(out_end, 1) == b"\0"
            go_on.set()
            with reading(out_end) as found:
                thread.join(10)
                os.close(stdout)
                os.close(stderr)
    assert status == [0]
    assert errors == [b"still here"]
    assert found == [bytes(WINDOW - 1) + b"the end"]


def test_a_reader_that_leaves_closes_stdout_in_the_guest() -> None:
    def story(peer: Peer) -> None:
        peer.write(STDOUT, b"first line\n")
        assert peer.next_message() == Close(kind=STDOUT)
        peer.write(STDOUT, b"what was under way")
        peer.write(STDERR, b"complaint")
        peer.finish(Exit(signal="PIPE"))

    with pipe() as (out_end, stdout), pipe() as (err_end, stderr), played(started(story)) as sock:
        os.close(out_end)
        with reading(err_end) as found:
            assert run(sock, stdout, stderr) == 141
            os.close(stderr)
    assert found == [b"complaint"]


def test_a_full_disk_is_told_when_the_command_has_ended() -> None:
    def story(peer: Peer) -> None:
        peer.write(STDOUT, b"x")
        assert peer.next_message() == Close(kind=STDOUT)
        peer.finish(Exit(code=0))

    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with played(started(story)) as sock, pytest.raises(OutputError, match="stdout was lost: No space left"):
            run(sock, full, 2)
    finally:
        os.close(full)


def test_a_closed_stdout_is_told_when_something_was_written() -> None:
    def story(peer: Peer) -> None:
        peer.write(STDOUT, b"x")
        peer.finish(Exit(code=0))

    with played(started(silent)) as sock:
        assert run(sock, 999, 999) == 0
    with played(started(story)) as sock, pytest.raises(OutputError, match="Bad file descriptor"):
        run(sock, 999, 999)


def test_inherited_descriptors_stay_blocking() -> None:
    def story(peer: Peer) -> None:
        peer.write(STDOUT, b"x")
        flags.extend(fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (stdin, stdout, stderr))
        peer.finish(Exit(code=0))

    flags: list[int] = []
    with pipe() as (stdin, _), pipe() as (_, stdout), pipe() as (_, stderr):
        with played(started(story)) as sock:
            assert run(sock, stdout, stderr, stdin=stdin) == 0
        flags += [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (stdin, stdout, stderr)]
    assert len(flags) == 6
    assert not any(flag & os.O_NONBLOCK for flag in flags)


def test_descriptors_are_given_back() -> None:
    before = os.listdir("/proc/self/fd")
    with pipe() as (_, stdout), played(started(silent)) as sock:
        assert run(sock, stdout, stdout) == 0
    assert os.listdir("/proc/self/fd") == before


# ---- stdin


def test_stdin_arrives_exactly_with_its_end() -> None:
    data = os.urandom(3 * WINDOW + 5)

    def story(peer: Peer) -> None:
        assert peer.read() == data
        peer.finish(Exit(code=0))

    with pipe() as (stdin, write_end), played(started(story)) as sock:

        def feed() -> None:
            with os.fdopen(os.dup(write_end), "wb") as file:
                os.close(write_end)
                file.write(data)

        thread = threading.Thread(target=feed)
        thread.start()
        assert run(sock, 1, 2, stdin=stdin) == 0
        thread.join(10)


def test_stdin_from_a_file_and_from_nowhere(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(data := os.urandom(WINDOW + MAX_DATA + 1))
    for fd, expected in ((os.open(tmp_path / "in", os.O_RDONLY), data), (os.open(os.devnull, os.O_RDONLY), b"")):

        def story(peer: Peer, expected: bytes = expected) -> None:
            assert peer.read() == expected
            peer.finish(Exit(code=0))

        with played(started(story)) as sock:
            assert run(sock, 1, 2, stdin=fd) == 0
        os.close(fd)


def test_no_stdin_is_an_empty_one() -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        assert peer.read() == b""
        peer.send(Started(pid=1))
        peer.finish(Exit(code=0))

    with played(story) as sock:
        assert run(sock, 1, 2) == 0


def test_stdin_that_cannot_be_read_is_an_empty_one(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)

    def story(peer: Peer) -> None:
        assert peer.read() == b""
        peer.finish(Exit(code=0))

    with played(started(story)) as sock:
        assert run(sock, 1, 2, stdin=folder) == 0
    os.close(folder)


def test_stdin_waits_for_credit(tmp_path: Path) -> None:
    """A command that reads nothing: one window is sent, the rest stays where it was."""
    (tmp_path / "in").write_bytes(bytes(3 * WINDOW))

    def story(peer: Peer) -> None:
        held = 0
        while held < WINDOW:
            event = peer.next_event()
            assert isinstance(event, DataArrived)
            held += len(event.payload)
        peer.finish(Exit(code=0))

    fd = os.open(tmp_path / "in", os.O_RDONLY)
    with played(started(story)) as sock:
        assert run(sock, 1, 2, stdin=fd) == 0
    assert os.lseek(fd, 0, os.SEEK_CUR) == WINDOW
    os.close(fd)


def test_stdin_is_left_alone_when_the_command_does_not_start() -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        peer.send(Error(code="not_found", message="nosuch: not found"))

    with pipe() as (stdin, write_end):
        os.write(write_end, b"for the next command")
        with played(story) as sock, pytest.raises(StartError):
            run(sock, 1, 2, stdin=stdin)
        assert os.read(stdin, 100) == b"for the next command"


# ---- statuses and failures


@pytest.mark.parametrize(
    ("message", "status"),
    [(Exit(code=0), 0), (Exit(code=255), 255), (Exit(signal="KILL"), 137), (Exit(signal="34"), 162)],
)
def test_the_status_is_the_commands(message: Exit, status: int) -> None:
    with played(started(lambda peer: peer.finish(message))) as sock:
        assert run(sock, 1, 2) == status


@pytest.mark.parametrize(
    ("code", "status"), [("not_found", 127), ("not_executable", 126), ("invalid_argument", 125), ("internal", 125)]
)
def test_a_command_that_does_not_start_has_a_status_too(code: str, status: int) -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        peer.send(Error(code=code, message="why"))

    with played(story) as sock, pytest.raises(StartError, match="why") as caught:
        run(sock, 1, 2)
    assert caught.value.status == status


def test_a_detached_command_is_left_running() -> None:
    request = ExecRequest(argv=(b"sleep", b"60"), detach=True)

    def story(peer: Peer) -> None:
        assert peer.accept() == request
        peer.send(Started(pid=7))

    with played(story) as sock:
        assert run(sock, 1, 2, stdin=0, request=request) == 0


def test_an_agent_that_goes_away_is_lost() -> None:
    with played(started(lambda peer: peer.sock.close())) as sock, pytest.raises(AgentError) as caught:
        run(sock, 1, 2)
    assert caught.value.agent_code == "lost"


def test_an_agent_that_breaks_off_breaks_the_protocol() -> None:
    with (
        played(started(lambda peer: peer.sock.sendall(b"\0\0\0"))) as sock,
        pytest.raises(ProtocolError, match="midst"),
    ):
        run(sock, 1, 2)


@pytest.mark.parametrize(
    "messages", [(Started(pid=7), Started(pid=8)), (Result(members={}),), (Exit(code=0),), (Listening(ports=()),)]
)
def test_a_message_out_of_place_breaks_the_protocol(messages: tuple[Message, ...]) -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        for message in messages:
            peer.send(message)
        with pytest.raises(ProtocolError, match="ended the connection: message"):
            peer.is_left()

    with played(story) as sock, pytest.raises(ProtocolError):
        run(sock, 1, 2)


def test_the_agent_is_told_what_was_wrong() -> None:
    def story(peer: Peer) -> None:
        peer.sock.sendall(encode_frame(1, STDIN, b"to the guest"))
        with pytest.raises(ProtocolError, match=r"ended the connection: a stdin frame"):
            peer.is_left()

    with played(started(story)) as sock, pytest.raises(ProtocolError, match="stdin"):
        run(sock, 1, 2, stdin=None)


def test_a_request_that_is_too_long_is_refused_before_anything_is_sent() -> None:
    def story(peer: Peer) -> None:
        assert peer.is_left()

    with played(story) as sock, pytest.raises(InvalidArgumentError):
        run(sock, 1, 2, request=ExecRequest(argv=(bytes(4 << 20),)))


# ---- captured


def test_captured_output_and_input() -> None:
    data = os.urandom(3 * WINDOW)

    def story(peer: Peer) -> None:
        assert peer.read() == data
        peer.write(STDOUT, data)
        peer.write(STDERR, b"warning")
        peer.finish(Exit(code=3))

    with played(started(story)) as sock:
        result = run_captured(sock, TRUE, input=data, timeout_s=30)
    assert (result.status, result.stdout, result.stderr) == (3, data, b"warning")


def test_captured_by_default_has_an_empty_stdin() -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        assert peer.read() == b""
        peer.send(Started(pid=1))
        peer.finish(Exit(code=0))

    with played(story) as sock:
        assert run_captured(sock, TRUE).stdout == b""


def test_a_deadline_hangs_up_on_the_command() -> None:
    left: list[bool] = []
    with played(started(lambda peer: left.append(peer.is_left()))) as sock, pytest.raises(DeadlineError):
        run_captured(sock, TRUE, timeout_s=0.01)
    assert left == [True]


def test_a_deadline_counts_for_an_agent_that_never_answers() -> None:
    def story(peer: Peer) -> None:
        while peer.sock.recv(4096):
            pass

    with played(story) as sock, pytest.raises(DeadlineError):
        run_captured(sock, TRUE, timeout_s=0.01)


def test_an_agent_that_never_greets_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a deadline of the caller's, as `berth run` has none: a command may take its time, a greeting may not."""
    monkeypatch.setattr("berth.session._GREETING_S", 0.01)

    def story(peer: Peer) -> None:
        while peer.sock.recv(4096):
            pass

    with played(story) as sock, pipe() as (_, out), pytest.raises(DeadlineError, match="did not answer"):
        run(sock, out, out)


# ---- fuzzing


MESSAGES: list[dict[str, object]] = [
    {"type": "started", "pid": 4}, {"type": "exit", "code": 1}, {"type": "exit", "signal": "HUP"}, {"type": "result"},
    {"type": "error", "code": "x", "message": "y"}, {"type": "closed"}, Fatal(code="x", message="y").document(),
    {"type": "hello", "protocol": 1, "version": "x", "init": "running"}, {"type": "open", "service": "ssh-agent"},
]  # fmt: skip


def message_frame(stream: int, message: dict[str, object]) -> bytes:
    """Make a frame with a message."""
    return encode_frame(stream, 0, encode_object(message))


streams = st.sampled_from([0, 1, 2, 3])
pieces = st.one_of(
    st.builds(message_frame, streams, st.sampled_from(MESSAGES)),
    st.builds(encode_frame, streams, st.integers(1, 3), st.binary(max_size=30)),
    st.builds(encode_credit, streams, st.integers(0, 4), st.integers(0, WINDOW)),
    st.builds(encode_header, streams, st.integers(0, 5), st.integers(0, 2**32 - 1)),
    st.binary(max_size=20),
)


@given(st.booleans(), st.lists(pieces, max_size=12))
def test_whatever_the_agent_sends_the_session_ends_in_order(greet: bool, noise: list[bytes]) -> None:
    def story(peer: Peer) -> None:
        if greet:
            peer.accept()
            peer.send(Started(pid=7))
        with suppress(ConnectionError):
            peer.sock.sendall(b"".join(noise))

    with played(story) as sock, suppress(ProtocolError, AgentError):
        assert 0 <= run_captured(sock, TRUE, input=b"x" * 100, timeout_s=10).status <= 255
