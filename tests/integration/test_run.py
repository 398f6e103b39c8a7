"""`berth run`: exact arguments, bytes, statuses, users, directories, terminals; as root and as an ordinary user."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from person import Person


def test_arguments_arrive_unchanged(person: Person, debian: str) -> None:
    words = ["a b", "", "$HOME", "*", "new\nline", "it's", '"', "\\", "-n", "--", "ü"]
    said = person.run(debian, "printf", "%s|", *words)
    assert said == "".join(f"{word}|" for word in words)


def test_bytes_that_are_no_utf8_arrive(person: Person, debian: str) -> None:
    done = person.try_berth("run", "-n", debian, "--", b"printf", b"%s", b"\xff\xfe caf\xe9")
    assert (done.status, done.stdout) == (0, b"\xff\xfe caf\xe9")


def test_a_long_argument_arrives(person: Person, debian: str) -> None:
    word = "x" * (128 * 1024 - 1)  # the kernel's own limit of one argument, with its NUL
    assert person.run(debian, "sh", "-c", 'printf %s "${#1}"', "sh", word) == str(len(word))


def test_a_hundred_mebibytes_there_and_back(person: Person, debian: str) -> None:
    data = os.urandom(1 << 20) * 100
    done = person.try_berth("run", "-n", debian, "--", "cat", input=data)
    assert done.status == 0
    assert len(done.stdout) == len(data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_stdout_and_stderr_stay_apart(person: Person, debian: str) -> None:
    done = person.try_berth("run", "-n", debian, "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.status, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


def test_an_empty_stdin_is_an_end(person: Person, debian: str) -> None:
    assert person.run(debian, "cat", input=b"") == ""


def test_a_closed_stdout_ends_the_command_quietly(person: Person, debian: str) -> None:
    process = person.popen("run", "-n", debian, "--", "sh", "-c", "seq 1 10000000; echo $? >&2")
    assert process.stdout
    assert process.stderr
    with process:
        assert process.stdout.readline() == b"1\n"
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(timeout=30) in (0, 141)


def test_a_background_process_does_not_keep_us(person: Person, debian: str) -> None:
    started = time.monotonic()
    assert person.run(debian, "sh", "-c", "sleep 30 & echo done") == "done\n"
    assert time.monotonic() - started < 15
    person.run(debian, "pkill", "-f", "sleep 30")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -TERM $$"], 128 + 15),
        (["sh", "-c", "kill -KILL $$"], 128 + 9),
        (["no-such-command"], 127),
        (["/etc"], 126),
        (["/etc/passwd"], 126),
    ],
)
def test_the_exit_status_is_the_commands(person: Person, debian: str, words: list[str], status: int) -> None:
    done = person.try_berth("run", "-n", debian, "--", *words)
    assert done.status == status
    if status in (126, 127):
        assert done.stderr.startswith(b"berth: ")


def test_an_unknown_user_is_berths_own_failure(person: Person, debian: str) -> None:
    done = person.try_berth("run", "-n", debian, "-u", "nobody-of-that-name", "--", "true")
    assert done.status == 125
    assert b"nobody-of-that-name" in done.stderr


def test_one_argument_with_shell_characters_is_a_shell_line(person: Person, debian: str) -> None:
    assert person.berth("run", "-n", debian, "echo one | tr a-z A-Z") == "ONE\n"
    assert person.berth("run", "-n", debian, "-s", "echo", "$((2+3))") == "5\n"


def test_the_twin_is_the_host_user(person: Person, debian: str) -> None:
    assert person.run(debian, "id", "-un").strip() == person.name
    assert person.run(debian, "id", "-u").strip() == str(person.uid)
    assert person.run(debian, "sh", "-c", "echo $HOME $USER $LOGNAME").split() == [
        str(person.home),
        person.name,
        person.name,
    ]
    assert person.berth("run", "-n", debian, "--root", "--", "id", "-u").strip() == "0"
    assert person.berth("run", "-n", debian, "--uid", "65534", "--", "id", "-u").strip() == "65534"
    assert person.berth("run", "-n", debian, "-u", "daemon:games", "--", "id", "-gn").strip() == "games"


def test_sudo_needs_no_password(person: Person, debian: str) -> None:
    if person.run(debian, "sh", "-c", "command -v sudo || true"):
        assert person.run(debian, "sudo", "-n", "id", "-u").strip() == "0"


def test_the_environment(person: Person, debian: str) -> None:
    said = person.berth(
        "run",
        "-n",
        debian,
        "-e",
        "A=1",
        "-e",
        "FROM_HOST",
        "--",
        "sh",
        "-c",
        "echo $A $FROM_HOST",
        env={"FROM_HOST": "yes"},
    )
    assert said == "1 yes\n"


def test_an_environment_file(person: Person, debian: str) -> None:
    path = person.home / f"berth-test-env-{os.getpid()}"
    path.write_text("# a comment\nKEY=value with spaces\n\nOTHER=x=y\n")
    path.chmod(0o644)
    try:
        said = person.berth("run", "-n", debian, "--env-file", str(path), "--", "sh", "-c", 'echo "$KEY/$OTHER"')
    finally:
        path.unlink()
    assert said == "value with spaces/x=y\n"


def test_the_working_directory_is_carried_over(person: Person, debian: str, project: Path) -> None:
    assert person.run(debian, "pwd", cwd=project).strip() == str(project)
    assert person.run(debian, "cat", "hello.txt", cwd=project) == "hello from the host\n"
    assert person.run(debian, "pwd", cwd=Path("/usr/share")).strip() == str(person.home)
    assert person.berth("run", "-n", debian, "-w", "/etc", "--", "pwd").strip() == "/etc"
    done = person.try_berth("run", "-n", debian, "-w", "/nowhere", "--", "pwd")
    assert done.status in (125, 126, 127)
    assert b"/nowhere" in done.stderr


def test_a_signal_to_the_command_line_reaches_the_command(person: Person, debian: str) -> None:
    script = "trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    process = person.popen("run", "-n", debian, "--", "sh", "-c", script)
    assert process.stdout
    with process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"caught\n"
        assert process.wait(timeout=30) == 7


def test_a_killed_command_line_leaves_no_command(person: Person, debian: str) -> None:
    process = person.popen("run", "-n", debian, "--", "sh", "-c", "echo ready; exec sleep 4242")
    assert process.stdout
    with process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    deadline = time.monotonic() + 20
    while person.try_berth("run", "-n", debian, "--", "pgrep", "-f", "sleep 4242").status == 0:
        assert time.monotonic() < deadline, "the command outlives its client"
        time.sleep(0.2)


def test_detached_commands_go_on(person: Person, debian: str) -> None:
    said = person.berth("run", "-n", debian, "-d", "--", "sleep", "4343")
    assert said.strip() == debian
    assert person.run(debian, "pgrep", "-f", "sleep 4343").strip()
    person.run(debian, "pkill", "-f", "sleep 4343")


def test_fifty_at_once(person: Person, debian: str) -> None:
    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(lambda number: person.run(debian, "echo", str(number)), range(50)))
    assert results == [f"{number}\n" for number in range(50)]


class Terminal:
    """A pseudo-terminal with berth on its other side."""

    def __init__(self, person: Person, *words: str, is_controlling: bool = True) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
        # setsid -c: the terminal becomes the controlling one, as a terminal emulator does it.
        leader = ["setsid", "-c", "-w"] if is_controlling else []
        argv = [*leader, *person.command([*person.program, *words], {}, None)]
        self.process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.seen = b""

    def expect(self, text: bytes, timeout_s: float = 30.0) -> bytes:
        """Read until `text` was shown; return what came before it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.seen!r}"
            try:
                self.seen += os.read(self.master, 65536)
            except OSError:
                raise AssertionError(f"{text!r} did not come before the end: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def send(self, text: bytes) -> None:
        os.write(self.master, text)

    def close(self) -> int:
        """Wait for berth's end; return its status."""
        with contextlib.suppress(OSError):
            while select.select([self.master], [], [], 10)[0] and (shown := os.read(self.master, 65536)):
                self.seen += shown
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"berth did not end: {self.seen!r}") from None
        finally:
            os.close(self.master)
            self.process.kill()
            self.process.wait()


