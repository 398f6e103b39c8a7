"""Where everything lies: the only joiner of paths below the data, cache, runtime and configuration roots. Layer 1.

docs/internals.md lists every path that this module makes, and a test holds it to that.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from berth.errors import InvalidArgumentError
from berth.names import MachineName

# Source: unix(7), sun_path: 108 bytes on Linux with the final NUL, 104 on macOS.
_SUN_PATH_MAX = 103


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The roots, each overridable by BERTH_DATA_DIR, BERTH_RUNTIME_DIR, BERTH_CONFIG_DIR, BERTH_CACHE_DIR."""

    data: Path
    runtime: Path
    config: Path
    cache: Path

    @classmethod
    def from_environment(cls) -> Layout:
        """Read the roots from the environment by the XDG rules; root's are /var/lib, /run, /etc, /var/cache."""
        return cls(_root("DATA"), _root("RUNTIME"), _root("CONFIG"), _root("CACHE"))

    # The image store: an OCI image layout (image-spec, image-layout.md).
    @property
    def images(self) -> Path:
        return self.data / "images"

    # Images unpacked for the container engine, one directory per manifest digest.
    @property
    def templates(self) -> Path:
        return self.data / "templates"

    def template(self, digest: str) -> Path:
        return self.templates / digest.replace(":", "-")

    @property
    def machines(self) -> Path:
        return self.data / "machines"

    def bundle(self, name: MachineName) -> Path:
        return self.machines / name

    @property
    def default_machine(self) -> Path:
        return self.data / "default-machine"

    @property
    def addresses(self) -> Path:
        return self.data / "addresses.json"

    @property
    def machines_lock(self) -> Path:
        return self.data / "machines.lock"

    # Copies of the guest agent, where the package's own can't be executed.
    @property
    def agents(self) -> Path:
        return self.cache / "agents"

    @property
    def crun(self) -> Path:
        return self.runtime / "crun"

    @property
    def hub(self) -> Path:
        return self.runtime / "hub"

    def live(self, name: MachineName) -> Path:
        """The runtime directory of one machine: sockets and what is true only while it runs."""
        return self.runtime / "m" / name

    def agent_socket(self, name: MachineName) -> Path:
        path = self.live(name) / "agent.sock"
        if len(os.fsencode(path)) > _SUN_PATH_MAX:
            raise InvalidArgumentError(
                f"the socket path {path} is longer than {_SUN_PATH_MAX} bytes",
                hint="set BERTH_RUNTIME_DIR to a shorter directory, or choose a shorter machine name",
            )
        return path


def _root(kind: str) -> Path:
    override = os.environ.get(f"BERTH_{kind}_DIR")
    if override:
        return Path(override).absolute()
    return _system_root(kind) if os.geteuid() == 0 else _user_root(kind)


def _system_root(kind: str) -> Path:
    parents = {"DATA": "/var/lib", "RUNTIME": "/run", "CONFIG": "/etc", "CACHE": "/var/cache"}
    return Path(parents[kind]) / "berth"


def _user_root(kind: str) -> Path:
    # The XDG rules by hand: platformdirs costs 16 ms of the fast path's budget, these four lines nothing.
    home = Path(os.environ.get("HOME") or os.path.expanduser("~"))
    match kind:
        case "DATA":
            base = os.environ.get("XDG_DATA_HOME") or home / ".local/share"
        case "CONFIG":
            base = os.environ.get("XDG_CONFIG_HOME") or home / ".config"
        case "CACHE":
            base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
        case _:
            run = Path(f"/run/user/{os.getuid()}")
            base = os.environ.get("XDG_RUNTIME_DIR") or (run if run.is_dir() else "")
            return Path(base) / "berth" if base else Path(f"/tmp/berth-{os.getuid()}")  # noqa: S108 (made 0700 and checked)
    return Path(base) / "berth"
