"""The one door to other programs."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from berth import proc
from berth.errors import CommandError, DeadlineError, UnsupportedError

PYTHON = sys.executable


def test_output_and_status() -> None:
    done = proc.run([PYTHON, "-c", "import sys; print('out'); print('err', file=sys.stderr)"])
    assert (done.status, done.stdout, done.stderr) == (0, b"out\n", b"err\n")


def test_arguments_arrive_unchanged() -> None:
    words = ["a b", "", "$HOME", "*", "new\nline", "it's", '"', "\\", "ä", os.fsdecode(b"\xff")]
    done = proc.run([PYTHON, "-c", "import sys; sys.stdout.buffer.write(b'\\0'.join(map(__import__('os').fsencode, sys.argv[1:])))", *words])  # fmt: skip  # noqa: E501
    assert done.stdout == b"\0".join(os.fsencode(word) for word in words)


def test_stdin_is_empty_unless_said() -> None:
    assert proc.run(["cat"]).stdout == b""
    assert proc.run(["cat"], input=b"\0\xff").stdout == b"\0\xff"


def test_much_input_and_output_at_once() -> None:
    data = os.urandom(1 << 20) * 4
    assert proc.run(["cat"], input=data).stdout == data


def test_a_bad_status_is_an_error_with_its_reason() -> None:
    with pytest.raises(CommandError, match="failed with status 7: why") as caught:
        proc.run([PYTHON, "-c", "import sys; print('what', 'why', sep='\\n', file=sys.stderr); sys.exit(7)"])
    assert caught.value.status == 7
    assert caught.value.argv[0] == PYTHON


def test_good_statuses_are_the_callers_choice() -> None:
    assert proc.run([PYTHON, "-c", "exit(7)"], success=(7,)).status == 7


def test_death_by_signal_is_negative() -> None:
    with pytest.raises(CommandError, match="was ended by signal 15") as caught:
        proc.run([PYTHON, "-c", "import os; os.kill(os.getpid(), 15)"])
    assert caught.value.status == -signal.SIGTERM


def test_a_deadline_kills() -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"did not finish within 0\.2 s"):
        proc.run(["sleep", "60"], timeout_s=0.2)
    assert time.monotonic() - start < 30


def test_only_the_tail_of_stderr_is_kept() -> None:
    with pytest.raises(CommandError) as caught:
        proc.run([PYTHON, "-c", "import sys; sys.stderr.write('x' * 100000 + 'end'); sys.exit(1)"])
    assert len(caught.value.stderr) == 8192
    assert caught.value.stderr.endswith("end")


def test_a_missing_program_is_told() -> None:
    with pytest.raises(UnsupportedError, match="no-such-program is not installed") as caught:
        proc.run(["no-such-program"])
    assert caught.value.hint == "berth system check"
    with pytest.raises(UnsupportedError) as caught:
        proc.require_program("no-such-program", package="thing")
    assert caught.value.hint
    assert "thing" in caught.value.hint


def test_a_found_program_is_absolute() -> None:
    assert proc.require_program("sh", package="dash").is_absolute()
    assert proc.find_program("no-such-program") is None


def test_the_environment_is_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("LANG", "de_DE")
    env = proc.environment({"EXTRA": "1"})
    assert "AWS_SECRET_ACCESS_KEY" not in env
    assert "LD_PRELOAD" not in env
    assert "LANG" not in env
    assert (env["LC_ALL"], env["EXTRA"]) == ("C.UTF-8", "1")
    seen = proc.run(["env"], env={"EXTRA": "1"}).stdout.decode()
    assert "EXTRA=1\n" in seen
    assert "SECRET" not in seen


def test_sbin_is_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/sbin")
    assert proc.environment()["PATH"] == "/usr/bin:/sbin:/usr/local/sbin:/usr/sbin"
    monkeypatch.delenv("PATH")
    assert "/usr/sbin" in proc.environment()["PATH"]


def test_output_may_go_to_a_file(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        assert proc.run(["echo", "hello"], stdout=file).stdout == b""
    assert (tmp_path / "out").read_bytes() == b"hello\n"


def test_only_named_descriptors_are_passed() -> None:
    read, write = os.pipe()
    try:
        os.set_inheritable(write, True)
        script = f"import os; os.fstat({read})"
        assert proc.run([PYTHON, "-c", script], pass_fds=[read]).status == 0
        with pytest.raises(CommandError):
            proc.run([PYTHON, "-c", f"import os; os.fstat({write})"], pass_fds=[read])
    finally:
        os.close(read)
        os.close(write)


def test_a_spawned_program_is_the_callers() -> None:
    with proc.spawn(["sleep", "60"], new_session=True) as process:
        assert os.getsid(process.pid) == process.pid
        process.terminate()
    assert process.returncode == -signal.SIGTERM


def test_working_directory(tmp_path: Path) -> None:
    assert proc.run(["pwd", "-P"], cwd=tmp_path).stdout == os.fsencode(tmp_path.resolve()) + b"\n"


class TestStartTime:
    def test_a_process_has_one_and_a_gone_one_has_none(self) -> None:
        assert proc.start_time(os.getpid()) is not None
        with proc.spawn(["true"]) as process:
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT) is None:
                pass
            assert proc.start_time(process.pid) is None  # a zombie: nobody has waited for it yet
        assert proc.start_time(process.pid) is None

    def test_a_process_without_its_first_thread_lives(self) -> None:
        script = (
            "import ctypes, sys, threading\n"
            "threading.Thread(target=sys.stdin.read).start()\n"
            "print(flush=True)\n"
            "ctypes.CDLL(None).pthread_exit(None)\n"
        )
        with proc.spawn([sys.executable, "-c", script], stdin=-1, stdout=-1) as process:
            assert process.stdout
            before = proc.start_time(process.pid)
            process.stdout.readline()
            deadline = time.monotonic() + 10
            while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < deadline
            assert proc.start_time(process.pid) == before
            process.kill()


def test_the_way_to_a_program_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"apt-get": Path("/usr/bin/apt-get")}
    monkeypatch.setattr(proc, "find_program", found.get)
    with pytest.raises(UnsupportedError, match="crun is not installed") as caught:
        proc.require_program("crun", package="crun")
    assert caught.value.hint == "sudo apt-get install crun"
    found.clear()
    assert proc.install_command("crun") == "berth system check"
