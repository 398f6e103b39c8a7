"""Berth and its peers by one interface: how each makes, starts, enters and stops a machine. Used by measures.

All run the same Debian root file system with systemd as init, on a bridge of their own where they can. A method returns
the steps to be timed; nothing is started before `Watch` gets them. What a peer does not have raises NotOffered.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Literal, Protocol

from bench.stopwatch import process_memory
from bench.watch import PLAIN, Files, Memory, Step, Watch, memory_from_json
from bench.worlds import BRIDGE, Installed
from berth import proc
from berth.layout import Layout
from berth.names import parse_machine_name
from berth.net import record

# Peers have no wait for the init: look for systemd's private socket, then ask it. `degraded` has settled, too.
SETTLED = "until [ -S /run/systemd/private ]; do sleep 0.01; done; systemctl is-system-running --wait || true"
SETUP_S = 300.0

Isolation = Literal["container", "vm"]


class NotOffered(Exception):  # noqa: N818 (it is an answer)
    """This contender has no such thing; the message says why, where that is not plain."""


class Contender(Protocol):
    """One way to have Linux machines, in one place (`watch`). `setup` stores the root file system, once."""

    name: str
    command: str  # what `run` runs, for people
    note: str  # how it differs from the others
    watch: Watch

    def setup(self, tar: Path) -> None: ...
    def create(self, machine: str) -> list[Step]: ...
    def launch(self, machine: str) -> list[Step]:
        """Create and start."""
        ...

    def start(self, machine: str) -> list[Step]: ...
    def run(self, machine: str, *words: str, files: Files = PLAIN) -> list[Step]: ...
    def settle(self, machine: str) -> list[Step]: ...
    def stop(self, machine: str) -> list[Step]: ...
    def remove(self, machine: str) -> list[Step]: ...
    def memory(self, machine: str) -> list[Memory]:
        """What stays on the host for this machine alone."""
        ...

    def shared_memory(self) -> list[Memory]:
        """What stays on the host once, however many machines there are."""
        ...

    def storage(self) -> Path:
        """Where machines' own files lie."""
        ...


class Berth:
    name = "berth"
    command = "berth run"
    note = ""
    memory_size = "1G"  # of a VM

    def __init__(
        self, watch: Watch, installed: Installed, layout: Layout, shared: Path, isolation: Isolation = "container"
    ) -> None:
        self.watch = watch
        self.isolation: Isolation = isolation
        self.cpus = min(2, os.cpu_count() or 1)
        self._berth = str(installed.berth)
        self._layout = layout
        self._shared = shared
        self._image = "bench:latest"

    def setup(self, tar: Path) -> None:
        stored = self.watch.output(self._berth, "image", "ls", "--quiet")
        if self._image not in stored:
            self.watch.output(self._berth, "image", "import", str(tar), self._image, deadline_s=SETUP_S)
        if self.isolation == "container":
            self.setup_first()

    def setup_first(self) -> None:
        """Make and remove a machine: the first has the image unpacked; the numbers are of those after it."""
        self.watch.time(*self.launch("first"), *self.settle("first"), *self.remove("first"), deadline_s=SETUP_S)

    def create(self, machine: str) -> list[Step]:
        return [self._step("create", self._image, "--name", machine, "--no-boot", *self._sizes())]

    def launch(self, machine: str, *, mount: str | None = None, memory: str | None = None) -> list[Step]:
        return [self._step("create", self._image, "--name", machine, *self._sizes(mount, memory))]

    def _sizes(self, mount: str | None = None, memory: str | None = None) -> list[str]:
        words = ["--isolation", self.isolation, "--mount", mount or f"{self._shared}:/bench:ro"]
        vm = ["--cpus", str(self.cpus), "--memory", memory or self.memory_size]
        return [*words, *(vm if self.isolation == "vm" else [])]

    def start(self, machine: str) -> list[Step]:
        return [self._step("start", machine)]

    def run(self, machine: str, *words: str, files: Files = PLAIN) -> list[Step]:
        return [Step((self._berth, "run", "-n", machine, "--", *words), files)]

    def run_as_root(self, machine: str, *words: str) -> list[Step]:
        return [self._step("run", "--root", "-n", machine, "--", *words)]

    def settle(self, machine: str) -> list[Step]:
        patience = "30" if self.isolation == "container" else "250"
        return [self._step("wait", machine, "--for", "init", "--timeout", patience)]

    def stop(self, machine: str) -> list[Step]:
        return [self._step("stop", machine)]

    def remove(self, machine: str) -> list[Step]:
        return [self._step("rm", "--force", machine)]

    def memory(self, machine: str) -> list[Memory]:
        return [self._process(machine, "keeper")]

    def vmm_memory(self, machine: str) -> Memory:
        return self._process(machine, "vmm")

    def _process(self, machine: str, which: str) -> Memory:
        found = json.loads(self.watch.output(self._berth, "inspect", machine))
        return _seen_by_us(int(found["pids"][which]))

    def folder_servers(self, machine: str) -> list[Memory]:
        """A VM's virtiofsd, one a folder."""
        document = json.loads((self._layout.live(parse_machine_name(machine)) / "vm.json").read_text())
        return [_seen_by_us(int(server["pid"])) for server in document["servers"]]

    def shared_memory(self) -> list[Memory]:
        """The network's processes: dnsmasq; of an ordinary user also the hub's holder and pasta."""
        hub = record.load(self._layout)
        return [_seen_by_us(process.pid) for process in (hub.holder, hub.dnsmasq, hub.pasta) if process is not None]

    def storage(self) -> Path:
        return self._layout.machines

    def _step(self, *words: str) -> Step:
        return Step((self._berth, *words))


