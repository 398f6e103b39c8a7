"""The tests' own tools do what they say: leaks are found, the ordinary user is one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import leaks
from berth import proc
from ordinary import Ordinary


def test_a_process_that_is_left_is_found(session: Path, scratch: Path) -> None:
    before = leaks.Snapshot.take(session, alone=False)
    with proc.spawn(["sleep", "60"]) as process:
        left = leaks.compare(before, leaks.Snapshot.take(session, alone=False))
        process.kill()
    assert len(left) == 1
    assert "sleep 60" in left[0]
    # Not our child, but started with a path of this session's.
    (scratch / "file").touch()
    with subprocess.Popen(["sh", "-c", f'(exec tail -f "{scratch}/file") & echo $!'], stdout=subprocess.PIPE) as shell:
        assert shell.stdout
        orphan = int(shell.stdout.readline())
        try:
            found = leaks.compare(before, leaks.Snapshot.take(session, alone=False))
        finally:
            os.kill(orphan, 9)
    assert any(str(orphan) in line for line in found), found
    assert leaks.settle(before, session, alone=False) == []


@pytest.mark.root
def test_a_mount_that_is_left_is_found(session: Path, scratch: Path) -> None:
    before = leaks.Snapshot.take(session, alone=False)
    proc.run(["mount", "-t", "tmpfs", "berth-test", str(scratch)])
    try:
        left = leaks.compare(before, leaks.Snapshot.take(session, alone=False))
    finally:
        proc.run(["umount", str(scratch)])
    assert len(left) == 1
    assert str(scratch) in left[0]


@pytest.mark.root
def test_nothing_is_removed_through_a_mount(scratch: Path) -> None:
    (scratch / "home").mkdir()
    (scratch / "home/precious").touch()
    target = scratch / "tests folder/mount"
    target.mkdir(parents=True)
    proc.run(["mount", "--bind", str(scratch / "home"), str(target)])
    with pytest.raises(AssertionError, match="mounts were left"):
        leaks.remove_tree(scratch / "tests folder")
    assert not (scratch / "tests folder").exists()
    assert (scratch / "home/precious").exists()


@pytest.mark.root
def test_the_whole_machine_can_be_looked_at(session: Path) -> None:
    before = leaks.Snapshot.take(session, alone=True)
    assert any(thing.startswith("/tmp/") for thing in before.things["file"])
    assert leaks.compare(before, before) == []


def test_the_ordinary_user_is_one(ordinary_user: Ordinary) -> None:
    done = ordinary_user.run(["id", "-u"])
    assert (done.status, done.stdout.decode().strip()) == (0, str(ordinary_user.uid))
    assert ordinary_user.uid != 0


def test_the_ordinary_users_environment_is_clean(ordinary_user: Ordinary) -> None:
    lines = ordinary_user.run(["env"], env={"EXTRA": "a b"}).stdout.decode().splitlines()
    seen = dict(line.split("=", 1) for line in lines)
    assert seen.keys() == {*ordinary_user.environment, "EXTRA"}
    assert seen["EXTRA"] == "a b"
    assert Path(seen["XDG_RUNTIME_DIR"]).stat().st_mode & 0o777 == 0o700
    assert Path(seen["XDG_RUNTIME_DIR"]).stat().st_uid == ordinary_user.uid


def test_the_ordinary_user_passes_arguments_input_and_status(ordinary_user: Ordinary) -> None:
    words: list[str | bytes] = ["a b", "", "$HOME", "*", "it's", b"\xff"]
    done = ordinary_user.run(["sh", "-c", 'printf "%s|" "$@"; cat; exit 7', "sh", *words], input=b"in", cwd=Path("/"))
    assert done.status == 7
    assert done.stdout == b"a b||$HOME|*|it's|\xff|in"


def test_the_ordinary_user_has_a_control_group(ordinary_user: Ordinary) -> None:
    if ordinary_user.cgroup is None:
        pytest.skip("no control group can be made here")
    own = ordinary_user.run(["cat", "/proc/self/cgroup"]).stdout.decode()
    assert f"0::/{ordinary_user.cgroup.name}\n" in own
    made = ordinary_user.cgroup / "made"
    assert ordinary_user.run(["mkdir", str(made)]).status == 0
    assert ordinary_user.run(["rmdir", str(made)]).status == 0


def test_the_ordinary_user_can_open_tun(ordinary_user: Ordinary) -> None:
    if not Path("/dev/net/tun").exists():
        pytest.skip("there is no /dev/net/tun")
    assert ordinary_user.run(["sh", "-c", ": <> /dev/net/tun"]).status == 0


def test_the_ordinary_user_can_run_berth_and_import_it(ordinary_user: Ordinary) -> None:
    done = ordinary_user.run([str(ordinary_user.berth), "--version"])
    assert (done.status, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"berth ")
    assert ordinary_user.run([str(ordinary_user.python), "-c", "import berth"]).status == 0


def test_the_host_is_fit_for_the_ordinary_user(ordinary_user: Ordinary) -> None:
    """What `system check` calls required is there, when it is asked as that user."""
    script = (
        "from berth.check import run_checks\n"
        "for check in run_checks():\n"
        "    if check.required and check.status == 'missing': print(check)\n"
    )
    done = ordinary_user.run([str(ordinary_user.python), "-c", script])
    assert (done.status, done.stdout, done.stderr) == (0, b"", b"")
