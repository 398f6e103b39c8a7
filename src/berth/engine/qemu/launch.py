"""Start one VM: gather what QEMU inherits, start the keeper, the folder servers and QEMU itself. Called by `engine`.

QEMU gets every file and socket as an open descriptor and needs no path of the host's. For root it runs as an id that
owns nothing. All that is started here outlives the berth command. `changes` starts a QEMU of its own
with the public parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from berth import host, userns
from berth.agentbinary import find_agent
from berth.engine import running
from berth.engine.base import Machine
from berth.engine.qemu import disks, shares
from berth.engine.qemu.accel import Accelerator
from berth.engine.qemu.plan import Arch, Disk, Share, Vm, kernel_command_line, qemu_command
from berth.engine.qemu.wiring import Wire, wired
from berth.engine.running import Process, boot_document, listening
from berth.errors import BerthError
from berth.kernels.initramfs import check_cpio, document_cpio, make_initramfs
from berth.kernels.model import Kernel
from berth.layout import Layout
from berth.proc import spawn

# The sockets that QEMU listens on, in the machine's runtime directory.
_SOCKETS = ("channel", "console", "serial", "monitor", "keeper-monitor")
_FIRMWARE = ("/usr/share/qemu", "/usr/share/qboot", "/usr/local/share/qemu")


@dataclasses.dataclass(frozen=True, slots=True)
class Launched:
    """A VM that has been started. servers: of folders, by their place in it. notes: what it lacks, in words.

    bridged: it hangs on the bridge of all machines, by a TAP that QEMU holds. offline: why it has no internet.
    """

    process: Process
    bridged: bool
    servers: tuple[tuple[str, Process], ...]
    notes: tuple[str, ...]
    offline: str | None


def launch(machine: Machine, kernel: Kernel, accelerator: Accelerator, layout: Layout) -> Launched:
    """Start the machine's processes; nothing is left open in its boot configuration.

    Raises BerthError; then only the keeper may be left, which ends by itself.
    """
    with contextlib.ExitStack() as kept, contextlib.ExitStack() as undo:
        live = layout.live(machine.config.name)
        sockets = {name: kept.enter_context(listening(live / f"{name}.sock", keep=True)) for name in _SOCKETS}
        agent_socket = kept.enter_context(listening(layout.agent_socket(machine.config.name), keep=True))
        wire = kept.enter_context(wired(machine, live))
        servers = shares.start_shares(shares.plan_shares(machine), live, machine.bundle.vm_private)
        for server in servers:
            kept.callback(server.socket.close)
            undo.callback(server.process.kill, 1.0)
        owner = qemu_owner()
        clean = disks.was_clean(machine.bundle)
        disk = kept.enter_context(disks.opened_disk(machine.bundle, owner=owner))
        document = _document(machine, kernel, servers, wire, check=not clean)
        initrd = kept.enter_context(initial_ramfs(kernel, layout, document, check=not clean))
        vm = Vm(
            id=machine.config.id[:12],
            arch=arch_of(kernel),
            host_arch=host.architecture(),
            accel=accelerator.kind,
            cpus=_known(machine.boot.cpus),
            memory=_known(machine.boot.memory),
            virtualization=machine.boot.virtualization,
            kernel_fd=kept.enter_context(opened(kernel.vmlinux or kernel.image)),
            kernel_is_pvh=kernel.vmlinux is not None,
            has_qboot=has_qboot(),
            initrd_fd=initrd,
            cmdline=kernel_command_line(kernel.arch, accelerator.kind),
            disk=Disk(disk.disk, disk.template),
            modules_fd=None if kernel.modules_disk is None else kept.enter_context(opened(kernel.modules_disk)),
            shares=tuple(Share(server.spec.tag, server.socket.fileno()) for server in servers),
            nic=wire.nic,
            channel_fd=sockets["channel"].fileno(),
            console_fd=sockets["console"].fileno(),
            serial_fd=sockets["serial"].fileno(),
            monitor_fd=sockets["monitor"].fileno(),
            keeper_monitor_fd=sockets["keeper-monitor"].fileno(),
        )
        start_keeper(machine, layout, agent_socket, boot=True)
        disks.mark_running(machine.bundle)
        process = _start_qemu(vm, live, owner, accelerator)
        undo.pop_all()
    found = tuple((server.spec.target, server.process) for server in servers)
    return Launched(process, wire.nic.kind == "tap", found, wire.notes, wire.offline)


def start_keeper(machine: Machine, layout: Layout, agent_socket: socket.socket, *, boot: bool) -> None:
    """Start the keeper: it carries the clients of the agent's socket, the console's words and what QEMU tells.

    boot: the machine is being started, not only its keeper.
    """
    fd = agent_socket.fileno()
    words = ["--vm", "--agent-fd", str(fd), "--disk-dir", str(machine.bundle.vm), *([] if boot else ["--again"])]
    running.start_keeper(machine, find_agent(layout), words, pass_fds=[fd])


def qemu_owner() -> int | None:
    """Return the id that root's QEMU runs as: one that belongs to nobody. None for an ordinary user's, who it is."""
    return userns.ROOT_BASE if os.geteuid() == 0 else None


def _start_qemu(vm: Vm, live: Path, owner: int | None, accelerator: Accelerator) -> Process:
    argv = list(qemu_command(vm))
    if owner is not None:
        argv = [*as_nobody(owner, accelerator), *argv]
    log = os.open(live / "qemu.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(log, "wb", closefd=False) as said:
            started = spawn(argv, stdout=said, stderr=said, pass_fds=vm.inherited_fds, new_session=True)
    finally:
        os.close(log)
    started.returncode = 0  # it outlives us
    process = Process.of(started.pid)
    if process is None:
        raise BerthError("QEMU ended at once", hint=f"what it said is in {live / 'qemu.log'}")
    return process


def as_nobody(owner: int, accelerator: Accelerator) -> list[str]:
    """Say how to start root's QEMU, whose argv follows, without any rights."""
    groups = [str(os.stat("/dev/kvm").st_gid)] if accelerator.kind == "kvm" else []
    return [
        "setpriv", f"--reuid={owner}", f"--regid={owner}",
        f"--groups={','.join(groups)}" if groups else "--clear-groups",
        "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--",
    ]  # fmt: skip


