"""What the numbers were measured on. Used by __main__ and report."""

from __future__ import annotations

import dataclasses
import datetime
import os
from pathlib import Path

from berth import host
from berth.engine.qemu.plan import qemu_program
from berth.errors import BerthError
from berth.version import VERSION

_TOOLS = {
    "crun": ("crun", "--version"),
    "podman": ("podman", "--version"),
    "conmon": ("conmon", "--version"),
    "lxc": ("lxc-start", "--version"),
    "systemd-nspawn": ("systemd-nspawn", "--version"),
    "skopeo": ("skopeo", "--version"),
    "QEMU": (qemu_program(host.architecture()), "--version"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """command: what was typed. pythons: the interpreter that berth ran with, by person. load: 1-minute load average
    when the measuring began (our own set-up is not in it)."""

    date: str
    command: str
    berth: str
    cores: int
    processor: str
    memory_gib: float
    kernel: str
    system: str
    tools: dict[str, str]
    load: float
    pythons: dict[str, str] = dataclasses.field(default_factory=dict[str, str])


def gather(command: str) -> Facts:
    """Look at this machine."""
    found = host.facts()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Facts(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
        berth=VERSION,
        cores=len(os.sched_getaffinity(0)),
        processor=_processor(),
        memory_gib=round(pages / 2**30, 1),
        kernel=found.release,
        system=found.name,
        tools={name: version for name, argv in _TOOLS.items() if (version := _version(argv))},
        load=round(os.getloadavg()[0], 2),
    )


def _version(argv: tuple[str, ...]) -> str | None:
    try:
        return host.tool_version(argv)
    except BerthError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return host.architecture()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, host.architecture())
