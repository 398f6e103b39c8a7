"""Which package has a program, on which distribution: packages.txt, read. Used by `berth.check` only."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from berth.check.model import Place
from berth.host import Host

_FILE = Path(__file__).parent.parent / "packages.txt"
_INSTALL = {
    "apt": "apt-get install",
    "dnf": "dnf install",
    "pacman": "pacman -S",
    "zypper": "zypper install",
}
# Source: os-release(5), ID and ID_LIKE, as the distributions write them.
_MANAGER = {
    "debian": "apt", "ubuntu": "apt", "fedora": "dnf", "rhel": "dnf", "centos": "dnf",
    "arch": "pacman", "suse": "zypper", "opensuse-tumbleweed": "zypper", "opensuse-leap": "zypper",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One program: what it is for (`run`, `test`, `option`), and each package manager's name for its package."""

    program: str
    use: str
    packages: dict[str, str]


@functools.cache
def rows() -> tuple[Row, ...]:
    """Read packages.txt."""
    lines = (line.split() for line in _FILE.read_text().splitlines() if line and not line.startswith("#"))
    return tuple(Row(program, use, dict(zip(_INSTALL, names, strict=True))) for program, use, *names in lines)


def package_manager(host: Host) -> str | None:
    """Say which package manager this host has: `apt`, `dnf`, `pacman`, `zypper`, None for one we do not know."""
    return next((_MANAGER[word] for word in (host.distribution, *host.like) if word in _MANAGER), None)


def install_command(program: str, place: Place) -> str | None:
    """Write the command that installs `program` here; None where we do not know one."""
    manager = package_manager(place.host)
    if manager is None:
        return None
    package = next((row.packages[manager] for row in rows() if row.program == program), "-")
    if program == "virtiofsd" and _is_virtiofsd_in_qemu(place.host):
        package = "qemu-system-common"
    return None if package == "-" else place.as_root(f"{_INSTALL[manager]} {package}")


def _is_virtiofsd_in_qemu(host: Host) -> bool:
    # Debian 13 and Ubuntu 23.04 gave it a package of its own.
    major = int(host.version.partition(".")[0]) if host.version.partition(".")[0].isdecimal() else 99
    return (host.distribution == "debian" and major < 13) or (host.distribution == "ubuntu" and major < 23)
