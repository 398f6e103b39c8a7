"""What both engines need: which folders of the host a machine sees, and what must be covered in them. Layer 3.

Plans only: the host's file system is read (what exists, where links lead), nothing is changed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from berth.credentials import Hidden, View, plan_hidden
from berth.engine.base import Machine


class Shared(NamedTuple):
    """A folder (or one file) of the host in the machine. source: on the host; target: in the machine."""

    source: str
    target: str
    directory: bool
    read_only: bool


def plan_shared(machine: Machine) -> list[Shared]:
    """Say what of the host the machine sees: the home, then every mount; an outer folder comes before an inner one."""
    user, boot = machine.config.user, machine.boot
    shared: list[Shared] = []
    if boot.home_mount != "none":
        shared.append(_shared(user.home, user.home, read_only=boot.home_mount == "ro"))
    # Outer folders first: an inner one must not be covered by them.
    return shared + [
        _shared(mount.source, mount.destination, read_only=mount.read_only)
        for mount in sorted(boot.mounts, key=lambda mount: mount.destination)
    ]


def plan_covers(machine: Machine, shared: Sequence[Shared]) -> list[Hidden]:
    """Say which paths in those folders the machine must not see: credentials, and berth's own directories."""
    views = [View(os.path.realpath(one.source), one.target) for one in shared if one.directory]
    layout = machine.bundle.layout
    own = [str(path) for path in (layout.data, layout.cache, layout.config, layout.runtime)]
    return plan_hidden(machine.config.user.home, views, machine.boot.expose, own)


def cover_path(private: Path, hidden: Hidden) -> Path:
    """Say what of the machine's own stands where something is hidden. private: the bundle's folder for it."""
    return private / hidden.relative.replace("/", "%")


def _shared(source: str, target: str, *, read_only: bool) -> Shared:
    return Shared(source, target, os.path.isdir(source), read_only)
