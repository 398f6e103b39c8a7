"""What is done to crun's notes of a container from outside: read, sweep. Plain values in and out.

Root calls it directly; for an ordinary user it runs through `berth.inside`, as root of a user namespace, because the
files belong to ids of the machine's.
"""

from __future__ import annotations

import json
from pathlib import Path

from berth.engine.crun import cgroups
from berth.trees import remove_tree


def read_container(state: str) -> object:
    """Return the process that crun's own state of a container names: ``{"pid": …, "startTime": …}``, or None."""
    try:
        status = json.loads(Path(state, "status").read_bytes())
        return {"pid": int(status["pid"]), "startTime": int(status["process-start-time"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sweep(state: str, directories: list[str]) -> None:
    """Remove crun's state of a container that has ended (if it is named), and its cgroups."""
    if state:
        remove_tree(state)
    cgroups.remove(directories)
