"""The session's signals and terminal, against a played agent and a pseudo-terminal."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import signal
import struct
import termios
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest

from berth.session import StartError, run_captured, run_session
from berth.signals import NAMES
from berth.terminal import RawMode, environment, window_size
from berth.wire.frames import STDOUT
from berth.wire.messages import Error, ExecRequest, Exit, Resize, Signal, Started, TerminalSize
from peer import Peer, played

SIZE = TerminalSize(rows=24, cols=80)
PLAIN = ExecRequest(argv=(b"sleep", b"60"))
TTY = ExecRequest(argv=(b"bash",), tty=SIZE)


@contextmanager
def terminal() -> Generator[tuple[int, int]]:
    """Yield a pseudo-terminal: the person's end and the program's end."""
    master, slave = pty.openpty()
    set_size(master, 24, 80)
    yield master, slave
    os.close(master)
    os.close(slave)


def set_size(fd: int, rows: int, cols: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def mode(fd: int) -> list[Any]:
    return termios.tcgetattr(fd)


def is_raw(fd: int) -> bool:
    return not mode(fd)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def run_plain(story: Callable[[Peer], None]) -> int:
    with played(story) as sock, open(os.devnull, "rb") as stdin:
        return run_session(sock, PLAIN, stdin_fd=stdin.fileno(), stdout_fd=1, stderr_fd=2, tty=False)


def start(peer: Peer) -> None:
    """Accept a command, let it run, and wait until the session knows: it reads stdin then."""
    peer.accept()
    peer.send(Started(pid=7))
    assert peer.read() == b""


def terminate(peer: Peer) -> None:
    """Send SIGTERM until the session has ended."""
    with contextlib.suppress(ConnectionError):
        kill(signal.SIGTERM)
        while peer.sock.recv(4096):
            kill(signal.SIGTERM)


@pytest.fixture(autouse=True)
def late_sigterm() -> Generator[None]:
    """Let a SIGTERM that comes when the session has just ended be nobody's end."""
    old = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    yield
    signal.signal(signal.SIGTERM, old)


# ---- signals


@pytest.mark.parametrize("name", ["INT", "QUIT", "HUP", "TERM", "USR1", "USR2"])
def test_a_signal_is_the_commands(name: str) -> None:
    def story(peer: Peer) -> None:
        start(peer)
        kill(getattr(signal, f"SIG{name}"))
        assert peer.next_message() == Signal(signal=name)
        peer.finish(Exit(code=9))

    assert run_plain(story) == 9


def test_the_handlers_come_back() -> None:
    def story(peer: Peer) -> None:
        start(peer)
        peer.finish(Exit(code=0))

    before = [signal.getsignal(number) for number in NAMES]
    assert run_plain(story) == 0
    assert [signal.getsignal(number) for number in NAMES] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_second_sigterm_ends_us() -> None:
    def story(peer: Peer) -> None:
        start(peer)
        kill(signal.SIGTERM)
        assert peer.next_message() == Signal(signal="TERM")
        kill(signal.SIGTERM)
        assert peer.is_left()

    assert run_plain(story) == 128 + signal.SIGTERM


def test_before_the_command_runs_the_first_signal_ends_us() -> None:
    def story(peer: Peer) -> None:
        peer.accept()
        kill(signal.SIGINT)
        assert peer.is_left()

    assert run_plain(story) == 130


def test_an_ignored_signal_stays_ignored() -> None:
    def story(peer: Peer) -> None:
        start(peer)
        kill(signal.SIGINT)
        kill(signal.SIGUSR1)
        assert peer.next_message() == Signal(signal="USR1")
        peer.finish(Exit(code=0))

    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run_plain(story) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


def test_the_size_of_a_window_is_nobodys_without_a_terminal() -> None:
    def story(peer: Peer) -> None:
        start(peer)
        kill(signal.SIGWINCH)
        kill(signal.SIGUSR1)
        assert peer.next_message() == Signal(signal="USR1")
        peer.finish(Exit(code=0))

    assert run_plain(story) == 0


def test_continuing_continues_the_command() -> None:
    def story(peer: Peer) -> None:
        start(peer)
        kill(signal.SIGCONT)
        assert peer.next_message() == Signal(signal="CONT")
        peer.finish(Exit(code=0))

    assert run_plain(story) == 0


def test_a_stalled_output_does_not_hold_signals_up() -> None:
    def story(peer: Peer) -> None:
        start(peer)
        peer.write(STDOUT, bytes(1 << 20))
        kill(signal.SIGINT)
        assert peer.next_message() == Signal(signal="INT")
        peer.finish(Exit(signal="INT"))
        terminate(peer)  # what nobody reads is not waited for

    reader, writer = os.pipe()
    try:
        with played(story) as sock:
            assert run_session(sock, PLAIN, stdin_fd=None, stdout_fd=writer, stderr_fd=2, tty=False) == 143
    finally:
        os.close(reader)
        os.close(writer)


def test_an_agent_that_does_not_read_cannot_fill_us_with_signals() -> None:
    def story(peer: Peer) -> None:
        start(peer)
        for _ in range(2000):
            kill(signal.SIGUSR1)
        terminate(peer)

    assert run_plain(story) == 143


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    def story(peer: Peer) -> None:
        start(peer)
        peer.finish(Exit(code=4))

    found: list[int] = []
    with played(story) as sock:
        thread = threading.Thread(
            target=lambda: found.append(run_session(sock, PLAIN, stdin_fd=None, stdout_fd=1, stderr_fd=2, tty=False))
        )
        thread.start()
        thread.join(10)
    assert found == [4]


