"""Checks of what lets an ordinary user have many ids: subordinate ranges and the program that maps them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from berth.check.model import Check, Place, Probe
from berth.check.packages import install_command
from berth.errors import UnsupportedError
from berth.proc import find_program
from berth.userns import plan_idmap, range_command

_AFFECTS = "without it an ordinary user's machines do not run; root's do"


def check_subuid(place: Place) -> Check:
    """Look for this user's ranges in /etc/subuid and /etc/subgid."""
    if place.is_root:
        return Check("subuid", "ok", None, "root needs no subordinate ids", _AFFECTS, None)
    try:
        idmap = plan_idmap(place.uid, place.gid)
    except UnsupportedError as error:
        fix = place.as_root(range_command(place.user))
        return Check("subuid", "missing", None, error.message, _AFFECTS, fix, required=True)
    first, size = idmap.host_root(), sum(extent.size for extent in idmap.uids)
    return Check("subuid", "ok", None, f"{size} ids from {first} on", _AFFECTS, None, required=True)


def check_newuidmap(place: Place) -> Check:
    """Look for newuidmap and newgidmap, and whether they may do what they are for."""
    if place.is_root:
        return Check("newuidmap", "ok", None, "root does without", _AFFECTS, None)
    for program in ("newuidmap", "newgidmap"):
        path = find_program(program)
        if path is None:
            fix = install_command("newuidmap", place)
            return Check("newuidmap", "missing", None, f"{program} is not installed", _AFFECTS, fix, required=True)
        if not _may_map(path):
            detail = f"{path} is neither setuid root nor has capabilities"
            return Check(
                "newuidmap", "missing", None, detail, _AFFECTS, place.as_root(f"chmod u+s {path}"), required=True
            )
    return Check("newuidmap", "ok", None, "newuidmap and newgidmap may write id maps", _AFFECTS, None, required=True)


def _may_map(path: Path) -> bool:
    """Say whether the program is setuid root, or has file capabilities (Fedora's way)."""
    facts = path.stat()
    if facts.st_mode & stat.S_ISUID and facts.st_uid == 0:
        return True
    try:
        return bool(os.getxattr(path, "security.capability"))
    except OSError:
        return False


PROBES: tuple[Probe, ...] = (check_subuid, check_newuidmap)
