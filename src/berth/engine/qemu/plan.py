"""How QEMU is started for one VM: `qemu_command` makes its argv, `kernel_command_line` the guest kernel's.

`reader_command` is for the VM of our own that reads what a machine has changed on its disk (`changes`).

Pure: nothing is started or looked at here; `launch` gathers the descriptors and calls it. QEMU is given no path of the
host's but its own firmware's. docs/devices.md has the device list with the measurements behind the choices.

Source: qemu-system-x86_64(1) of QEMU 7.2 to 10.0; no option that one of them calls deprecated.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from berth.units import MIB

Arch = Literal["amd64", "arm64"]
Accel = Literal["kvm", "tcg"]

_PROGRAMS = {"amd64": "qemu-system-x86_64", "arm64": "qemu-system-aarch64"}
# Four disk queues keep four vCPUs apart; more cost interrupts and memory, and the host's file is one.
_MAX_QUEUES = 4
# Translated code is thrown away whole when this is full; QEMU's default takes an eighth of the host's memory.
_TCG_CACHE_MIB = 128
# Where the devices sit on PCI bus 0, fixed: a device is at the same place at every boot, whatever else there is.
_RNG, _BALLOON, _SERIAL, _ROOT, _MODULES, _NIC = "01.0", "02.0", "03.0", "04.0", "05.0", "06.0"
_FIRST_SHARE = 0x08
_LAST_SHARE = 0x1E  # 1f is q35's own
_FUNCTIONS = 8  # of one PCI slot
# For files of the reader's: they need not reach the host's disk.
_THROWN_AWAY = "cache.direct=off,cache.no-flush=on"
MAX_SHARES = (_LAST_SHARE - _FIRST_SHARE + 1) * _FUNCTIONS


@dataclasses.dataclass(frozen=True, slots=True)
class Disk:
    """The root disk. fd: the machine's qcow2 file, read-write; backing_fd: its template, a raw file, read-only."""

    fd: int
    backing_fd: int


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """A folder of the host. fd: a socket that is connected to its server (vhost-user)."""

    tag: str
    fd: int


@dataclasses.dataclass(frozen=True, slots=True)
class UserNetwork:
    """The addresses of QEMU's own user network: subnet ``10.209.0.0/22``, its gateway, its name server."""

    subnet: str
    gateway: str
    nameserver: str


@dataclasses.dataclass(frozen=True, slots=True)
class Nic:
    """The network interface. fd: of the TAP, or the stream socket of passt; None for QEMU's own user network."""

    mac: str
    kind: Literal["tap", "stream", "user"]
    fd: int | None = None
    user: UserNetwork | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What every VM has. Descriptors are those that QEMU inherits.

    id: 12 hex digits. memory: bytes. kernel_is_pvh: the kernel is an uncompressed ELF file with a PVH entry point
    (amd64). has_qboot: QEMU has qboot.rom (it is a package of its own in places).
    """

    id: str
    arch: Arch
    host_arch: str
    accel: Accel
    cpus: int
    memory: int
    kernel_fd: int
    initrd_fd: int
    cmdline: str
    disk: Disk
    kernel_is_pvh: bool = False
    has_qboot: bool = True
    virtualization: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reader(Hardware):
    """A VM that reads the changes on a copy of a machine's disk. template_fd: the template's once more, read-only.

    output_fd: an empty file of the size that the layer may have, read-write.
    """

    template_fd: int
    output_fd: int

    @property
    def inherited_fds(self) -> tuple[int, ...]:
        """List every descriptor that QEMU must inherit."""
        disks = (self.disk.fd, self.disk.backing_fd, self.template_fd, self.output_fd)
        return (self.kernel_fd, self.initrd_fd, *disks)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Vm(Hardware):
    """All that decides how QEMU is started for a machine.

    id: of the machine's. channel_fd, console_fd, serial_fd, monitor_fd, keeper_monitor_fd: listening unix sockets.
    """

    channel_fd: int
    console_fd: int
    serial_fd: int
    monitor_fd: int
    keeper_monitor_fd: int
    modules_fd: int | None = None
    shares: tuple[Share, ...] = ()
    nic: Nic | None = None

    @property
    def inherited_fds(self) -> tuple[int, ...]:
        """List every descriptor that QEMU must inherit."""
        optional = (self.modules_fd, self.nic.fd if self.nic else None)
        return (
            self.kernel_fd, self.initrd_fd, self.disk.fd, self.disk.backing_fd,
            *(fd for fd in optional if fd is not None),
            *(share.fd for share in self.shares),
            self.channel_fd, self.console_fd, self.serial_fd, self.monitor_fd, self.keeper_monitor_fd,
        )  # fmt: skip


def qemu_program(arch: str) -> str:
    """Name the QEMU that emulates `arch`."""
    return _PROGRAMS[arch]


def kernel_command_line(arch: str, accel: str) -> str:
    """Say what the guest's kernel is told. Source: kernel, Documentation/admin-guide/kernel-parameters.txt."""
    words = [
        # The last one is /dev/console: the virtio console, which is fast; the serial port has the words before it.
        *("console=ttyAMA0" if arch == "arm64" else "console=ttyS0", "console=hvc0"),
        # Printing costs a second of the boot; warnings and panics are still printed.
        *("quiet", "loglevel=3"),
        # Reboot at once, which ends QEMU (-no-reboot): nothing waits for somebody at the console.
        "panic=-1",
        # The entropy of the first second; the virtio one follows with its driver.
        "random.trust_cpu=on",
        "cryptomgr.notests",
        # An image without udev never gets the serial port's device, and systemd waits 90 s for it.
        "systemd.getty_auto=no",
        # `quiet` would keep systemd from telling the console, which is a log here, what it starts.
        "systemd.show_status=yes",
        # There is one interface, and it is eth0.
        "net.ifnames=0",
    ]
    if arch == "amd64":
        # The host's clock has been checked by the host; its timers need no check of their wiring.
        words += ["tsc=reliable", "no_timer_check"]
    if accel == "tcg":
        # An emulated processor does not speculate.
        words += ["mitigations=off"]
    return " ".join(words)


