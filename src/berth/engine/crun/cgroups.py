"""Where a container's processes are counted and limited, on every layout a host may have. Used by this engine only.

`find_placement` looks and plans, as the user, before anything starts; `Placement.enter` moves the launching process;
`remove` cleans up. Source: cgroups(7), the kernel's cgroup-v2.rst ("Delegation"), systemd's CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from berth.proc import find_program

_V2_ROOT = Path("/sys/fs/cgroup")
_DELEGATED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")
_PERIOD_US = 100_000
TASKS_MAX = 16384
_LEAVE_S = 2.0  # killed processes take a moment to leave their groups, on a busy host longer, and nothing tells of it
_V1 = ("memory", "cpu", "pids")


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """cpus: processors' worth of time; memory: bytes. None: no limit."""

    cpus: int | None
    memory: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where the container goes.

    directory: its own cgroup v2 directory, made by `enter`; None when this host lets us have none. "" inside a
    systemd scope means: below whatever cgroup we are in by then. v1: further directories of version 1 hierarchies.
    writes: (file, text) that set the limits, in order. prefix: the command that must start the launcher.
    missing: what will not be limited, in words.
    """

    directory: str | None
    v1: tuple[str, ...] = ()
    writes: tuple[tuple[str, str], ...] = ()
    prefix: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def find_placement(machine_id: str, limits: Limits) -> Placement:
    """Look at the host and say where the machine's processes can go."""
    # A name of its own for each start: what a killed launcher left belongs to the machine's root and can't be reused.
    leaf = f"{_stem(machine_id)}-{time.monotonic_ns():x}"
    if _systemd_can_scope():
        return _scope(leaf, limits)
    own = _own_directory()
    if os.geteuid() == 0 and (mounted := _v2_mount()) is not None:
        return _as_root(mounted, leaf, limits)
    if own is not None and _is_delegated(own):
        return _delegated(own / leaf, limits)
    return Placement(None, missing=("cpus, memory and processes are not limited: no cgroup is delegated to this user",))


def _stem(machine_id: str) -> str:
    return f"berth-{machine_id[:12]}"


def find_leftovers(machine_id: str) -> list[str]:
    """List the directories that earlier starts of a machine which does not run now have left, as far as we see them."""
    own, mounted = _own_directory(), _v2_mount()
    parents = [own] if own is not None else []
    if os.geteuid() == 0:
        parents += [path / "berth" for path in (mounted, *(_V2_ROOT / name for name in _V1)) if path is not None]
    return [str(path) for parent in parents for path in parent.glob(f"{_stem(machine_id)}-*")]


def _systemd_can_scope() -> bool:
    if not Path("/run/systemd/system").is_dir() or find_program("systemd-run") is None:
        return False
    bus = f"/run/user/{os.getuid()}/bus"
    return os.geteuid() == 0 or Path(bus).exists()


def _scope(leaf: str, limits: Limits) -> Placement:
    properties = ["Delegate=yes", f"TasksMax={TASKS_MAX}"]
    if limits.memory is not None:
        properties.append(f"MemoryMax={limits.memory}")
    if limits.cpus is not None:
        properties.append(f"CPUQuota={limits.cpus * 100}%")
    user = [] if os.geteuid() == 0 else ["--user"]
    _, missing = _v2_writes(Path(leaf), limits, _scope_controllers())
    prefix = ["systemd-run", *user, "--scope", "--quiet", "--collect", f"--unit={leaf}"]
    words = (*prefix, *(word for item in properties for word in ("-p", item)), "--")
    return Placement("", prefix=words, missing=_words(missing))


def _scope_controllers() -> set[str]:
    """Read which controllers systemd can give to a scope of ours."""
    uid, mounted = os.geteuid(), _v2_mount()
    manager = f"user.slice/user-{uid}.slice/user@{uid}.service" if uid else ""
    try:
        return set(((mounted or _V2_ROOT) / manager / "cgroup.controllers").read_text().split())
    except OSError:
        return set()


def _as_root(mounted: Path, leaf: str, limits: Limits) -> Placement:
    directory = mounted / "berth" / leaf
    controllers = set((mounted / "cgroup.controllers").read_text().split())
    writes, missing = _v2_writes(directory, limits, controllers)
    v1: list[str] = []
    for controller, wanted in _v1_writes(limits).items():
        mount = _V2_ROOT / controller
        if controller in controllers or not (mount / "cgroup.procs").exists():
            continue
        v1.append(str(mount / "berth" / leaf))
        writes += [(str(mount / "berth" / leaf / name), text) for name, text in wanted]
        missing = [line for line in missing if not line.startswith(controller)]
    return Placement(str(directory), tuple(v1), tuple(writes), missing=_words(missing))


