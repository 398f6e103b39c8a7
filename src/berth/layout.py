"""Where everything lies: the only joiner of paths below the data, cache, runtime and configuration roots. Layer 1.

docs/internals.md lists every path that this module makes, and a test holds it to that.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from berth import fastpath
from berth.errors import InvalidArgumentError
from berth.fastpath import SUN_PATH_MAX
from berth.names import MachineName


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
        return cls(*(Path(fastpath.root(kind)) for kind in ("DATA", "RUNTIME", "CONFIG", "CACHE")))

    # Mirrors, insecure registries, CAs: the person's own file (docs/registries.md).
    @property
    def registries(self) -> Path:
        return self.config / "registries.toml"

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

    # Images unpacked for the VM engine: ext4 file systems, one directory per manifest digest.
    @property
    def disks(self) -> Path:
        return self.data / "disks"

    def disk(self, digest: str) -> Path:
        return self.disks / digest.replace(":", "-")

    # Images being unpacked ahead, while they are pulled; nobody's template yet.
    @property
    def unpacking(self) -> Path:
        return self.data / "unpacking"

    # Kernels for VMs with their modules, one directory per version and architecture.
    @property
    def kernels(self) -> Path:
        return self.data / "kernels"

    # What buildah keeps for `berth build`: its storage, which is a cache, and one directory per build at work.
    @property
    def build(self) -> Path:
        return self.data / "build"

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
    def addresses_lock(self) -> Path:
        return self.data / "addresses.lock"

    # Held by whoever adapts an image.
    @property
    def adapt_lock(self) -> Path:
        return self.data / "adapt.lock"

    # The user's own recipes for adapting images, and those that take the place of berth's.
    @property
    def recipes(self) -> Path:
        return self.config / "recipes"

    # What was found out about images, by manifest digest.
    @property
    def inspections(self) -> Path:
        return self.cache / "inspections"

    def inspection(self, digest: str) -> Path:
        return self.inspections / f"{digest.replace(':', '-')}.json"

    @property
    def machines_lock(self) -> Path:
        return self.data / "machines.lock"

    # Copies of the guest agent, where the package's own can't be executed.
    @property
    def agents(self) -> Path:
        return self.cache / "agents"

    # Initial RAM file systems for VMs, each made of one kernel's modules and one agent.
    @property
    def initramfs(self) -> Path:
        return self.cache / "initramfs"

    # What hardware acceleration was found to do on this host, until its next boot.
    @property
    def accelerators(self) -> Path:
        return self.cache / "accelerators.json"

    @property
    def crun(self) -> Path:
        return self.runtime / "crun"

    @property
    def hub(self) -> Path:
        return self.runtime / "hub"

    # What `berth.net` keeps in the hub directory: its record, the names for dnsmasq, who hangs on the bridge.
    @property
    def hub_record(self) -> Path:
        return self.hub / "hub.json"

    @property
    def hub_hosts(self) -> Path:
        # Root's dnsmasq runs as nobody in particular, who may not enter the runtime directory.
        beside = self.runtime.with_name(f"{self.runtime.name}-hosts")
        return beside if os.geteuid() == 0 else self.hub / "hosts"

    @property
    def hub_machines(self) -> Path:
        return self.hub / "machines"

    # Beside the directory, which `berth.net.network.teardown` removes.
    @property
    def hub_lock(self) -> Path:
        return self.runtime / "hub.lock"

    def live(self, name: MachineName) -> Path:
        """The runtime directory of one machine: sockets and what is true only while it runs."""
        return self.runtime / "m" / name

    def agent_socket(self, name: MachineName) -> Path:
        path = self.live(name) / "agent.sock"
        if len(os.fsencode(path)) > SUN_PATH_MAX:
            raise InvalidArgumentError(
                f"the socket path {path} is longer than {SUN_PATH_MAX} bytes",
                hint="set BERTH_RUNTIME_DIR to a shorter directory, or choose a shorter machine name",
            )
        return path
