"""Real folder servers, of root and of an ordinary user, without a VM: what they see, how they begin and end.

A daemon's root directory is the share itself, as the guest sees it; root looks at it through /proc/PID/root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from berth.engine.qemu.shares import Cover, ShareSpec
from berth.engine.qemu.virtiofsd import find_virtiofsd
from berth.engine.running import Process
from ordinary import Ordinary
from support import ROOT

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(find_virtiofsd() is None, reason="needs virtiofsd: not installed"),
]
_GONE_S = 5.0
# Starts servers as somebody, says which, and holds their sockets until its standard input ends.
_HOLDER = """
import dataclasses, json, os, sys
from pathlib import Path
from berth.engine.qemu.shares import Cover, ShareSpec, start_shares
from berth.errors import BerthError

request = json.loads(sys.argv[1])
specs = [ShareSpec(**{**one, "covers": tuple(Cover(**cover) for cover in one["covers"])}) for one in request["specs"]]
try:
    servers = start_shares(specs, Path(request["folder"]), Path(request["private"]))
    answer = [server.process.to_json() for server in servers]
except BerthError as error:
    answer = error.message
print(json.dumps(answer), flush=True)
sys.stdin.read()
"""


class Someone(NamedTuple):
    """Who shares: root when there is no user. folder: theirs."""

    user: Ordinary | None
    folder: Path

    @property
    def uid(self) -> int:
        return self.user.uid if self.user else 0

    @contextlib.contextmanager
    def serving(self, *specs: ShareSpec) -> Generator[list[Process] | str]:
        """Start servers; give them, or the error's words. In the end all of them must have gone with their sockets."""
        request = {
            "specs": [dataclasses.asdict(spec) for spec in specs], "folder": str(self.folder / "live"),
            "private": str(self.folder / "private"),
        }  # fmt: skip
        with self._start(json.dumps(request)) as holder:
            assert holder.stdout
            answer = json.loads(holder.stdout.readline())
            found = answer if isinstance(answer, str) else [_process(one) for one in answer]
            yield found
            assert holder.stdin
            holder.stdin.close()
        assert [process for process in found if isinstance(process, Process) and not process.wait_gone(_GONE_S)] == []
        assert os.listdir(self.folder / "live") == []

    def _start(self, request: str) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        if self.user:
            argv = [str(self.user.python), "-c", _HOLDER, request]
            return self.user.popen(argv, stdin=pipe, stdout=pipe, stderr=None)
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        return subprocess.Popen([sys.executable, "-c", _HOLDER, request], stdin=pipe, stdout=pipe, env=env)

    def own(self) -> None:
        """Give the folder, with all in it, to them."""
        for path in (self.folder, *self.folder.rglob("*")):
            os.chown(path, self.uid, self.uid, follow_symlinks=False)


@pytest.fixture(params=["root", "user"])
def someone(request: pytest.FixtureRequest, scratch: Path) -> Someone:
    """Root, then an ordinary user, with a home that has secrets in it."""
    user = request.getfixturevalue("ordinary_user") if request.param == "user" else None
    found = Someone(user, scratch / "theirs")
    for name in ("live", "home/.ssh", "home/work", "outside"):
        (found.folder / name).mkdir(parents=True)
    (found.folder / "home/.ssh/id").write_text("secret")
    (found.folder / "home/.netrc").write_text("secret")
    (found.folder / "home/work/file").write_text("hello\n")
    (found.folder / "home/link").symlink_to("/etc/shadow")
    found.own()
    return found


def home(someone: Someone, *, read_only: bool = False) -> ShareSpec:
    """Share the home as a plan does."""
    private = someone.folder / "private"
    covers = (
        Cover(".ssh", str(private / ".ssh"), directory=True, read_only=False),
        Cover(".netrc", str(private / ".netrc"), directory=False, read_only=True),
    )
    return ShareSpec("share0", str(someone.folder / "home"), "/home/x", read_only, None, covers)


def served(processes: list[Process] | str) -> list[Path]:
    """Say where the servers' root directories are to be seen."""
    assert isinstance(processes, list), processes
    return [Path(f"/proc/{process.pid}/root") for process in processes]


def test_what_is_hidden_is_not_there(someone: Someone) -> None:
    with someone.serving(home(someone)) as processes:
        (root,) = served(processes)
        assert sorted(os.listdir(root)) == [".netrc", ".ssh", "link", "work"]
        assert os.listdir(root / ".ssh") == []
        assert (root / ".netrc").read_text() == ""
        assert (root / "work/file").read_text() == "hello\n"
        # What the machine puts there is its own, and its user's.
        (root / ".ssh/known_hosts").write_text("one\n")
        assert (someone.folder / "private/.ssh").stat().st_uid == someone.uid
    assert os.listdir(someone.folder / "home/.ssh") == ["id"]
    assert os.listdir(someone.folder / "private/.ssh") == ["known_hosts"]


