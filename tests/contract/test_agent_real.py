"""Python's session and client against the real Go agent, on this host: what the issue names as hurting naive tools."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from berth.agent import AgentClient, connect
from berth.errors import DeadlineError
from berth.session import Captured, StartError, run_captured, run_session
from berth.wire.messages import ExecRequest, TerminalSize
from support import ROOT

pytestmark = [pytest.mark.root, pytest.mark.go]

# What `berth run` does once it has a connection: one session with our own standard files.
DRIVER = """
import fcntl, os, sys, termios
sys.path.insert(0, sys.argv[1])
from berth.agent import connect
from berth.session import run_session
from berth.terminal import window_size
from berth.wire.messages import ExecRequest
tty = sys.argv[3] == "tty"
if tty:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
argv, size = tuple(map(os.fsencode, sys.argv[4:])), window_size(0) if tty else None
request = ExecRequest(argv=argv, user="root", cwd=b"/", tty=size)
sys.exit(run_session(connect(sys.argv[2], 10), request, stdin_fd=0, stdout_fd=1, stderr_fd=2, tty=tty))
"""
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def agent(session: Path, agent_binary: Path) -> Generator[Path]:
    """The socket of a real agent that serves this host as its guest."""
    path = session / "contract-agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(128)
        pid = os.posix_spawn(
            agent_binary, ["berth-agent", "serve"], {"PATH": os.environ["PATH"]},
            file_actions=[(os.POSIX_SPAWN_DUP2, listener.fileno(), 3)], setsid=True,
        )  # fmt: skip
    yield path
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    path.unlink()


def request(*argv: str | bytes, **members: Any) -> ExecRequest:
    """Ask for a command as root in /, where every host has both."""
    return ExecRequest(argv=tuple(map(os.fsencode, argv)), user="root", cwd=b"/", **members)


def run(agent: Path, *argv: str | bytes, input: bytes | None = None, **members: Any) -> Captured:
    """Run a command and capture what it writes."""
    return run_captured(connect(agent, 10), request(*argv, **members), input=input, timeout_s=DEADLINE_S)


def command(agent: Path, *argv: str, mode: str = "plain") -> list[str]:
    """Say how to run a command in a process of its own, as `berth run` does."""
    return [sys.executable, "-I", "-c", DRIVER, str(ROOT / "src"), str(agent), mode, *argv]


@contextmanager
def process(argv: Sequence[str], **options: Any) -> Generator[subprocess.Popen[bytes]]:
    """Run a client until the block ends, at the latest."""
    popen: type[subprocess.Popen[bytes]] = subprocess.Popen
    with popen(argv, **options) as client:
        try:
            yield client
        finally:
            with suppress(ProcessLookupError):
                client.kill()


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Wait for what the kernel or the agent will do soon, and gives no event for."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def state_of(pid: int) -> str:
    """Return the state of a process as /proc has it (``S``, ``T`` …); ``gone``: there is none, or only its corpse."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return "gone" if state in "ZX" else state


# ---- arguments and statuses


def test_every_argument_arrives_unchanged(agent: Path) -> None:
    words = ["a b", "", "$HOME", "*", "new\nline", "it's", "\\", '"', "-n", "ü", "\t"]
    assert run(agent, "printf", "%s|", *words).stdout.decode() == "".join(f"{word}|" for word in words)


def test_arguments_need_not_be_utf8(agent: Path) -> None:
    word = bytes(byte for byte in range(1, 256))
    assert run(agent, "printf", "%s", word).stdout == word


def test_the_longest_argument_that_linux_takes(agent: Path) -> None:
    word = b"x" * (128 * 1024 - 1)
    assert run(agent, "printf", "%s", word).stdout == word
    with pytest.raises(StartError) as caught:
        run(agent, "printf", "%s", word + b"x")
    assert caught.value.status in (125, 126)


def test_a_shell_evaluates_a_line(agent: Path) -> None:
    assert run(agent, "echo $((1+1)) | wc -l", shell=True).stdout.split() == [b"1"]