class Podman:
    name = "podman"
    command = "podman exec"
    _limits = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=9000:9000", "--pids-limit=0")

    def __init__(self, watch: Watch, folder: Path, shared: Path, *, rootless: bool = False) -> None:
        self.watch = watch
        self._folder = folder
        self._shared = shared
        # podman's own network without root needs slirp4netns; root's is a bridge.
        network = ("--network=none",) if rootless and not _has("slirp4netns") else ()
        self.note = "rootless, without a network" if network else "rootless" if rootless else ""
        rights = network if rootless else ("--privileged",)
        self._options = (*rights, *self._limits, "--systemd=always", "-v", f"{shared}:/bench:ro")
        self._podman = (
            "podman", "--root", f"{folder}/root", "--runroot", f"{folder}/runroot", "--tmpdir", f"{folder}/tmpdir",  # noqa: S108
            "--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--events-backend", "none",
        )  # fmt: skip

    def setup(self, tar: Path) -> None:
        self.watch.output(*self._podman, "import", "--quiet", str(tar), "bench:latest", deadline_s=SETUP_S)
        self.watch.time(*self.launch("first"), *self.settle("first"), *self.remove("first"))

    def create(self, machine: str) -> list[Step]:
        return [self._step("create", "--name", machine, *self._options, "bench:latest", "/sbin/init")]

    def launch(self, machine: str) -> list[Step]:
        return [self._step("run", "--detach", "--name", machine, *self._options, "bench:latest", "/sbin/init")]

    def start(self, machine: str) -> list[Step]:
        return [self._step("start", machine)]

    def run(self, machine: str, *words: str, files: Files = PLAIN) -> list[Step]:
        interactive = [] if files == PLAIN else ["--interactive"]
        return [Step((*self._podman, "exec", *interactive, machine, *words), files)]

    def settle(self, machine: str) -> list[Step]:
        return self.run(machine, "sh", "-c", SETTLED)

    def stop(self, machine: str) -> list[Step]:
        return [self._step("stop", machine)]

    def remove(self, machine: str) -> list[Step]:
        return [self._step("rm", "--force", "--time", "0", machine)]

    def memory(self, machine: str) -> list[Memory]:
        pid = self.watch.output(*self._podman, "inspect", "--format", "{{.State.ConmonPid}}", machine).strip()
        return self.watch.memory(pid)

    def shared_memory(self) -> list[Memory]:
        pause = self._folder / "run/libpod/tmp/pause.pid"
        return self.watch.memory(pause.read_text().strip()) if pause.exists() else []

    def storage(self) -> Path:
        return self._folder / "root"

    def _step(self, *words: str) -> Step:
        return Step((*self._podman, *words))


