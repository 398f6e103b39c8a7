"""The places where contenders live: whose environment, which namespaces, below one scratch folder. Used by __main__.

Nothing of the host is touched that is not undone here. As root, berth gets a network namespace of its own, and each
peer namespaces for its network, mounts, control groups and processes: their bridges, firewall rules, /run and
/var/lib are gone with them. An ordinary user's berth has all that in its hub anyway.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import shlex
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from bench.watch import STOPWATCH, BenchError, Watch, watching
from berth import proc
from berth.check.cgroups import parse_mounts
from ordinary import Ordinary

ROOT = Path(__file__).resolve().parent.parent
BRIDGE = "benchbr0"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# An uplink that leads nowhere, so that all that a default route makes berth do is done.
_OWN_NETWORK = (
    "ip link set lo up && ip link add uplink0 type veth peer name uplink1 && ip link set uplink1 up && "
    "ip address add 198.51.100.2/24 dev uplink0 && ip link set uplink0 up && ip route add default via 198.51.100.1"
)
# $0: a folder for what would else be written in /etc. Control groups as on a host with version 2 only, rooted here.
_PEER_PLACES = f"""
mount -t sysfs sysfs /sys && mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit
mkdir /sys/fs/cgroup/watch && echo $$ > /sys/fs/cgroup/watch/cgroup.procs || exit
for folder in /run /var/lib /var/cache; do mount -t tmpfs -o mode=755 bench $folder || exit; done
if [ -d /etc/cni ]; then cp -a /etc/cni "$0/cni" && mount --bind "$0/cni" /etc/cni || exit; fi
{_OWN_NETWORK} && ip link add {BRIDGE} type bridge && ip address add 10.99.0.1/16 dev {BRIDGE} &&
ip link set {BRIDGE} up
"""
_USER_PLACES = """
mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit
mkdir /sys/fs/cgroup/watch && chown -R "$1:$2" /sys/fs/cgroup/watch || exit
echo $$ > /sys/fs/cgroup/watch/cgroup.procs
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Installed:
    """Berth as pip installs it, in a virtual environment of its own."""

    berth: Path
    python: Path


def build_wheel(folder: Path) -> Path:
    """Build berth's wheel from these sources. Raises CommandError."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    argv = [*pip, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    proc.run(argv, timeout_s=900)
    return next(folder.glob("berth-*.whl"))


def install(wheel: Path, python: str, folder: Path) -> Installed:
    """Install the wheel into a fresh virtual environment of `python`, just as a person would."""
    proc.run([python, "-m", "venv", "--without-pip", str(folder)], timeout_s=120)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--python", f"{folder}/bin/python"]
    proc.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], timeout_s=120)
    return Installed(folder / "bin/berth", folder / "bin/python")


# What brings a program that is measured beside berth; on Debian.
_PACKAGES = {"systemd-nspawn": "systemd-container", "lxc-start": "lxc"}


def install_hint(program: str) -> str:
    return f"apt-get install {_PACKAGES.get(program, program)}"


def roots_of(folder: Path) -> dict[str, str]:
    """Berth's four roots below `folder`, as environment variables."""
    places = {"DATA": "data", "RUNTIME": "run/berth", "CONFIG": "config", "CACHE": "cache"}
    return {f"BERTH_{kind}_DIR": str(folder / name) for kind, name in places.items()}


@contextlib.contextmanager
def root_world(scratch: Path, installed: Installed) -> Generator[Watch]:
    """Berth as root, in a network namespace of its own."""
    folder = scratch / "root"
    (folder / "run").mkdir(parents=True)
    environment = {"HOME": pwd.getpwuid(0).pw_dir, "USER": "root", "LOGNAME": "root", "PATH": PATH, **roots_of(folder)}
    inner = _with_environment(environment, [str(installed.python), str(STOPWATCH)])
    argv = ["unshare", "--net", "sh", "-c", f'{_OWN_NETWORK} && exec "$@"', "sh", *inner]
    with watching(argv, log=scratch / "root.log") as watch:
        yield watch


@contextlib.contextmanager
def user_world(scratch: Path, ordinary: Ordinary, installed: Installed) -> Generator[Watch]:
    """Berth as the ordinary user, with the session that tests/ordinary.py makes."""
    stopwatch = _readable_stopwatch(scratch)
    environment = {"PYTHONPATH": "", "PATH": f"{installed.berth.parent}:/usr/local/bin:/usr/bin:/bin"}
    argv = ordinary.command([str(installed.python), str(stopwatch)], env=environment)
    with watching([os.fsdecode(word) for word in argv], log=scratch / "user.log") as watch:
        yield watch


@contextlib.contextmanager
def own_world(scratch: Path, installed: Installed) -> Generator[Watch]:
    """Berth as whoever we are (no root): our own environment with other roots."""
    (scratch / "run").mkdir()
    environment = {**os.environ, **roots_of(scratch), "PYTHONPATH": ""}
    argv = _with_environment(environment, [str(installed.python), str(STOPWATCH)])
    with watching(argv, log=scratch / "own.log") as watch:
        yield watch