def test_environment_and_directory(agent: Path) -> None:
    result = run(agent, "sh", "-c", 'printf "%s %s" "$ODD" "$PWD"', env=(b"ODD=\xff y",))
    assert result.stdout == b"\xff y /"


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 42", 42), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -9 $$", 137)],
)
def test_the_status_is_the_commands(agent: Path, script: str, status: int) -> None:
    assert run(agent, "sh", "-c", script).status == status


@pytest.mark.parametrize(
    ("argv", "status"), [(["nosuchcommand"], 127), (["/no/such"], 127), (["/etc"], 126), (["/etc/passwd"], 126)]
)
def test_what_does_not_start_says_why(agent: Path, argv: list[str], status: int) -> None:
    with pytest.raises(StartError) as caught:
        run(agent, *argv)
    assert caught.value.status == status
    assert argv[0] in caught.value.message


def test_a_directory_that_is_not_there(agent: Path) -> None:
    gone = ExecRequest(argv=(b"pwd",), user="root", cwd=b"/no/such/folder")
    with pytest.raises(StartError, match="/no/such/folder"):
        run_captured(connect(agent, 10), gone, timeout_s=DEADLINE_S)
    home = ExecRequest(argv=(b"pwd",), user="root", cwd=b"/no/such/folder", cwd_optional=True)
    assert run_captured(connect(agent, 10), home, timeout_s=DEADLINE_S).status == 0


# ---- bytes


def test_100_mib_through_stdin_and_back(agent: Path, scratch: Path) -> None:
    block = os.urandom(1 << 20)
    with (scratch / "in").open("wb") as file:
        for number in range(100):
            file.write(number.to_bytes(4, "big") + block[4:])
    with (scratch / "in").open("rb") as source, (scratch / "out").open("wb") as target:
        status = run_session(
            connect(agent, 10), request("cat"),
            stdin_fd=source.fileno(), stdout_fd=target.fileno(), stderr_fd=2, tty=False,
        )  # fmt: skip
    assert status == 0
    assert subprocess.run(["cmp", scratch / "in", scratch / "out"], check=False).returncode == 0


def test_both_outputs_are_exact_and_apart(agent: Path) -> None:
    data = os.urandom(3 << 20)
    result = run(agent, "tee", "/dev/stderr", input=data)
    assert result.stdout == data
    assert result.stderr == data


def test_pipes_at_both_ends(agent: Path) -> None:
    data = os.urandom(5 << 20)
    client = subprocess.run(command(agent, "cat"), input=data, capture_output=True, timeout=DEADLINE_S, check=False)
    assert client.stdout == data
    assert (client.returncode, client.stderr) == (0, b"")