def test_an_interrupted_capture_hangs_up() -> None:
    def story(peer: Peer) -> None:
        start(peer)
        kill(signal.SIGINT)
        assert peer.is_left()

    with played(story) as sock, pytest.raises(KeyboardInterrupt):
        run_captured(sock, PLAIN)


# ---- the terminal


def start_in_terminal(peer: Peer, master: int) -> None:
    """Accept a command, let it run, and wait until the session knows: a key arrives then."""
    peer.accept()
    os.write(master, b"x")
    peer.send(Started(pid=7))
    assert peer.read(1) == b"x"


def run_in(slave: int, story: Callable[[Peer], None]) -> int:
    with played(story) as sock:
        return run_session(sock, TTY, stdin_fd=slave, stdout_fd=slave, stderr_fd=slave, tty=True)


def test_keys_travel_as_bytes_and_the_mode_comes_back() -> None:
    with terminal() as (master, slave):
        before = mode(slave)

        def story(peer: Peer) -> None:
            assert peer.accept() == TTY
            peer.send(Started(pid=7))
            assert is_raw(slave)
            os.write(master, b"\x03\x1a\x04\r")
            assert peer.read(4) == b"\x03\x1a\x04\r"
            peer.write(STDOUT, b"a\nb")
            peer.finish(Exit(code=0))

        assert run_in(slave, story) == 0
        assert os.read(master, 100) == b"a\nb"
        assert mode(slave) == before


def test_a_new_size_is_told() -> None:
    with terminal() as (master, slave):

        def story(peer: Peer) -> None:
            start_in_terminal(peer, master)
            set_size(master, 50, 132)
            kill(signal.SIGWINCH)
            assert peer.next_message() == Resize(size=TerminalSize(rows=50, cols=132))
            peer.finish(Exit(code=0))

        assert run_in(slave, story) == 0


def test_the_mode_comes_back_from_failure() -> None:
    with terminal() as (_, slave):
        before = mode(slave)

        def story(peer: Peer) -> None:
            peer.accept()
            peer.send(Error(code="not_found", message="nosuch"))

        with pytest.raises(StartError):
            run_in(slave, story)
        assert mode(slave) == before


def test_a_terminal_that_hangs_up_ends_us() -> None:
    with terminal() as (master, slave):
        before = mode(slave)

        def story(peer: Peer) -> None:
            start_in_terminal(peer, master)
            kill(signal.SIGHUP)
            assert peer.is_left()

        assert run_in(slave, story) == 129
        assert mode(slave) == before


def test_a_closed_terminal_types_nothing() -> None:
    """Where no SIGHUP comes, or it comes later: an end of file would be a Ctrl-D to what runs, and end a shell."""
    master, slave = pty.openpty()

    def story(peer: Peer) -> None:
        start_in_terminal(peer, master)
        os.close(master)
        assert peer.is_left()

    assert run_in(slave, story) == 129
    os.close(slave)


def test_what_is_piped_into_a_terminal_ends() -> None:
    reader, writer = os.pipe()
    os.close(writer)

    def story(peer: Peer) -> None:
        start(peer)
        peer.finish(Exit(code=0))

    with played(story) as sock:
        assert run_session(sock, TTY, stdin_fd=reader, stdout_fd=1, stderr_fd=2, tty=True) == 0
    os.close(reader)


def test_after_a_stop_the_terminal_is_raw_again() -> None:
    with terminal() as (master, slave):
        before = mode(slave)

        def story(peer: Peer) -> None:
            start_in_terminal(peer, master)
            termios.tcsetattr(slave, termios.TCSANOW, before)  # as the shell does, that has the terminal in between
            kill(signal.SIGCONT)
            assert peer.next_message() == Resize(size=SIZE)
            assert is_raw(slave)
            peer.finish(Exit(code=0))

        assert run_in(slave, story) == 0
        assert mode(slave) == before


def test_raw_mode_leaves_what_is_no_terminal_alone() -> None:
    for fd in (None, os.open(os.devnull, os.O_RDONLY)):
        with RawMode(fd) as raw:
            raw.suspend()
            raw.resume()
        if fd is not None:
            os.close(fd)


def test_raw_mode_survives_a_terminal_that_is_gone() -> None:
    master, slave = pty.openpty()
    with RawMode(slave):
        os.close(master)
    with pytest.raises(OSError, match="Input/output") as caught:
        os.write(slave, b"x")
    assert caught.value.errno == errno.EIO
    os.close(slave)


def test_the_size_of_no_terminal_is_the_usual_one() -> None:
    reader, writer = os.pipe()
    assert window_size(reader) == SIZE
    os.close(reader)
    os.close(writer)
    with terminal() as (master, slave):
        set_size(master, 0, 0)
        assert window_size(slave) == SIZE


def test_the_environment_names_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert environment() == (b"TERM=xterm-256color", b"COLORTERM=truecolor")
    monkeypatch.delenv("COLORTERM")
    monkeypatch.setenv("TERM", "")
    assert environment() == ()