def qemu_command(vm: Vm) -> tuple[str, ...]:
    """Say how to start QEMU for `vm`, which inherits `vm.inherited_fds`. Same VM, same argv."""
    assert len(vm.shares) <= MAX_SHARES
    return (
        *_base(vm, f"berth-{vm.id}"),
        # The host's time in UTC, going on while the VM is paused.
        "-rtc", "base=utc,clock=host",
        *_boot(vm),
        *_monitors(vm),
        *_consoles(vm),
        *_small_devices(),
        *_disks(vm),
        *_network(vm),
        *_shares(vm),
    )  # fmt: skip


def reader_command(vm: Reader) -> tuple[str, ...]:
    """Say how to start QEMU for a reader, which inherits `vm.inherited_fds`: three disks, and a console on stdout."""
    return (
        *_base(vm, f"berth-reader-{vm.id}"),
        *_boot(vm),
        "-chardev", "stdio,id=serial,signal=off",
        "-serial", "chardev:serial",
        *_file("template-file", vm.disk.backing_fd, 1, "read-only=on"),
        "-blockdev", "driver=raw,node-name=template,file=template-file,read-only=on",
        *_file("root-file", vm.disk.fd, 2, _THROWN_AWAY),
        "-blockdev", f"driver=qcow2,node-name=root,file=root-file,backing=template,{_THROWN_AWAY}",
        *_reader_disk("root", _ROOT),
        *_file("base-file", vm.template_fd, 3, "read-only=on"),
        "-blockdev", "driver=raw,node-name=base,file=base-file,read-only=on",
        *_reader_disk("base", _MODULES),
        *_file("output-file", vm.output_fd, 4, _THROWN_AWAY),
        "-blockdev", f"driver=raw,node-name=output,file=output-file,{_THROWN_AWAY}",
        *_reader_disk("output", _NIC),
    )  # fmt: skip


def _reader_disk(name: str, place: str) -> tuple[str, ...]:
    errors = ("werror=report", "rerror=report")  # it ends with what it could not do; nobody would resume it
    device = _pci("virtio-blk-pci", f"{name}0", place, f"drive={name}", f"serial={name}", "num-queues=1", *errors)
    return ("-device", device)


def _base(vm: Hardware, name: str) -> tuple[str, ...]:
    return (
        qemu_program(vm.arch),
        "-name", f"{name},debug-threads=on",
        # Nothing but what stands here: no default devices, no configuration of the host's.
        "-nodefaults",
        "-no-user-config",
        "-display", "none",
        # After its start QEMU neither runs programs nor gains rights (seccomp).
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        *_board(vm),
        # A reboot, a panic (panic=-1) and a power-off all end QEMU.
        "-no-reboot",
    )  # fmt: skip