def test_an_empty_stdin(agent: Path) -> None:
    client = subprocess.run(
        command(agent, "cat"), stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert (client.returncode, client.stdout, client.stderr) == (0, b"", b"")
    assert run(agent, "cat").stdout == b""


def test_a_reader_that_has_enough(agent: Path) -> None:
    with process(command(agent, "yes"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stderr is not None
        assert client.stdout.readline() == b"y\n"
        client.stdout.close()
        assert client.wait(DEADLINE_S) == 141
        assert client.stderr.read() == b""


def test_a_background_process_that_keeps_the_pipes(agent: Path) -> None:
    result = run(agent, "sh", "-c", "sleep 1000 & echo $!")
    pid = int(result.stdout)
    assert state_of(pid) != "gone"
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: state_of(pid) == "gone", "the background process is not gone")


def test_50_clients_at_once(agent: Path) -> None:
    def one(number: int) -> bool:
        data = os.urandom(200_000 + number)
        return run(agent, "cat", input=data).stdout == data

    with ThreadPoolExecutor(50) as pool:
        assert all(pool.map(one, range(50)))


# ---- signals


def test_sigterm_is_the_commands(agent: Path) -> None:
    script = "trap 'echo got it; exit 5' TERM; echo ready; while :; do sleep 0.02; done"
    with process(command(agent, "sh", "-c", script), stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.terminate()
        assert client.stdout.readline() == b"got it\n"
        assert client.wait(DEADLINE_S) == 5


@contextmanager
def sleeper(agent: Path, **options: Any) -> Generator[tuple[subprocess.Popen[bytes], int]]:
    """Yield a client and the process id of the command that it runs."""
    argv = command(agent, "sh", "-c", "echo $$; exec sleep 1000")
    with process(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, **options) as client:
        assert client.stdout is not None
        yield client, int(client.stdout.readline())


def test_a_second_sigterm_ends_a_client_whose_command_ignores_it(agent: Path) -> None:
    argv = command(agent, "sh", "-c", "trap '' TERM; echo ready; exec sleep 1000")
    with process(argv, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"

        def ended() -> bool:
            client.terminate()
            return client.poll() is not None

        eventually(ended, "the client goes on")
        assert client.returncode in (143, -signal.SIGTERM)  # the latter: one more came when the session was over


def test_a_client_that_is_killed_takes_its_command_along(agent: Path) -> None:
    with sleeper(agent) as (client, pid):
        assert state_of(pid) != "gone"
        client.kill()
        eventually(lambda: state_of(pid) == "gone", "the command lives on")


def test_a_deadline_ends_the_command(agent: Path, scratch: Path) -> None:
    script = f"echo $$ > {scratch}/pid; exec sleep 1000"
    with pytest.raises(DeadlineError):
        run_captured(connect(agent, 10), request("sh", "-c", script), timeout_s=0.5)
    pid = int((scratch / "pid").read_text())
    eventually(lambda: state_of(pid) == "gone", "the command lives on")


# A job of a shell: the leader of a session that starts it in a process group of its own.
SHELL = """
import os, subprocess, sys
os.setsid()
job = subprocess.Popen(sys.argv[1:], process_group=0)
print(job.pid, file=sys.stderr, flush=True)
sys.exit(job.wait())
"""


def test_a_stopped_job_stops_its_command(agent: Path) -> None:
    inner = command(agent, "sh", "-c", "echo $$; exec sleep 1000")
    with process(
        [sys.executable, "-I", "-c", SHELL, *inner],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as shell:  # fmt: skip
        assert shell.stdout is not None
        assert shell.stderr is not None
        job, pid = int(shell.stderr.readline()), int(shell.stdout.readline())
        os.kill(job, signal.SIGTSTP)
        eventually(lambda: (state_of(job), state_of(pid)) == ("T", "T"), "not both have stopped")
        os.kill(job, signal.SIGCONT)
        eventually(lambda: "T" not in state_of(job) + state_of(pid), "not both go on")
        os.kill(job, signal.SIGINT)
        assert shell.wait(DEADLINE_S) == 130


def test_a_detached_command_lives_on(agent: Path) -> None:
    with AgentClient(connect(agent, 10)) as client:
        pid = client.start_detached(request("sleep", "1000", detach=True))
    assert state_of(pid) != "gone"
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: state_of(pid) == "gone", "the command lives on")


# ---- the terminal


class Screen:
    """A person at a terminal: types, and waits until something can be read there."""

    def __init__(self, master: int) -> None:
        self.master = master
        self._seen = b""

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        """Read until the pattern has come, and forget what came before its end."""
        while not (match := re.search(pattern, self._seen)):
            assert select.select([self.master], [], [], DEADLINE_S)[0], f"only {self._seen!r} came"
            self._seen += os.read(self.master, 4096)
        self._seen = self._seen[match.end() :]
        return match


# Something that runs in the foreground, and says so once the terminal is its own.
BUSY = b"sh -c 'echo busy; exec sleep 1000'\r"


@contextmanager
def terminal(agent: Path, *argv: str) -> Generator[tuple[Screen, subprocess.Popen[bytes], int]]:
    """Yield the screen of a command in a terminal of 24 x 80, the client, and the terminal's other end."""
    master, slave = os.openpty()
    screen = Screen(master)
    screen.resize(24, 80)
    try:
        argv_ = command(agent, *argv, mode="tty")
        with process(argv_, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as client:
            yield screen, client, slave
    finally:
        os.close(master)
        os.close(slave)


def test_a_shell_in_a_terminal(agent: Path) -> None:
    with terminal(agent, "sh", "-i") as (screen, client, slave):
        screen.expect(rb"[$#] ")
        assert not termios.tcgetattr(slave)[3] & termios.ECHO
        screen.type(b"stty size; tty\r")
        screen.expect(rb"24 80\r\n/dev/pts/")
        screen.resize(50, 132)
        screen.type(b"until stty size | grep -q '^50 132'; do sleep 0.02; done; echo resized\r")
        screen.expect(rb"resized\r\n")
        screen.type(BUSY)
        screen.expect(rb"busy\r\n")
        screen.type(b"\x03")
        screen.expect(rb"[$#] ")
        screen.type(b"echo status=$?\r")
        screen.expect(rb"status=130\r\n")
        screen.type(b"exit 7\r")
        assert client.wait(DEADLINE_S) == 7
        assert termios.tcgetattr(slave)[3] & termios.ECHO


def test_the_end_of_file_key_ends_a_shell(agent: Path) -> None:
    with terminal(agent, "sh", "-i") as (screen, client, _):
        screen.expect(rb"[$#] ")
        screen.type(b"\x04")
        assert client.wait(DEADLINE_S) == 0


def test_job_control_in_a_terminal(agent: Path) -> None:
    with terminal(agent, "bash", "--norc", "-i") as (screen, client, _):
        screen.expect(rb"[$#] ")
        screen.type(BUSY)
        screen.expect(rb"busy\r\n")
        screen.type(b"\x1a")
        screen.expect(rb"Stopped")
        screen.type(b"exit 3\r")
        screen.expect(rb"There are stopped jobs")
        screen.type(b"exit 3\r")
        assert client.wait(DEADLINE_S) == 3


def test_a_terminal_that_goes_away_ends_the_command(agent: Path) -> None:
    with terminal(agent, "sh", "-c", "echo pid=$$.; exec sleep 1000") as (screen, client, _):
        pid = int(screen.expect(rb"pid=(\d+)\.")[1])
        client.send_signal(signal.SIGHUP)
        assert client.wait(DEADLINE_S) == 129
        eventually(lambda: state_of(pid) == "gone", "the command lives on")


# ---- an agent among strangers


def test_garbage_of_one_client_harms_no_other(agent: Path) -> None:
    vectors = json.loads((ROOT / "tests/vectors/frames.json").read_text())
    garbage = [bytes.fromhex(vector["hex"]) for name in ("errors", "frames", "incomplete") for vector in vectors[name]]
    garbage += [bytes.fromhex(v["hex"]) for v in vectors["connections"] if v["receiver"] == "guest"]
    garbage += [os.urandom(10_000), b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100_000]
    dangerous = (b"poweroff", b"clock", b"console")  # this agent's guest is the very host that the tests run on
    with process(command(agent, "cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        for noise in garbage:
            if not any(word in noise for word in dangerous):
                send_noise(agent, noise)
        client.stdin.write(b"still here\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"still here\n"
        client.stdin.close()
        assert client.wait(DEADLINE_S) == 0


def send_noise(agent: Path, noise: bytes) -> None:
    """Send bytes, and hear the agent out until it closes."""
    with socket.socket(fileno=connect(agent, 10).detach()) as stranger, suppress(BrokenPipeError, ConnectionResetError):
        stranger.settimeout(DEADLINE_S)
        stranger.sendall(noise)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(65536):
            pass


def test_a_client_that_does_not_read_stalls_no_other(agent: Path) -> None:
    with process(command(agent, "cat", "/dev/zero"), stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.read(1) == b"\0"
        assert run(agent, "echo", "hello").stdout == b"hello\n"
        client.terminate()


def test_the_agent_tells_how_it_is(agent: Path) -> None:
    with AgentClient(connect(agent, 10)) as client:
        assert client.hello().protocol == 1
        assert client.status().uptime_s > 0


def test_a_size_is_told_to_the_command(agent: Path) -> None:
    result = run(agent, "stty", "size", tty=TerminalSize(rows=7, cols=9))
    assert result.stdout == b"7 9\r\n"