def _known(value: int | None) -> int:
    assert value is not None, "VmEngine.settle leaves nothing open"
    return value


def has_qboot() -> bool:
    return any(os.path.exists(f"{folder}/qboot.rom") for folder in _FIRMWARE)


def arch_of(kernel: Kernel) -> Arch:
    return "arm64" if kernel.arch == "arm64" else "amd64"


def _document(
    machine: Machine, kernel: Kernel, servers: Sequence[shares.Server], wire: Wire, *, check: bool
) -> dict[str, object]:
    """Say what the agent needs to bring the VM up. Source: docs/protocol.md, "The boot document"."""
    address = machine.address
    vm = {
        "root": "root",
        "modules": None if kernel.modules_disk is None else "modules",
        "check": check,
        "mounts": [server.spec.to_document() for server in servers],
        "network": {
            "mac": address.mac, "ip": address.ip, "prefix": address.prefix, "gateway": address.gateway,
        },
        "unixNanos": time.time_ns(),
    }  # fmt: skip
    return {**boot_document(machine, nameserver_text=wire.resolv_conf, init=machine.config.init), "vm": vm}


@contextlib.contextmanager
def initial_ramfs(kernel: Kernel, layout: Layout, document: Mapping[str, object], *, check: bool) -> Generator[int]:
    """Put the initial RAM file system together in a file without a name: the stored one and what is this boot's."""
    agent = find_agent(layout, kernel.arch)
    fd = os.memfd_create("initrd", os.MFD_CLOEXEC)
    try:
        with opened(make_initramfs(layout, kernel, agent)) as stored:
            while os.sendfile(fd, stored, None, 1 << 24):  # from where each stands to the end
                pass
        if check and kernel.e2fsck is not None:
            os.write(fd, check_cpio(kernel.e2fsck))
        os.write(fd, document_cpio(document))
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(path: Path) -> Generator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
