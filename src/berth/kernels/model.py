"""What a kernel for VMs is. Data only."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

# Words of berth's platforms; the two that there are guest agents for.
ARCHITECTURES = ("amd64", "arm64")
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~_-]{0,127}")


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that is ready to boot. All paths are files 0644 (programs 0755) in berth's own private directory.

    version: uname's release; "" when a custom image does not say. arch: `amd64` or `arm64`. image: a bzImage (amd64)
    or an uncompressed Image (arm64); for a custom vmlinux that ELF file itself. vmlinux: the uncompressed ELF file with
    a PVH entry point (amd64), which boots faster. modules: ``lib/modules/VERSION``. modules_disk: a read-only ext4
    image whose top holds ``VERSION/…``. e2fsck: a static one for the guest. source: the package and its version, or a
    path.
    """

    version: str
    arch: str
    image: Path
    vmlinux: Path | None
    modules: Path | None
    modules_disk: Path | None
    e2fsck: Path | None
    source: str


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Order versions by their numbers: 6.1.0-9 comes before 6.1.0-56, and 6.12-rc1 before 6.12.1."""
    parts = re.findall(r"\d+|[A-Za-z]+", version)
    return tuple((1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts)
