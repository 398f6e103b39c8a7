"""What is known about one machine at one moment: the value behind `ls`, `inspect` and the Python API.

Owns the stable JSON keys (documented in docs/cli.md). Layer 2; lifecycle fills it, `cli` shows it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from berth.config import HostUser, Mount
from berth.names import MachineName

Status = Literal["stopped", "starting", "running", "stopping", "broken"]


@dataclasses.dataclass(frozen=True, slots=True)
class MachineInfo:
    """One machine. Sizes in bytes, times RFC 3339 UTC; None: not known, not set or not running.

    address: what the host reaches it by (``ipAddress``). ports: TCP ports that listen in it and are forwarded.
    problems: why it is broken, or what is wrong with it though it runs. limits: what is not limited, and why.
    """

    name: MachineName
    status: Status
    isolation: str | None = None
    image_reference: str | None = None
    image_digest: str | None = None
    platform: str | None = None
    address: str | None = None
    ports: tuple[int, ...] = ()
    cpus: int | None = None
    memory: int | None = None
    disk: int | None = None
    home_mount: str | None = None
    mounts: tuple[Mount, ...] = ()
    expose: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    kernel: str | None = None
    virtualization: bool = False
    autostart: bool = False
    ssh_agent: bool = True
    user: HostUser | None = None
    created: str | None = None
    started: str | None = None
    default: bool = False
    bundle_path: str | None = None
    runtime_path: str | None = None
    console_path: str | None = None
    init_pid: int | None = None
    vmm_pid: int | None = None
    keeper_pid: int | None = None
    problems: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the document that `inspect` prints and `ls --format json` lists; its keys are stable."""
        return {
            "id": self.name,
            "name": self.name,
            "image": {"reference": self.image_reference, "digest": self.image_digest},
            "status": self.status,
            "default": self.default,
            "isolation": self.isolation,
            "platform": self.platform,
            "ipAddress": self.address,
            "ports": list(self.ports),
            "cpus": self.cpus,
            "memory": self.memory,
            "disk": self.disk,
            "homeMount": self.home_mount,
            "mounts": [mount.to_json() for mount in self.mounts],
            "expose": list(self.expose),
            "env": list(self.env),
            "kernel": self.kernel,
            "virtualization": self.virtualization,
            "autostart": self.autostart,
            "sshAgent": self.ssh_agent,
            "user": self.user.to_json() if self.user else None,
            "createdDate": self.created,
            "startedDate": self.started,
            "paths": {"bundle": self.bundle_path, "runtime": self.runtime_path, "console": self.console_path},
            "pids": {"init": self.init_pid, "vmm": self.vmm_pid, "keeper": self.keeper_pid},
            "problems": list(self.problems),
            "limits": list(self.limits),
        }