class Lxc:
    name = "lxc"
    command = "lxc-attach"
    note = "no user namespace"

    def __init__(self, watch: Watch, folder: Path, rootfs: Path, shared: Path) -> None:
        self.watch = watch
        self._folder = folder / "lxc"
        self._rootfs = rootfs
        self._shared = shared
        self._made = 0

    def setup(self, tar: Path) -> None:
        del tar  # unpacked already
        self._folder.mkdir(exist_ok=True)
        self.watch.time(*self.launch("first"), *self.settle("first"), *self.stop("first"))

    def create(self, machine: str) -> list[Step]:
        raise NotOffered(f"a configuration file is written for {machine}: nothing to time")

    def launch(self, machine: str) -> list[Step]:
        """Write its configuration, which is not timed; the step starts it."""
        self._made += 1
        folder = self._folder / machine
        (folder / "delta0").mkdir(parents=True)
        (folder / "config").write_text(
            f"lxc.uts.name = {machine}\nlxc.rootfs.path = overlayfs:{self._rootfs}:{folder}/delta0\n"
            f"lxc.net.0.type = veth\nlxc.net.0.link = {BRIDGE}\nlxc.net.0.flags = up\n"
            f"lxc.net.0.ipv4.address = 10.99.1.{self._made}/16\nlxc.init.cmd = /sbin/init\n"
            "lxc.apparmor.profile = unconfined\nlxc.mount.auto = proc:rw sys:rw cgroup:rw\nlxc.cap.drop =\n"
        )
        return self.start(machine)

    def start(self, machine: str) -> list[Step]:
        return [self._step("lxc-start", machine)]

    def run(self, machine: str, *words: str, files: Files = PLAIN) -> list[Step]:
        return [Step((*self._argv("lxc-attach", machine), "--", *words), files)]

    def settle(self, machine: str) -> list[Step]:
        return self.run(machine, "sh", "-c", SETTLED)

    def stop(self, machine: str) -> list[Step]:
        return [self._step("lxc-stop", machine)]

    def remove(self, machine: str) -> list[Step]:
        return [Step((*self._argv("lxc-stop", machine), "--kill"), ok=(0, 2))]  # 2: it did not run

    def memory(self, machine: str) -> list[Memory]:
        """The monitor: the parent of the container's process 1."""
        init = self.watch.output(*self._argv("lxc-info", machine), "-p", "-H").strip()
        return self.watch.memory(parent_of=init)

    def shared_memory(self) -> list[Memory]:
        return []

    def storage(self) -> Path:
        return self._folder

    def _argv(self, program: str, machine: str) -> tuple[str, ...]:
        return (program, "-P", str(self._folder), "-n", machine)

    def _step(self, program: str, machine: str) -> Step:
        return Step(self._argv(program, machine))


class Nspawn:
    name = "systemd-nspawn"
    command = "nsenter"
    note = "no user namespace, no overlay"

    def __init__(self, watch: Watch, folder: Path, rootfs: Path, shared: Path) -> None:
        self.watch = watch
        self._rootfs = rootfs
        self._shared = shared
        self._folder = folder

    def setup(self, tar: Path) -> None:
        del tar  # unpacked already
        self.watch.time(*self.launch("first"), *self.settle("first"), *self.stop("first"))

    def create(self, machine: str) -> list[Step]:
        raise NotOffered(f"{machine} would be a copied directory")

    def launch(self, machine: str) -> list[Step]:
        return self.start(machine)

    def start(self, machine: str) -> list[Step]:
        """Ready is when it has started the init: READY=1 with --notify-ready=no."""
        argv = (
            "systemd-nspawn", "--quiet", f"--directory={self._rootfs}", f"--machine={machine}", "--boot",
            f"--network-bridge={BRIDGE}", "--keep-unit", "--register=no", "--drop-capability=CAP_SYS_RESOURCE",
            "--console=pipe", "--link-journal=no",
        )  # fmt: skip
        return [Step(argv, background=machine)]

    def run(self, machine: str, *words: str, files: Files = PLAIN) -> list[Step]:
        return [Step(("nsenter", "-t", f"{{leader:{machine}}}", "-a", *words), files)]

    def settle(self, machine: str) -> list[Step]:
        return self.run(machine, "sh", "-c", SETTLED)

    def stop(self, machine: str) -> list[Step]:
        return [Step(("/bin/kill", "-s", "RTMIN+4", f"{{leader:{machine}}}")), Step(awaits=machine)]

    def remove(self, machine: str) -> list[Step]:
        kill = Step(("/bin/kill", "-s", "KILL", f"{{leader:{machine}}}"))
        return [kill, Step(awaits=machine, ok=tuple(range(-64, 256)))]

    def memory(self, machine: str) -> list[Memory]:
        return self.watch.memory(parent_of=f"{{leader:{machine}}}")

    def shared_memory(self) -> list[Memory]:
        return []

    def storage(self) -> Path:
        return self._rootfs


def disk_bytes(folder: Path) -> int:
    """Count the bytes on disk of all below `folder`."""
    total = 0
    for path, names, files in os.walk(folder):
        for name in [*names, *files]:
            status = os.lstat(os.path.join(path, name))
            if not stat.S_ISLNK(status.st_mode):
                total += status.st_blocks * 512
    return total


def _has(program: str) -> bool:
    return proc.find_program(program) is not None


def _seen_by_us(pid: int) -> Memory:
    # Berth's processes are in our own process namespace, and root may read those of an ordinary user.
    return memory_from_json(process_memory(pid))