def _board(vm: Hardware) -> tuple[str, ...]:
    size = vm.memory // MIB
    return (
        "-machine", _machine(vm),
        "-accel", _accelerator(vm),
        "-cpu", _processor(vm),
        "-smp", f"cpus={vm.cpus},sockets=1,cores={vm.cpus},threads=1",
        "-m", f"{size}M",
        # Shared, so that virtiofsd can reach the buffers; pages that the guest gives back are punched out of it.
        "-object", f"memory-backend-memfd,id=memory,size={size}M,share=on",
    )  # fmt: skip


def _machine(vm: Hardware) -> str:
    # The guest's memory goes into no core dump, and is not merged with other guests' (who could tell by the timing).
    common = "memory-backend=memory,dump-guest-core=off,mem-merge=off"
    if vm.arch == "arm64":
        virtualization = ",virtualization=on" if vm.virtualization else ""
        return f"virt,gic-version=max,{common}{virtualization}"
    # q35 without its legacy devices. microvm is no faster and hung while booting (docs/devices.md).
    return f"q35,{common},sata=off,smbus=off,usb=off,vmport=off,i8042=off,hpet=off"


def _accelerator(vm: Hardware) -> str:
    if vm.accel == "kvm":
        return "kvm"
    # One thread per vCPU, but for a guest that relies on stronger memory ordering than the host has: x86 on ARM.
    is_weaker = vm.arch == "amd64" and vm.host_arch != "amd64"
    return f"tcg,thread={'single' if is_weaker else 'multi'},tb-size={_TCG_CACHE_MIB}"


def _processor(vm: Hardware) -> str:
    model = "host" if vm.accel == "kvm" else "max"
    if vm.arch == "arm64":
        # Emulated pointer authentication takes more than half of the boot's time, and guards against nothing here.
        return model if vm.accel == "kvm" else "max,pauth=off"
    # Without them the guest's kernel copies by words, not by an instruction that TCG emulates byte for byte.
    slow = "" if vm.accel == "kvm" else ",erms=off,fsrm=off"
    # Both makers' names for it; the other's is simply not there. The guest gets it only when it was asked for.
    nested = "" if vm.virtualization else ",vmx=off,svm=off"
    return model + slow + nested


def _boot(vm: Hardware) -> tuple[str, ...]:
    # qboot only starts the kernel: 0.1 s faster than SeaBIOS, which is the fallback.
    firmware = ("-bios", "qboot.rom") if vm.arch == "amd64" and vm.kernel_is_pvh and vm.has_qboot else ()
    return (
        *firmware,
        "-kernel", f"/proc/self/fd/{vm.kernel_fd}",
        "-initrd", f"/proc/self/fd/{vm.initrd_fd}",
        "-append", vm.cmdline,
    )  # fmt: skip


def _monitors(vm: Vm) -> tuple[str, ...]:
    # One for commands and one for the keeper: a QMP monitor serves one client at a time.
    return (
        "-chardev", f"socket,id=monitor,fd={vm.monitor_fd},server=on,wait=off",
        "-mon", "chardev=monitor,mode=control",
        "-chardev", f"socket,id=keeper,fd={vm.keeper_monitor_fd},server=on,wait=off",
        "-mon", "chardev=keeper,mode=control",
    )  # fmt: skip


def _consoles(vm: Vm) -> tuple[str, ...]:
    return (
        # The kernel's words before its drivers are loaded, and its last ones in a panic.
        "-chardev", f"socket,id=serial,fd={vm.serial_fd},server=on,wait=off",
        "-serial", "chardev:serial",
        # The console proper (port 0 is kept for one) and the agent's channel.
        "-device", _pci("virtio-serial-pci", "serial0", _SERIAL, "max_ports=2"),
        "-chardev", f"socket,id=console,fd={vm.console_fd},server=on,wait=off",
        "-device", "virtconsole,bus=serial0.0,nr=0,chardev=console",
        "-chardev", f"socket,id=channel,fd={vm.channel_fd},server=on,wait=off",
        "-device", "virtserialport,id=agent,bus=serial0.0,nr=1,chardev=channel,name=berth.agent",
    )  # fmt: skip


