"""Facts of this host: system, processor, kernel, distribution, the versions of its tools. Layer 1; anyone may ask.

Nothing here changes the host or decides anything; `check` judges, the engines choose. Cheap to import: the fast path
asks for the architecture.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

# Source: image-spec v1.1, config.md, "architecture": GOARCH's words.
_ARCHITECTURES = {
    "x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64", "armv7l": "arm", "armv6l": "arm",
    "i386": "386", "i686": "386", "riscv64": "riscv64", "ppc64le": "ppc64le", "s390x": "s390x",
}  # fmt: skip
_OS_RELEASE = ("/etc/os-release", "/usr/lib/os-release")
_VERSION_DEADLINE_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """What this host is.

    os: `linux` or `darwin`. architecture: `amd64`, `arm64` … kernel: (major, minor). release: uname's whole word.
    distribution: os-release's ID (`debian`), like: its ID_LIKE, name: what people call it (`Debian GNU/Linux 12`).
    container: what kind of container we run in (`docker`, `lxc`, `systemd-nspawn` …), None on real or virtual hardware.
    """

    os: str
    architecture: str
    kernel: tuple[int, int]
    release: str
    distribution: str
    like: tuple[str, ...]
    version: str
    name: str
    container: str | None

    @property
    def platform(self) -> str:
        """The platform of the images that run here without emulation: ``linux/amd64``."""
        return f"linux/{self.architecture}"


def architecture() -> str:
    """Say the processor's architecture as OCI images and Go name it; uname's own word where they have none."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


def facts() -> Host:
    """Gather what this host is (milliseconds; nothing is started)."""
    name = os.uname()
    release = os_release()
    return Host(
        os=name.sysname.lower(),
        architecture=architecture(),
        kernel=parse_kernel(name.release),
        release=name.release,
        distribution=release.get("ID", "unknown"),
        like=tuple(release.get("ID_LIKE", "").split()),
        version=release.get("VERSION_ID", ""),
        name=release.get("PRETTY_NAME", name.sysname),
        container=_container(),
    )


def parse_kernel(release: str) -> tuple[int, int]:
    """Read uname's release, ``6.1.0-18-amd64``, as (6, 1); (0, 0) when it says nothing of the kind."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def parse_os_release(text: str) -> dict[str, str]:
    """Read an os-release file. Source: os-release(5): shell-like assignments, values perhaps quoted."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and not key.startswith("#"):
            if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
                value = value[1:-1]
            values[key] = re.sub(r"\\(.)", r"\1", value)
    return values


def parse_version(text: str) -> str | None:
    """Find the version in the first line of what ``TOOL --version`` said: the first word that starts with a digit
    and has a dot, else the first that starts with a digit."""
    first = text.lstrip().partition("\n")[0]  # the licence, with a version of its own, comes further down
    words = re.findall(r"(?<![\w.])v?(\d[\w.+~]*(?:-[\w.+~]+)*)", first)
    # zstd says that it is (64-bit) before it says v1.5.4.
    best = next((word for word in words if "." in word.rstrip(".")), words[0] if words else None)
    return best.rstrip(".") if best else None


def compare_version(version: str, minimum: tuple[int, ...]) -> bool:
    """Say whether `version` (``1.8.1``, ``1.10-rc1``) is at least `minimum`."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[: len(minimum)])
    return numbers + (0,) * (len(minimum) - len(numbers)) >= minimum


def tool_version(argv: tuple[str, ...]) -> str | None:
    """Run `argv` (``("crun", "--version")``) and find the version in what it says; None where it says none.

    Raises UnsupportedError when it is not installed, DeadlineError when it hangs.
    """
    from berth import proc  # here, not above: the fast path imports this module and must not pay for subprocess

    done = proc.run(argv, timeout_s=_VERSION_DEADLINE_S, success=range(-64, 256))
    return parse_version((done.stdout + b"\n" + done.stderr).decode(errors="replace"))


def os_release() -> Mapping[str, str]:
    """Read this host's own os-release file; nothing where there is none."""
    for path in _OS_RELEASE:
        try:
            return parse_os_release(Path(path).read_text(errors="replace"))
        except OSError:
            continue
    return {}


def _container() -> str | None:
    # Source: systemd.io/CONTAINER_INTERFACE; podman-run(1) for .containerenv; docker makes .dockerenv.
    try:
        return Path("/run/systemd/container").read_text().strip() or "container"
    except OSError:
        pass
    for path, kind in (("/run/.containerenv", "podman"), ("/.dockerenv", "docker")):
        if os.path.exists(path):
            return kind
    try:
        environment = Path("/proc/1/environ").read_bytes().split(b"\0")
    except OSError:  # another user's process 1: nothing to be known
        return None
    return next((line[10:].decode(errors="replace") for line in environment if line.startswith(b"container=")), None)