def _delegated(directory: Path, limits: Limits) -> Placement:
    enabled = set((directory.parent / "cgroup.subtree_control").read_text().split())
    writes, missing = _v2_writes(directory, limits, enabled)
    return Placement(str(directory), (), tuple(writes), missing=_words(missing))


def _v2_writes(directory: Path, limits: Limits, enabled: set[str]) -> tuple[list[tuple[str, str]], list[str]]:
    wanted = {
        "memory": ("memory.max", None if limits.memory is None else str(limits.memory)),
        "cpu": ("cpu.max", None if limits.cpus is None else f"{limits.cpus * _PERIOD_US} {_PERIOD_US}"),
        "pids": ("pids.max", str(TASKS_MAX)),
    }
    writes = [(str(directory / name), text) for key, (name, text) in wanted.items() if text and key in enabled]
    missing = [key for key, (_, text) in wanted.items() if text and key not in enabled]
    return writes, missing


def _v1_writes(limits: Limits) -> dict[str, list[tuple[str, str]]]:
    memory = [] if limits.memory is None else [("memory.limit_in_bytes", str(limits.memory))]
    quota = [] if limits.cpus is None else [
        ("cpu.cfs_period_us", str(_PERIOD_US)), ("cpu.cfs_quota_us", str(limits.cpus * _PERIOD_US)),
    ]  # fmt: skip
    return {"memory": memory, "cpu": quota, "pids": [("pids.max", str(TASKS_MAX))]}


def _words(missing: Sequence[str]) -> tuple[str, ...]:
    names = {"cpu": "cpus", "memory": "memory", "pids": "the number of processes"}
    return tuple(f"{names[key]} can't be limited: the cgroup controller '{key}' is not given to us" for key in missing)


def _v2_mount() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    return None


def _own_directory() -> Path | None:
    mounted = _v2_mount()
    if mounted is None:
        return None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::/"):
            return mounted / line[4:]
    return None


def _is_delegated(directory: Path) -> bool:
    return os.access(directory, os.W_OK) and os.access(directory / "cgroup.procs", os.W_OK)


def enter(placement: Placement) -> list[str]:
    """Move this process to where the container shall run; return the directories made, the v2 one first.

    Limits are set before anything can run there, and one level above what the machine sees: where the host's cgroup2 is
    mounted without nsdelegate, its root could lift those that stand in its own top directory. Raises OSError.
    """
    if placement.directory is None:
        return []
    directory = placement.directory
    if not directory:  # we were started in a fresh scope
        scope = _own_directory()
        if scope is None:
            return []
        directory = str(scope / "payload")
    made, payload = [directory, *placement.v1], _payload(directory)
    for path in made:
        os.makedirs(path, exist_ok=True)
    for name, text in placement.writes:
        Path(name).write_text(text)
    for name in Path(directory, "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):  # the machine's own groups do without it
            Path(directory, "cgroup.subtree_control").write_text(f"+{name}")
    os.makedirs(payload, exist_ok=True)
    for path in (payload, *placement.v1):
        Path(path, "cgroup.procs").write_text(str(os.getpid()))
    return made


def _payload(directory: str) -> str:
    return os.path.join(directory, "payload")


def give(directory: str, uid: int) -> None:
    """Delegate what `enter` made in a cgroup v2 directory to `uid`, the container's root.

    Source: cgroup-v2.rst, "Model of Delegation".
    """
    payload = _payload(directory)
    os.chown(payload, uid, uid)
    for name in _DELEGATED:
        os.chown(os.path.join(payload, name), uid, uid)


def _is_removed(path: str) -> bool:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def kill_all(directories: Sequence[str]) -> None:
    """Kill every process in these cgroups and below; nobody waits for them here, `remove` does for a moment."""
    for top in directories:
        for path, _, _ in os.walk(top):
            with contextlib.suppress(OSError):
                for pid in Path(path, "cgroup.procs").read_text().split():
                    with contextlib.suppress(OSError):
                        os.kill(int(pid), signal.SIGKILL)


def remove(directories: list[str]) -> None:
    """Remove cgroup directories, from the leaves up; what stays in use, or is gone, is left as it is."""
    deadline = time.monotonic() + _LEAVE_S
    for top in directories:
        for path, _, _ in os.walk(top, topdown=False):
            while not _is_removed(path) and time.monotonic() < deadline:
                time.sleep(0.005)
        parent = os.path.dirname(top)
        if os.path.basename(parent) == "berth":
            with contextlib.suppress(OSError):
                os.rmdir(parent)