def test_nothing_else_of_the_host_is_in_its_namespace(someone: Someone) -> None:
    with someone.serving(home(someone)) as processes:
        assert isinstance(processes, list)
        # All mounts are seen from the namespace's own root only, through a descriptor from before the daemon's chroot.
        (process,) = processes
        script = "cut -d' ' -f5 /proc/self/mountinfo"
        argv = ["nsenter", "-t", str(process.pid), "-m", "--", "sh", "-c", script]
        targets = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10).stdout.split()
        tops = {target.split("/")[1] for target in targets if target != "/"}
        system = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "nix", "gnu", "etc", "proc", "dev"}
        assert tops <= {*system, "share"}
        assert len(tops) > 4
        namespaces = ["mnt", "net"] + (["user"] if someone.user else [])
        for name in namespaces:
            assert os.stat(f"/proc/{process.pid}/ns/{name}").st_ino != os.stat(f"/proc/self/ns/{name}").st_ino


def test_it_has_few_rights(someone: Someone) -> None:
    with someone.serving(home(someone)) as processes:
        assert isinstance(processes, list)
        lines = Path(f"/proc/{processes[0].pid}/status").read_text().splitlines()
        status = dict(cast("tuple[str, str]", tuple(line.split(":\t", 1))) for line in lines if ":\t" in line)
        # chown, dac_override, fowner, fsetid, setgid, setuid: to act as whoever asks in the guest. No more.
        assert int(status["CapEff"], 16) & ~0xDB == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_read_only_is_read_only(someone: Someone) -> None:
    with someone.serving(home(someone, read_only=True)) as processes:
        (root,) = served(processes)
        with pytest.raises(OSError, match="Read-only file system"):
            (root / "work/file").write_text("changed")
        (root / ".ssh/own").write_text("the machine's own stays its own")


def test_one_file(someone: Someone) -> None:
    spec = ShareSpec("share0", str(someone.folder / "home/work/file"), "/etc/hello", read_only=False, file="hello")
    with someone.serving(spec) as processes:
        (root,) = served(processes)
        assert os.listdir(root) == ["hello"]
        (root / "hello").write_text("changed\n")
        with pytest.raises(OSError, match="Read-only file system"):
            (root / "other").write_text("a guest must not fill the host's memory")
    assert (someone.folder / "home/work/file").read_text() == "changed\n"


def test_inner_mount_is_held_by_the_outer_server(someone: Someone) -> None:
    outside = someone.folder / "outside"
    (outside / "file").write_text("outside\n")
    spec = ShareSpec(
        "share0", str(someone.folder / "home"), "/home/x", read_only=False,
        covers=(Cover("work", str(outside), directory=True, read_only=True),),
    )  # fmt: skip
    with someone.serving(spec) as processes:
        (root,) = served(processes)
        assert (root / "work/file").read_text() == "outside\n"
        with pytest.raises(OSError, match="Read-only file system"):
            (root / "work/file").unlink()


def test_many_files_can_be_open(someone: Someone) -> None:
    with someone.serving(home(someone)) as processes:
        assert isinstance(processes, list)
        limits = Path(f"/proc/{processes[0].pid}/limits").read_text()
        soft, hard = next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3:5]
        assert soft == hard


def test_several_end_with_their_sockets(someone: Someone) -> None:
    work = ShareSpec("share1", str(someone.folder / "home/work"), "/work", read_only=True)
    with someone.serving(home(someone), work) as processes:
        assert [sorted(os.listdir(root)) for root in served(processes)] == [
            [".netrc", ".ssh", "link", "work"], ["file"],
        ]  # fmt: skip
    # `serving` has seen them go.


def test_folder_that_is_gone_is_named_and_nothing_is_left(someone: Someone) -> None:
    gone = ShareSpec("share1", str(someone.folder / "gone"), "/gone", read_only=False)
    with someone.serving(home(someone), gone) as said:
        assert said == f"{someone.folder}/gone can't be shared with the machine: No such file or directory"
    mark = str(someone.folder)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            assert b"virtiofsd" not in command or mark not in (folder / "mountinfo").read_text()


def test_cover_whose_place_has_become_something_else_is_refused(someone: Someone) -> None:
    spec = home(someone)
    (someone.folder / "home/.netrc").unlink()
    (someone.folder / "home/.netrc").mkdir()
    with someone.serving(spec) as said:
        assert said == ".netrc, which must be hidden, has just been replaced"


def test_killed_launcher_leaves_nothing(someone: Someone) -> None:
    with someone.serving(home(someone)) as processes:
        assert isinstance(processes, list)
        stat = Path(f"/proc/{processes[0].pid}/stat").read_text().rpartition(")")[2].split()
        launcher = int(stat[1])  # it lives still, so it is the parent
        assert Path(f"/proc/{launcher}/cmdline").read_bytes().count(b"start_shares")
        os.kill(launcher, signal.SIGKILL)
        assert processes[0].wait_gone(_GONE_S)


def _process(document: object) -> Process:
    found = Process.from_json(document)
    assert found is not None
    return found