@contextlib.contextmanager
def peer_world(scratch: Path, name: str) -> Generator[Watch]:
    """A peer as root."""
    folder = scratch / name
    folder.mkdir()
    environment = {"HOME": str(folder), "PATH": PATH, "TMPDIR": str(folder)}
    inner = _with_environment(environment, [sys.executable, str(STOPWATCH)])
    # Process 1 of the namespace is a shell that waits: what daemonises becomes its child, and ends with it.
    last = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", '"$@"; exit', "sh", *inner]
    script = f'{_PEER_PLACES.strip()} && exec "$@"'
    with _control_group(name) as group:
        join = f'echo $$ > {shlex.quote(str(group))}/cgroup.procs && exec "$@"'
        argv = ["sh", "-c", join, "sh", "unshare", "--cgroup", "--mount", "--net", "--propagation", "slave"]
        argv += ["sh", "-c", script, str(folder), *last]
        with watching(argv, log=scratch / f"{name}.log") as watch:
            yield watch


@contextlib.contextmanager
def user_peer_world(scratch: Path, name: str, ordinary: Ordinary) -> Generator[Watch]:
    """A peer as the ordinary user: of root's namespaces only those for control groups, mounts and processes."""
    folder = scratch / f"user-{name}"
    (folder / "run").mkdir(parents=True)
    for path in (folder, folder / "run"):
        path.chmod(0o700)
        os.chown(path, ordinary.uid, ordinary.gid)
    environment = {
        "HOME": str(folder), "USER": ordinary.name, "LOGNAME": ordinary.name, "PATH": PATH,
        "XDG_RUNTIME_DIR": str(folder / "run"), "TMPDIR": str(folder),
    }  # fmt: skip
    stopwatch = _readable_stopwatch(scratch)
    ids = ["setpriv", f"--reuid={ordinary.uid}", f"--regid={ordinary.gid}", "--init-groups", "--"]
    inner = [*ids, *_with_environment(environment, [str(ordinary.python), str(stopwatch)], cwd=str(folder))]
    last = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", '"$@"; exit', "sh", *inner]
    with _control_group(f"user-{name}", ordinary.uid, ordinary.gid) as group:
        join = f'echo $$ > {shlex.quote(str(group))}/cgroup.procs && exec "$@"'
        argv = ["sh", "-c", join, "sh", "unshare", "--cgroup", "--mount", "--propagation", "slave"]
        script = f'{_USER_PLACES.strip()} && shift 2 && exec "$@"'
        argv += ["sh", "-c", script, "sh", str(ordinary.uid), str(ordinary.gid), *last]
        with watching(argv, log=scratch / f"user-{name}.log") as watch:
            yield watch


def _with_environment(environment: dict[str, str], argv: Sequence[str], cwd: str = "/") -> list[str]:
    values = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TERM": "xterm", **environment}
    return ["env", "-i", f"--chdir={cwd}", *(f"{key}={value}" for key, value in values.items()), *argv]


def _readable_stopwatch(scratch: Path) -> Path:
    """Copy the stopwatch to where the ordinary user can read it: the sources may lie in root's home."""
    copy = scratch / STOPWATCH.name
    shutil.copyfile(STOPWATCH, copy)
    copy.chmod(0o644)
    return copy


@contextlib.contextmanager
def _control_group(name: str, uid: int = 0, gid: int = 0) -> Generator[Path]:
    """Make a control group (version 2) for a contender; end what still runs in it, and remove it with all below."""
    root = parse_mounts(Path("/proc/self/mountinfo").read_text()).unified
    if root is None:
        raise BenchError("this host has no control groups of version 2")
    group = root / f"berth-bench-{os.getpid()}-{name}"
    try:
        group.mkdir()
    except OSError as error:
        raise BenchError(f"no control group can be made: {error}") from error
    try:
        for file in (".", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
            os.chown(group / file, uid, gid)
        yield group
    finally:
        _remove_group(group)


def _remove_group(group: Path) -> None:
    with contextlib.suppress(OSError):
        (group / "cgroup.kill").write_text("1")  # only what was started in this very group
    deadline = time.monotonic() + 10
    while True:
        try:
            for path, _names, _files in os.walk(group, topdown=False):
                os.rmdir(path)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def take_down(watch: Watch, installed: Installed) -> None:
    """Remove every machine that berth has there, its images, templates and network. Raises BenchError."""
    script = (
        "from berth.layout import Layout; from berth.lifecycle import Machines; "
        "from berth.net.network import teardown; machines = Machines(); "
        "[machines.remove(info.name, force=True) for info in machines.list()]; "
        "machines.images.prune(dict, unused=True); machines.prune_templates(); teardown(Layout.from_environment())"
    )
    watch.output(str(installed.python), "-c", script, deadline_s=300)
