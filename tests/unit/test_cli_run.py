"""`berth run`: its words, its environment, its directory, and the fast path against an agent that answers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth import fastpath, files
from berth.cli import run
from berth.config import BootConfig, Mount
from berth.errors import InvalidArgumentError
from berth.layout import Layout
from berth.names import MachineName
from berth.wire.connection import Connection, DataArrived, MessageArrived
from berth.wire.frames import STDERR, STDOUT
from berth.wire.messages import ExecRequest, Exit, Started
from support import ROOT

HOME = pwd.getpwuid(os.getuid()).pw_dir


class TestWords:
    @pytest.mark.parametrize(
        ("words", "flags", "values", "argv"),
        [
            ([], set[str](), dict[str, str](), list[str]()),
            (["true"], set[str](), dict[str, str](), ["true"]),
            (["--", "-x"], set[str](), dict[str, str](), ["-x"]),
            (["-n", "dev", "ls", "-n", "x"], set[str](), {"name": "dev"}, ["ls", "-n", "x"]),
            (["-ndev", "ls"], set[str](), {"name": "dev"}, ["ls"]),
            (["--name=dev", "--", "--", "x"], set[str](), {"name": "dev"}, ["--", "x"]),
            (["-it", "sh"], {"interactive", "tty"}, dict[str, str](), ["sh"]),
            (["-itu", "ann:adm", "sh"], {"interactive", "tty"}, {"user": "ann:adm"}, ["sh"]),
            (["-iuann", "sh"], {"interactive"}, {"user": "ann"}, ["sh"]),
            (["--root", "-d", "-s", "x"], {"root", "detach", "shell"}, dict[str, str](), ["x"]),
            (["--uid", "7", "--gid=8", "id"], set[str](), {"uid": "7", "gid": "8"}, ["id"]),
            (["-w", "/", "--cwd", "/tmp", "pwd"], set[str](), {"workdir": "/tmp"}, ["pwd"]),
            (["-", "x"], set[str](), dict[str, str](), ["-", "x"]),
            ([""], set[str](), dict[str, str](), [""]),
        ],
    )  # fmt: skip
    def test_forms(self, words: list[str], flags: set[str], values: dict[str, str], argv: list[str]) -> None:
        options = run.parse(words)
        assert (options.flags, options.values, options.argv) == (flags, values, argv)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--bogus"], "unknown option --bogus"), (["-z"], "unknown option -z"), (["-iz"], "unknown option -z"),
            (["-n"], "option -n needs a value"), (["--name"], "option --name needs a value"),
            (["--root=yes"], "option --root takes no value"), (["-n", "Dev"], "invalid machine name 'Dev'"),
            (["--uid", "x"], "invalid uid 'x'"), (["--gid", "-1"], "invalid gid '-1'"), (["-u", ""], "invalid user ''"),
            (["--root", "-u", "x"], "--root and --user can't be used together"),
            (["-u", "a:b", "--gid", "1", "x"], "the group is given twice"), (["-dt"], "--detach and --tty"),
            (["-e", "=x"], "invalid environment variable"), (["--env-file", "/nonexistent/x"], "can't be read"),
            (["--progress", "fancy"], "invalid progress"), (["-w", ""], "invalid workdir"),
        ],
    )  # fmt: skip
    def test_wrong_usage(self, words: list[str], message: str) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            run.parse(words)
        assert message in caught.value.message
        assert caught.value.hint or "can't be read" in message

    @given(st.lists(st.text()))
    def test_what_follows_the_dashes_is_kept_exactly(self, argv: list[str]) -> None:
        assert run.parse(["-i", "--", *argv]).argv == argv

    @given(st.text(min_size=1).filter(lambda text: not text.startswith("-")), st.lists(st.text()))
    def test_the_commands_own_words_are_kept_exactly(self, command: str, argv: list[str]) -> None:
        assert run.parse(["-i", command, *argv]).argv == [command, *argv]


class TestEnvironment:
    def test_given_copied_and_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HERE", "1")
        monkeypatch.delenv("GONE", raising=False)
        assert run.parse(["-e", "A=x=y", "-e", "HERE", "-e", "GONE", "-e", "B="]).env == {
            b"A": b"x=y", b"HERE": b"1", b"B": b"",
        }  # fmt: skip

    def test_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HERE", "1")
        file = tmp_path / "env"
        file.write_bytes(b'\xef\xbb\xbf# comment\n\nA=1 # kept\r\n  B="q"\nHERE\nC=\xff\n')
        assert run.parse(["-e", "A=0", "--env-file", str(file), "-e", "B=2"]).env == {
            b"A": b"1 # kept", b"B": b"2", b"HERE": b"1", b"C": b"\xff",
        }  # fmt: skip

    def test_defaults(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLORTERM", "truecolor")
        plain = run.parse(["x"])
        assert run.make_environment(plain, {}, tty=False) == [b"LANG=C.UTF-8"]
        assert set(run.make_environment(plain, {}, tty=True)) == {
            b"LANG=C.UTF-8", b"TERM=xterm-256color", b"COLORTERM=truecolor",
        }  # fmt: skip
        assert run.make_environment(plain, {"env": ["LANG=de_DE.UTF-8", "A=1"]}, tty=False) == []
        assert run.make_environment(run.parse(["-e", "LANG=C", "x"]), {}, tty=False) == [b"LANG=C"]


class TestWho:
    @pytest.mark.parametrize(
        ("words", "user"),
        [
            ([], None), (["--root"], "root"), (["-u", "ann"], "ann"), (["-u", "ann:adm"], "ann:adm"),
            (["--uid", "7"], "7"), (["--uid", "7", "--gid", "8"], "7:8"), (["--root", "--gid", "8"], "root:8"),
            (["-u", "ann", "--gid", "8"], "ann:8"), (["--gid", "8"], f"{os.getuid()}:8"),
        ],
    )  # fmt: skip
    def test_user(self, words: list[str], user: str | None) -> None:
        assert run.find_user(run.parse(words)) == user


class TestDirectory:
    def test_home_and_mounts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a/b").mkdir(parents=True)
        (tmp_path / "ab").mkdir()
        monkeypatch.chdir(tmp_path / "a/b")
        monkeypatch.setenv("PWD", str(tmp_path / "a/b"))
        none = BootConfig(home_mount="none")
        assert run.find_cwd(none.to_json()) is None
        mounted = BootConfig(home_mount="none", mounts=(Mount(str(tmp_path / "a"), "/data"),))
        assert run.find_cwd(mounted.to_json()) == b"/data/b"
        deeper = BootConfig(mounts=(Mount(str(tmp_path), "/t"), Mount(str(tmp_path / "a/b"), "/b")))
        assert run.find_cwd(deeper.to_json()) == b"/b"
        monkeypatch.chdir(tmp_path / "ab")
        assert run.find_cwd(mounted.to_json()) is None

    def test_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(HOME)
        monkeypatch.delenv("PWD", raising=False)
        assert run.find_cwd({}) == os.fsencode(HOME)
        assert run.find_cwd(BootConfig(home_mount="ro").to_json()) == os.fsencode(HOME)
        assert run.find_cwd(BootConfig(home_mount="none").to_json()) is None

    def test_through_a_symbolic_link(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "real/x").mkdir(parents=True)
        (tmp_path / "link").symlink_to("real")
        monkeypatch.chdir(tmp_path / "real/x")
        boot = BootConfig(home_mount="none", mounts=(Mount(str(tmp_path / "link"), "/data"),)).to_json()
        monkeypatch.setenv("PWD", str(tmp_path / "link/x"))
        assert run.find_cwd(boot) == b"/data/x"
        monkeypatch.setenv("PWD", "/somewhere/else")
        assert run.find_cwd(boot) == b"/data/x"

    def test_deleted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        doomed = tmp_path / "doomed"
        doomed.mkdir()
        monkeypatch.chdir(doomed)
        doomed.rmdir()
        assert run.find_cwd({}) is None

    @pytest.mark.parametrize(
        "data", [b"", b"[]", b"{", b'{"mounts": 3, "env": "x"}', b'{"mounts": [1, {"source": 2}]}']
    )
    @pytest.mark.usefixtures("layout")
    def test_a_damaged_configuration_does_not_matter(self, data: bytes) -> None:
        path = Path(fastpath.boot_config("dev"))
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        run.list_shares(run.load_boot_config("dev"))
        run.make_environment(run.parse([]), run.load_boot_config("dev"), tty=False)
        assert run.load_boot_config("other") == {}


class TestRequest:
    def request(self, *words: str) -> ExecRequest:
        return run.make_request(run.parse(list(words)), "dev")

    @pytest.mark.parametrize(
        ("words", "shell"),
        [
            (["true"], False), (["ls | wc -l"], True), (["ls", "|", "wc"], False), (["echo $HOME"], True),
            (["$x"], True), (["~/bin/x"], True), (["./a-b_c.d,e+f:g@h%i=j/k"], False), ([""], False), (["a;b"], True),
            (["-s", "echo", "$X"], True),
            (["--", "ls >x"], True), (["-s"], False), ([], False), (["a\nb"], True), (["ü"], False),
        ],
    )  # fmt: skip
    @pytest.mark.usefixtures("layout")
    def test_shell(self, words: list[str], shell: bool) -> None:
        assert self.request(*words).shell is shell

    @pytest.mark.usefixtures("layout")
    def test_bytes_are_exact(self) -> None:
        odd = os.fsdecode(b"\xff\xfe")
        assert self.request("printf", "", "a b", odd, "*").argv == (b"printf", b"", b"a b", b"\xff\xfe", b"*")

    @pytest.mark.usefixtures("layout")
    def test_directory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(HOME)
        monkeypatch.delenv("PWD", raising=False)
        assert (self.request("x").cwd, self.request("x").cwd_optional) == (os.fsencode(HOME), True)
        given = self.request("-w", "/srv", "x")
        assert (given.cwd, given.cwd_optional) == (b"/srv", False)
        assert self.request("-w", "src", "x").cwd == os.fsencode(os.path.join(HOME, "src"))

    @pytest.mark.usefixtures("layout")
    def test_detached(self) -> None:
        request = self.request("-d", "sleep", "1")
        assert request.detach
        assert request.tty is None

    @pytest.mark.usefixtures("layout")
    def test_no_terminal_here(self) -> None:
        assert self.request("x").tty is None or os.isatty(0)
        assert self.request("-t", "x").tty is not None


class TestSshAgent:
    @pytest.mark.usefixtures("layout")
    def test_written_once_and_when_it_changes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        live = Path(fastpath.live("dev"))
        monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent.1")
        run.share_ssh_agent("dev")
        assert not live.exists()
        live.mkdir(parents=True)
        run.share_ssh_agent("dev")
        before = (live / "ssh-agent").stat().st_ino
        run.share_ssh_agent("dev")
        assert (live / "ssh-agent").stat().st_ino == before
        monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent.2")
        run.share_ssh_agent("dev")
        assert (live / "ssh-agent").read_text() == "/run/agent.2"
        monkeypatch.setenv("SSH_AUTH_SOCK", "")
        run.share_ssh_agent("dev")
        assert (live / "ssh-agent").read_text() == "/run/agent.2"
        assert os.listdir(live) == ["ssh-agent"]


# The fast path ----------------------------------------------------------------------------------------------------

# What `berth run` against a running machine must never import: each costs milliseconds.
HEAVY = {
    "argparse", "asyncio", "collections", "dataclasses", "enum", "inspect", "json", "logging", "pathlib", "re",
    "shutil", "socket", "subprocess", "tempfile", "threading", "typing", "berth.bundle", "berth.config", "berth.layout",
    "berth.lifecycle", "berth.log", "berth.names", "berth.proc", "berth.cli.commands", "berth.cli.parser",
}  # fmt: skip


class Agent(threading.Thread):
    """A guest agent that speaks the protocol and "runs" commands: it answers with what it was asked."""

    def __init__(self, layout: Layout, name: str) -> None:
        super().__init__()
        live = layout.live(MachineName(name))
        live.mkdir(parents=True)
        self.requests: list[ExecRequest] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(live / "agent.sock"))
        self._listener.listen()
        self._keeper = os.open(live / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(self._keeper, fcntl.LOCK_EX)
        (live / "container.json").touch()

    def run(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                self._serve(peer)

    def _serve(self, peer: socket.socket) -> None:
        connection = Connection("guest", version="0.1.0", init="running")
        while data := peer.recv(65536):
            for event in connection.feed(data):
                if isinstance(event, MessageArrived) and isinstance(event.message, ExecRequest):
                    self._answer(connection, event.stream, event.message)
                assert isinstance(event, MessageArrived | DataArrived)
            peer.sendall(b"".join(connection.outgoing))
            connection.outgoing.clear()

    def _answer(self, connection: Connection, stream: int, request: ExecRequest) -> None:
        self.requests.append(request)
        connection.send(stream, Started(pid=1))
        if not request.detach:
            connection.send_data(stream, STDOUT, b"out\n")
            connection.send_data(stream, STDOUT, b"")
            connection.send_data(stream, STDERR, b"err\n")
            connection.send_data(stream, STDERR, b"")
            connection.send(stream, Exit(code=7))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        os.close(self._keeper)
        self.join()


@pytest.fixture
def agent(layout: Layout) -> Generator[Agent]:
    files.make_private_directory(layout.data)
    layout.default_machine.write_text("dev\n")
    with contextlib.closing(Agent(layout, "dev")) as started:
        started.start()
        yield started


def berth(*words: str | bytes, importtime: bool = False) -> subprocess.CompletedProcess[bytes]:
    # As the installed script does it; `-m berth` would import runpy and what that needs.
    script = "import sys; from berth.cli.main import main; sys.exit(main())"
    argv = [sys.executable, *(["-X", "importtime"] if importtime else []), "-c", script, *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, env=env, timeout=60, check=False)


class TestFastPath:
    def test_a_command_runs(self, agent: Agent) -> None:
        done = berth("run", "-n", "dev", "--", "printf", "%s", b"\xff", "a b")
        assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
        assert agent.requests[0].argv == (b"printf", b"%s", b"\xff", b"a b")

    def test_the_default_machine_and_every_spelling(self, agent: Agent) -> None:
        for words in (["run", "x"], ["m", "run", "x"], ["machine", "run", "x"], ["--debug", "run", "x"]):
            assert berth(*words).returncode == 7, words
        assert [request.argv for request in agent.requests] == [(b"x",)] * 4

    def test_berth_alone_is_a_shell(self, agent: Agent) -> None:
        assert berth().returncode == 7
        assert agent.requests[0].argv == ()

    @pytest.mark.usefixtures("agent")
    def test_detached_prints_the_name(self) -> None:
        done = berth("run", "-d", "sleep", "9")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"dev\n", b"")

    def test_detached_without_a_command_only_boots(self, agent: Agent) -> None:
        assert berth("run", "-d").stdout == b"dev\n"
        assert agent.requests == []

    @pytest.mark.usefixtures("agent")
    def test_imports(self) -> None:
        done = berth("run", "-n", "dev", "true", importtime=True)
        assert done.returncode == 7
        imported = {line.rpartition(b"|")[2].strip().decode() for line in done.stderr.splitlines()}
        assert "berth.session" in imported
        # What the interpreter and the site-packages of this Python import by themselves is not ours to guard.
        bare = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", ""], capture_output=True, check=True, timeout=60
        )
        own = {line.rpartition(b"|")[2].strip().decode() for line in bare.stderr.splitlines()}
        assert (imported - own) & HEAVY == set()

    @pytest.mark.usefixtures("agent")
    def test_closed_standard_files(self) -> None:
        words = f"{sys.executable} -m berth run -n dev true <&- >&- 2>&-"
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        assert subprocess.run(["/bin/sh", "-c", words], env=env, timeout=60, check=False).returncode == 7
