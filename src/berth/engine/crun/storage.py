"""What is done to a machine's files from outside: count, remove, read crun's notes. Plain values in and out.

Root calls it directly; for an ordinary user it runs through `berth.inside`, as root of a user namespace, because the
files belong to ids of the machine's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

from berth.engine.crun import cgroups


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


def remove_tree(path: str) -> None:
    """Remove a tree, never following a link out of it; absent is fine."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def disk_usage(path: str) -> int:
    """Count the bytes that the files of a tree take on disk, each inode once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for folder, names, files in os.walk(path):
        for name in names + files:
            try:
                status = os.lstat(os.path.join(folder, name))
            except OSError:
                continue
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512
    return total
