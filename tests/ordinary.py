"""An ordinary user for tests that run as root: made when there is none, with a session such as a login gives.

`Ordinary.run` runs a command as that user with a clean environment, an XDG_RUNTIME_DIR, a delegated control group, and,
where root alone may open /dev/net/tun, a mount namespace in which everybody may.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import IO

from berth import locks, proc
from berth.check.cgroups import parse_mounts
from berth.layout import Layout
from berth.userns import next_free_range
from support import ROOT

# Workers of pytest-xdist have a user each, and so may a second run beside this.
NAME = os.environ.get("BERTH_TEST_USER", "berthtest") + os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
_PATH = "/usr/local/bin:/usr/bin:/bin"
_TUN = Path("/dev/net/tun")


@dataclasses.dataclass(frozen=True, slots=True)
class Ordinary:
    """The user. folder: theirs, for this session; layout: berth's roots below it; berth: the command, python: an
    interpreter that imports berth; both can be reached by this user wherever the sources lie."""

    name: str
    uid: int
    gid: int
    home: Path
    folder: Path
    layout: Layout
    berth: Path
    python: Path
    cgroup: Path | None
    namespace: int | None

    @property
    def environment(self) -> dict[str, str]:
        """All that the user's programs see, as after a login, and berth's roots in this session's folder."""
        return {
            "HOME": str(self.home), "USER": self.name, "LOGNAME": self.name, "SHELL": "/bin/bash",
            "PATH": f"{self.berth.parent}:{_PATH}", "LANG": "C.UTF-8", "TERM": "xterm",
            "XDG_RUNTIME_DIR": str(self.folder / "run"), "PYTHONPATH": str(self.berth.parent.parent / "lib"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BERTH_DATA_DIR": str(self.layout.data), "BERTH_RUNTIME_DIR": str(self.layout.runtime),
            "BERTH_CONFIG_DIR": str(self.layout.config), "BERTH_CACHE_DIR": str(self.layout.cache),
        }  # fmt: skip

    def command(
        self, argv: Sequence[str | bytes], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> list[str | bytes]:
        """Say what root has to start so that `argv` runs as this user; cwd: the home when None."""
        enter = ["nsenter", "-t", str(self.namespace), "-m", "--"] if self.namespace else []
        if self.cgroup:
            join = 'echo $$ > "$0" && exec "$@"'
            enter += ["sh", "-c", join, str(self.cgroup / "cgroup.procs")]
        ids = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--init-groups", "--"]
        values = [f"{key}={value}" for key, value in {**self.environment, **(env or {})}.items()]
        return [*enter, *ids, "env", "-i", f"--chdir={cwd or self.home}", *values, *argv]

    def run(
        self,
        argv: Sequence[str | bytes],
        *,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 120.0,
    ) -> proc.Completed:
        """Run a command as this user to its end, whatever its status; its output is captured."""
        done = subprocess.run(
            self.command(argv, env=env, cwd=cwd),
            input=input if input is not None else b"", capture_output=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        return proc.Completed(done.returncode, done.stdout, done.stderr)

    def popen(
        self,
        argv: Sequence[str | bytes],
        *,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = subprocess.PIPE,
        stderr: int | IO[bytes] | None = subprocess.PIPE,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        new_session: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a command as this user; the caller owns the process (which is `argv`'s own: all before it execs)."""
        return subprocess.Popen(
            self.command(argv, env=env, cwd=cwd), stdin=stdin, stdout=stdout, stderr=stderr,
            start_new_session=new_session,
        )  # fmt: skip


@contextlib.contextmanager
def ordinary_user(session: Path) -> Generator[Ordinary]:
    """Make the user and their session below `session`; take everything down again, and say what they left running."""
    with contextlib.ExitStack() as stack:
        entry = stack.enter_context(_account())
        folder = session / "user"
        _make_folders(folder, entry)
        installed = _install(session / "installed", entry)
        cgroup = stack.enter_context(_control_group(entry))
        namespace = stack.enter_context(_open_tun(session))
        roots = (folder / "data", folder / "run/berth", folder / "config", folder / "cache")
        layout = Layout(*roots)
        user = Ordinary(
            entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir), folder, layout,
            installed / "bin/berth", _find_python(entry), cgroup, namespace,
        )  # fmt: skip
        yield user
        _end_network(user)


def _end_network(user: Ordinary) -> None:
    """End the hub, which outlives the last machine on purpose; it refuses while a machine runs: a leak."""
    script = (
        "from berth.layout import Layout; from berth.net.network import teardown; teardown(Layout.from_environment())"
    )
    done = user.run([str(user.python), "-c", script], cwd=Path("/"))
    assert done.status == 0, f"the network of {user.name}'s machines could not be ended: {done.stderr.decode()}"


@contextlib.contextmanager
def _account() -> Generator[pwd.struct_passwd]:
    try:
        pwd.getpwnam(NAME)
        made = False
    except KeyError:
        proc.run(["useradd", "--create-home", "--shell", "/bin/bash", NAME])
        made = True
    try:
        with locks.hold(Path("/run/lock/berth-tests-users")):
            for kind in ("uid", "gid"):
                _ensure_range(kind)
        yield pwd.getpwnam(NAME)
    finally:
        if made:
            proc.run(["userdel", "--remove", NAME], success=(0, 12))  # 12: no mail spool to remove


def _ensure_range(kind: str) -> None:
    # useradd gives one where login.defs says so, which is not everywhere.
    text = Path(f"/etc/sub{kind}").read_text() if Path(f"/etc/sub{kind}").exists() else ""
    if not any(line.startswith(f"{NAME}:") for line in text.splitlines()):
        start = next_free_range(Path("/etc/subuid"), Path("/etc/subgid"))
        proc.run(["usermod", f"--add-sub{kind}s", f"{start}-{start + 65535}", NAME])


def _make_folders(folder: Path, entry: pwd.struct_passwd) -> None:
    for path in (folder, folder / "run"):
        path.mkdir(mode=0o700)
        os.chown(path, entry.pw_uid, entry.pw_gid)


def _install(target: Path, entry: pwd.struct_passwd) -> Path:
    """Copy berth to where the user can read it: the sources may lie in root's home."""
    (target / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "src/berth", target / "lib/berth", ignore=shutil.ignore_patterns("__pycache__"))
    launcher = target / "bin/berth"
    launcher.write_text(
        f"#!{_find_python(entry)} -P\nimport sys\nsys.path.insert(0, {str(target / 'lib')!r})\n"
        "from berth.cli.main import main\nsys.exit(main())\n"
    )
    launcher.chmod(0o755)
    return target


def _find_python(entry: pwd.struct_passwd) -> Path:
    """Find an interpreter that the user may execute, new enough; ours may lie in root's home."""
    names = [f"/usr/bin/python3.{minor}" for minor in range(11, 20)]
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3", *names):
        # It has to start itself: when setpriv looks for the program, it still has root's eyes.
        test = "import subprocess as s, sys; sys.exit(s.call([sys.executable, '-c', '']) or sys.version_info < (3, 11))"
        ids = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
        argv = ["setpriv", *ids, "--", path, "-c", test]
        if os.path.exists(path) and proc.run(argv, success=range(256), cwd=Path("/")).status == 0:
            return Path(path)
    raise RuntimeError(f"{entry.pw_name} can execute no Python of 3.11 or later")


@contextlib.contextmanager
def _control_group(entry: pwd.struct_passwd) -> Generator[Path | None]:
    """Delegate a control group to the user, as systemd does for a login; None where none can be made."""
    root = parse_mounts(Path("/proc/self/mountinfo").read_text()).unified
    folder = root / f"{NAME}-{os.getpid()}" if root else None
    try:
        if folder:
            folder.mkdir()
    except OSError:  # a container's, read-only
        folder = None
    if folder is None:
        yield None
        return
    try:
        for name in (".", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
            os.chown(folder / name, entry.pw_uid, entry.pw_gid)
        yield folder
    finally:
        left = _take_down(folder)
        assert not left, f"{entry.pw_name} left processes running: {left}"


def _take_down(folder: Path) -> list[str]:
    """Remove a control group with all below it; return the command lines of what still ran in it, and kill that."""
    processes = list(_wait_for_end(folder))
    left = [_command_line(pid) for pid in processes]
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        try:
            for path, _names, _files in os.walk(folder, topdown=False):
                os.rmdir(path)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return left


def _wait_for_end(folder: Path, patience_s: float = 3.0) -> list[int]:
    deadline = time.monotonic() + patience_s
    while True:
        files = folder.rglob("cgroup.procs")
        processes = [int(word) for file in files for word in file.read_text().split() if word != "0"]
        if not processes or time.monotonic() > deadline:
            return processes
        time.sleep(0.05)


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return f"process {pid}"


@contextlib.contextmanager
def _open_tun(session: Path) -> Generator[int | None]:
    """Hold a mount namespace whose /dev/net/tun everybody may open; None where everybody may anyway."""
    if not _TUN.exists() or _TUN.stat().st_mode & 0o666 == 0o666:
        yield None
        return
    folder = session / "dev"
    folder.mkdir()
    # A file system of its own for the node: the session's folder may be mounted nodev.
    script = (
        'mount -t tmpfs berth-test-dev "$0" && mknod -m 0666 "$0/tun" c 10 200 && '
        'mount --bind "$0/tun" /dev/net/tun && umount -l "$0" && echo ready && exec cat'
    )
    argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, str(folder)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        if holder.stdout.readline() != b"ready\n":
            raise RuntimeError("no mount namespace could be made for the ordinary user")
        yield holder.pid  # leaving closes cat's stdin, which ends it, and waits
