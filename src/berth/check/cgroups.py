"""Checks of the control groups: can a machine's systemd have one, and which limits will hold in it?"""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

from berth.check.model import Check, Place, Probe

_LIMITS = {"cpu": "--cpus", "memory": "--memory", "pids": "the number of processes"}
_DEADLINE_S = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Mounts:
    """Where the control groups are mounted: version 2, and each controller of version 1."""

    unified: Path | None
    legacy: dict[str, Path]

    @property
    def layout(self) -> str:
        """Name what is there: `v2`, `hybrid` (both), `v1` or `none`."""
        if self.unified and self.legacy:
            return "hybrid"
        return "v2" if self.unified else "v1" if self.legacy else "none"


@dataclasses.dataclass(frozen=True, slots=True)
class Groups:
    """What this user has of them. own: our directory of version 2; writable: it is delegated to us."""

    mounts: Mounts
    own: Path | None
    writable: bool
    manager: bool
    controllers: frozenset[str]


def parse_mounts(mountinfo: str) -> Mounts:
    """Read /proc/self/mountinfo. Source: proc(5): after the dash come type, source and super options."""
    unified: Path | None = None
    legacy: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        left, dash, right = line.partition(" - ")
        words, kind = left.split(), right.split()
        if not dash or len(words) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            unified = unified or Path(words[4])
        elif kind[0] == "cgroup":
            legacy |= {option: Path(words[4]) for option in kind[2].split(",") if option in _LIMITS}
    return Mounts(unified, legacy)


def parse_own(cgroup: str) -> str | None:
    """Find our path of version 2 in /proc/self/cgroup. Source: cgroups(7): its line starts with ``0::``."""
    return next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), None)


def look(place: Place) -> Groups:
    """See which control groups this user has."""
    mounts = parse_mounts(Path("/proc/self/mountinfo").read_text())
    path = parse_own(Path("/proc/self/cgroup").read_text())
    own = mounts.unified / path.lstrip("/") if mounts.unified and path is not None else None
    writable = own is not None and all(os.access(own / name, os.W_OK) for name in (".", "cgroup.procs"))
    manager = is_manager_reachable(place)
    return Groups(mounts, own, writable, manager, _controllers(place, mounts, own, manager=manager))


def is_manager_reachable(place: Place) -> bool:
    """Say whether the systemd that would make a scope for this user answers."""
    runtime = Path("/run") if place.is_root else Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{place.uid}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_DEADLINE_S)
        try:
            sock.connect(os.fsencode(runtime / "systemd/private"))
        except OSError:
            return False
    return True


def _controllers(place: Place, mounts: Mounts, own: Path | None, *, manager: bool) -> frozenset[str]:
    if mounts.unified is None or mounts.layout == "hybrid":
        # The kernel gives a controller to one version only; an ordinary user has no say in version 1.
        return frozenset(mounts.legacy) if place.is_root else frozenset[str]()
    folder = own
    if place.is_root:
        folder = mounts.unified
    elif manager:
        folder = mounts.unified / f"user.slice/user-{place.uid}.slice/user@{place.uid}.service"
    try:
        words = (folder / "cgroup.controllers").read_text().split() if folder else []
    except OSError:
        words = []
    return frozenset(words) & frozenset(_LIMITS)


def check_cgroups(place: Place) -> Check:
    """Say which control groups there are and whether a machine can have one of its own."""
    groups = look(place)
    layout = groups.mounts.layout
    affects = "without a delegated cgroup v2 no machine with systemd boots; busybox init, OpenRC and sysvinit do"
    if place.is_root and groups.mounts.unified:
        return Check("cgroups", "ok", layout, f"mounted at {groups.mounts.unified}", affects, None)
    if groups.manager and layout == "v2":
        return Check("cgroups", "ok", layout, "systemd delegates one to each machine", affects, None)
    if groups.writable:
        return Check("cgroups", "ok", layout, f"{groups.own} is delegated to {place.user}", affects, None)
    return Check("cgroups", "missing", layout, _why_not(place, groups), affects, _fix(place, groups))


def _why_not(place: Place, groups: Groups) -> str:
    if groups.mounts.unified is None:
        return "cgroup v2 is not mounted: boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line"
    return f"none is delegated to {place.user}, and no systemd of the user's answers"


def _fix(place: Place, groups: Groups) -> str | None:
    if groups.mounts.layout == "v1":
        return None
    if Path("/run/systemd/system").is_dir():
        # su and sudo give no session, so no systemd of the user's.
        return place.as_root(f"loginctl enable-linger {place.user}")
    if groups.mounts.unified is None or place.is_root:
        return None
    # Until the next boot, and for this shell and what it starts.
    script = (
        f"d={groups.mounts.unified}/berth-{place.user}; mkdir -p $d && cd $d && "
        f"chown {place.uid} . cgroup.procs cgroup.threads cgroup.subtree_control && echo $1 > cgroup.procs"
    )
    return f"sudo sh -c '{script}' sh $$"


def check_limits(place: Place) -> Check:
    """Say which of a machine's limits the kernel will hold."""
    groups = look(place)
    held = [text for controller, text in _LIMITS.items() if controller in groups.controllers]
    lost = [text for controller, text in _LIMITS.items() if controller not in groups.controllers]
    affects = "machines run without it, but may take all of the host"
    if not lost:
        return Check("limits", "ok", None, f"{', '.join(held)} are enforced", affects, None)
    detail = f"not enforced: {', '.join(lost)}" + (f"; enforced: {', '.join(held)}" if held else "")
    fix = _delegate(place) if groups.manager else None
    return Check("limits", "warning", None, detail, affects, fix, optional=fix is None)


def _delegate(place: Place) -> str | None:
    if place.is_root:
        return None
    drop_in = "/etc/systemd/system/user@.service.d/berth.conf"
    return (
        f"sudo mkdir -p {os.path.dirname(drop_in)} && printf '[Service]\\nDelegate=cpu memory pids io\\n' "
        f"| sudo tee {drop_in} && sudo systemctl daemon-reload  # then log in again"
    )


PROBES: tuple[Probe, ...] = (check_cgroups, check_limits)