def test_a_login_shell_on_a_terminal(person: Person, debian: str) -> None:
    terminal = Terminal(person, "run", "-n", debian)
    terminal.send(b"echo size=$(stty size) tty=$(tty) sh=$0\n")
    terminal.expect(b"size=33 99")
    terminal.expect(b"tty=/dev/pts/")
    fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 111, 0, 0))
    terminal.process.send_signal(signal.SIGWINCH)
    time.sleep(0.5)
    terminal.send(b"echo now=$(stty size)\n")
    terminal.expect(b"now=44 111")
    terminal.send(b"sleep 1000\n")
    time.sleep(0.5)
    terminal.send(b"\x03")
    terminal.send(b"echo after=$?\n")
    terminal.expect(b"after=130")
    terminal.send(b"sleep 1000\n")
    time.sleep(0.5)
    terminal.send(b"\x1a")
    terminal.expect(b"Stopped")
    # fg waits for the job's end, where wait passes a stopped one over: with it, the shell would not exit. The words
    # looked for are not those of the command line, which the terminal shows too.
    terminal.send(b"kill -KILL %1; fg; echo all''ended\n")
    terminal.expect(b"allended")
    terminal.send(b"exit 5\n")
    assert terminal.close() == 5


def test_the_end_of_input_ends_a_shell(person: Person, debian: str) -> None:
    terminal = Terminal(person, "run", "-n", debian, "--", "sh")
    terminal.send(b"echo here-$((40+2))\n")
    terminal.expect(b"here-42")
    terminal.send(b"\x04")
    assert terminal.close() == 0


def test_a_closed_terminal_types_nothing(person: Person, debian: str) -> None:
    """Not the Ctrl-D that would end a shell in the machine's tmux. berth gets no SIGHUP here; it may come late."""
    typed = "/var/tmp/typed"
    words = ("run", "-n", debian, "--", "sh", "-c", f"echo ready; cat; touch {typed}")
    terminal = Terminal(person, *words, is_controlling=False)
    terminal.expect(b"ready")
    os.close(terminal.master)
    assert terminal.process.wait(timeout=30) == 128 + signal.SIGHUP
    assert person.try_berth("run", "-n", debian, "--", "test", "-e", typed).status == 1


def test_a_pipe_is_no_terminal(person: Person, debian: str) -> None:
    assert person.try_berth("run", "-n", debian, "--", "test", "-t", "1").status == 1
    assert person.berth("run", "-n", debian, "-t", "--", "sh", "-c", "test -t 1 && echo tty").strip() == "tty"
