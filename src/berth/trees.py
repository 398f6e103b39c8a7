"""Directory trees whose files belong to a machine's ids: count, remove. Layer 1; used by lifecycle and the engines.

Root works on them directly; for an ordinary user it is done by `berth.inside`, as root of a user namespace.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from berth import userns


def delete(path: Path) -> None:
    """Remove a tree, never following a link out of it; absent is fine."""
    if not path.exists():
        return
    try:
        remove_tree(str(path))
    except PermissionError:  # a machine's ids own some of it; a namespace costs a process, and takes subordinate ids
        inside("berth.trees:remove_tree", remove_tree, {"path": str(path)})


def usage(path: Path) -> int:
    """Count the bytes that the files of a tree take on disk, each inode once."""
    return int(str(inside("berth.trees:disk_usage", disk_usage, {"path": str(path)})))


def inside(name: str, function: Callable[..., object], arguments: Mapping[str, object]) -> object:
    """Call `function`, whose full name is `name`, where a machine's files can be touched."""
    if os.geteuid() == 0:
        return function(**arguments)
    return userns.call(name, arguments, idmap=userns.plan_idmap(os.getuid(), os.getgid()))


def remove_tree(path: str) -> None:
    """`delete`, for whoever may touch the files."""
    import shutil  # every start and create imports this module, few remove a tree

    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def disk_usage(path: str) -> int:
    """`usage`, for whoever may touch the files."""
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
