"""The plan that `plan` makes and `launch` carries out: plain JSON data, for it crosses to another process.

Apart from both, so that the launcher, which is on the way of every boot, imports none of what makes plans.
"""

from __future__ import annotations

from typing import TypedDict

# overlayfs over overlayfs makes container engines fall back to something slow: these get a plain file system.
PLAIN = ("/var/lib/docker", "/var/lib/containers")


class Bind(TypedDict):
    """One folder or file of the host in the machine. idmapped: its ids go through the machine's map."""

    source: str
    target: str
    directory: bool
    read_only: bool
    idmapped: bool


class LaunchPlan(TypedDict):
    """Everything that `launch.launch` needs. Paths are the host's, `target`s the machine's."""

    id: str
    data: str  # every path of overlay is relative to it: commas and colons in a home's name stay harmless
    overlay: str
    own: list[str]  # the machine's own folders, which are its root's
    rootfs: str
    run: dict[str, str]  # /run/berth/NAME in the machine: text
    agent: str
    binds: list[Bind]
    cgroup_directory: str | None
    cgroup_v1: list[str]
    cgroup_writes: list[list[str]]
    holder: int | None
    root: int  # the machine's root, as the launching process sees it after it entered `holder`
    idmap: list[list[list[int]]]
    spec: dict[str, object]
    bundle: str
    crun_state: str
    console_socket: str