def _small_devices() -> tuple[str, ...]:
    return (
        # Entropy from the host's getrandom(2).
        "-object", "rng-builtin,id=entropy",
        "-device", _pci("virtio-rng-pci", "rng0", _RNG, "rng=entropy"),
        # The guest hands freed pages back by itself; should it ever be inflated, it yields before the guest must kill.
        "-device", _pci("virtio-balloon-pci", "balloon0", _BALLOON, "free-page-reporting=on", "deflate-on-oom=on"),
    )  # fmt: skip


def _disks(vm: Vm) -> tuple[str, ...]:
    root = (
        *_file("template-file", vm.disk.backing_fd, 1, "read-only=on"),
        "-blockdev", "driver=raw,node-name=template,file=template-file,read-only=on",
        # Written back through the host's cache, with the guest's flushes honoured (QEMU's defaults, stated). Discarded
        # and zeroed blocks become holes.
        *_file("root-file", vm.disk.fd, 2, "cache.direct=off,cache.no-flush=off,discard=unmap"),
        "-blockdev", "driver=qcow2,node-name=root,file=root-file,backing=template,discard=unmap,detect-zeroes=unmap",
        # A full or failing disk of the host's pauses the VM, rather than losing what the guest has written.
        "-device", _pci(
            "virtio-blk-pci", "root0", _ROOT, "drive=root", "serial=root", f"num-queues={min(vm.cpus, _MAX_QUEUES)}",
            "werror=stop", "rerror=stop",
        ),
    )  # fmt: skip
    if vm.modules_fd is None:
        return root
    return (
        *root,
        # The kernel's modules: an image shared by all machines with this kernel.
        *_file("modules-file", vm.modules_fd, 3, "read-only=on"),
        "-blockdev", "driver=raw,node-name=modules,file=modules-file,read-only=on",
        "-device", _pci("virtio-blk-pci", "modules0", _MODULES, "drive=modules", "serial=modules", "num-queues=1"),
    )  # fmt: skip


def _file(node: str, fd: int, fdset: int, options: str) -> tuple[str, ...]:
    # By a set of descriptors: the file driver opens and locks as ever, but can only reach this file.
    return (
        "-add-fd", f"fd={fd},set={fdset}",
        "-blockdev", f"driver=file,node-name={node},filename=/dev/fdset/{fdset},{options}",
    )  # fmt: skip


def _network(vm: Vm) -> tuple[str, ...]:
    if vm.nic is None:
        return ()
    # No option ROM: nobody boots from the network, and the ROM's file is a package of its own.
    return (
        "-netdev", _netdev(vm.nic),
        "-device", _pci("virtio-net-pci", "net0", _NIC, "netdev=net", f"mac={vm.nic.mac}", "mrg_rxbuf=on", "romfile="),
    )  # fmt: skip


def _netdev(nic: Nic) -> str:
    match nic:
        case Nic(kind="tap", fd=int(fd)):
            # vhost would need a device of the host's more; it can be added where that can be opened.
            return f"tap,id=net,fd={fd},vhost=off"
        case Nic(kind="stream", fd=int(fd)):
            return f"stream,id=net,server=off,addr.type=fd,addr.str={fd}"
        case Nic(kind="user", user=UserNetwork(subnet, gateway, nameserver)):
            return f"user,id=net,ipv6=off,net={subnet},host={gateway},dns={nameserver}"
        case _:
            raise TypeError(f"not a network interface: {nic!r}")


def _shares(vm: Vm) -> tuple[str, ...]:
    words: list[str] = []
    for number, share in enumerate(vm.shares):
        slot, function = divmod(number, _FUNCTIONS)
        # Eight to a PCI slot, of which there are few.
        place = f"{_FIRST_SHARE + slot:02x}.{function}"
        words += _share(share, f"share{number}", place)
    return tuple(words)


def _share(share: Share, node: str, place: str) -> tuple[str, ...]:
    # Whether it is read-only is virtiofsd's to hold. The device has no old interface to switch off.
    device = f"vhost-user-fs-pci,id={node}-device,addr={place},multifunction=on"
    return (
        "-chardev", f"socket,id={node},fd={share.fd}",
        "-device", f"{device},chardev={node},tag={share.tag},queue-size=1024",
    )  # fmt: skip


def _pci(driver: str, node: str, place: str, *options: str) -> str:
    # Modern virtio only: the old interface costs I/O ports, of which there are few.
    return ",".join((driver, f"id={node}", f"addr={place}", "disable-legacy=on", *options))
