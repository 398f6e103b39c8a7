"""What a check is, and where it is made. Used by the modules of `berth.check` only."""

from __future__ import annotations

import dataclasses
import os
import pwd
from collections.abc import Callable
from typing import Literal

from berth import host
from berth.layout import Layout

Status = Literal["ok", "warning", "missing"]


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One thing that berth needs or can use.

    name: stable, for scripts. status: `ok`; `warning`: there, but less than it should be; `missing`.
    version: the program's own word. detail: what was found. affects: what works without it. fix: what to type here, a
    whole command line, None where there is nothing to do; what follows `` # `` is for people.
    required: no container machine runs without it. optional: few miss it, so it is not told to everybody.
    """

    name: str
    status: Status
    version: str | None
    detail: str
    affects: str
    fix: str | None
    required: bool = dataclasses.field(default=False, kw_only=True)
    optional: bool = dataclasses.field(default=False, kw_only=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where the checks are made: the host, the user, the folders."""

    host: host.Host
    uid: int
    gid: int
    user: str
    layout: Layout

    @classmethod
    def here(cls, layout: Layout) -> Place:
        """Describe this process's user on this host."""
        uid = os.geteuid()
        return cls(host.facts(), uid, os.getegid(), _user_name(uid), layout)

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    def as_root(self, command: str) -> str:
        """Write `command`, one simple command, so that it runs as root when this user types it."""
        return command if self.is_root else f"sudo {command}"

    def set_sysctl(self, key: str, value: int) -> str:
        """Write the command that sets a kernel parameter now and at every boot."""
        name = key.rpartition(".")[2].replace("_", "-")
        file = f"/etc/sysctl.d/60-berth-{name}.conf"
        return f"echo '{key} = {value}' | {self.as_root(f'tee {file}')} && {self.as_root(f'sysctl -p {file}')}"


Probe = Callable[[Place], Check]


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
