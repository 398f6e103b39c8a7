"""The VMs whose plans are held to golden files (unit) and shown to QEMU (integration)."""

from __future__ import annotations

from berth.engine.qemu.plan import Disk, Nic, Reader, Share, UserNetwork, Vm, kernel_command_line
from berth.units import GIB

_MAC = "02:be:0a:d1:00:02"

# A user's, with hardware virtualization: a TAP, the home and a folder.
_AMD64_KVM = Vm(
    id="0123456789ab", arch="amd64", host_arch="amd64", accel="kvm", cpus=4, memory=4 * GIB,
    kernel_fd=10, kernel_is_pvh=True, initrd_fd=11, cmdline=kernel_command_line("amd64", "kvm"),
    disk=Disk(fd=12, backing_fd=13), modules_fd=14, shares=(Share("share0", 15), Share("share1", 16)),
    nic=Nic(_MAC, "tap", 17), channel_fd=20, console_fd=21, serial_fd=22, monitor_fd=23, keeper_monitor_fd=24,
)  # fmt: skip
# A user's, emulated, without a TAP: passt.
_AMD64_TCG_USER = Vm(
    id="0123456789ab", arch="amd64", host_arch="amd64", accel="tcg", cpus=2, memory=GIB,
    kernel_fd=10, kernel_is_pvh=True, initrd_fd=11, cmdline=kernel_command_line("amd64", "tcg"),
    disk=Disk(fd=12, backing_fd=13), modules_fd=14, shares=(Share("share0", 15),),
    nic=Nic(_MAC, "stream", 17), channel_fd=20, console_fd=21, serial_fd=22, monitor_fd=23, keeper_monitor_fd=24,
)  # fmt: skip
# Root's, with a kernel of their own (a bzImage, all built in) that may run VMs itself; nothing shared.
_AMD64_KVM_ROOT = Vm(
    id="0123456789ab", arch="amd64", host_arch="amd64", accel="kvm", cpus=1, memory=GIB, virtualization=True,
    kernel_fd=10, initrd_fd=11, cmdline=kernel_command_line("amd64", "kvm"), disk=Disk(fd=12, backing_fd=13),
    nic=Nic(_MAC, "tap", 17), channel_fd=20, console_fd=21, serial_fd=22, monitor_fd=23, keeper_monitor_fd=24,
)  # fmt: skip
# Another architecture; neither TAP nor passt.
_ARM64_TCG = Vm(
    id="0123456789ab", arch="arm64", host_arch="amd64", accel="tcg", cpus=2, memory=GIB,
    kernel_fd=10, initrd_fd=11, cmdline=kernel_command_line("arm64", "tcg"),
    disk=Disk(fd=12, backing_fd=13), modules_fd=14, shares=(Share("share0", 15),),
    nic=Nic(_MAC, "user", user=UserNetwork("10.209.0.0/22", "10.209.0.1", "10.209.0.3")),
    channel_fd=20, console_fd=21, serial_fd=22, monitor_fd=23, keeper_monitor_fd=24,
)  # fmt: skip

CASES = {
    "amd64-kvm": _AMD64_KVM,
    "amd64-tcg-user": _AMD64_TCG_USER,
    "amd64-kvm-root": _AMD64_KVM_ROOT,
    "arm64-tcg": _ARM64_TCG,
}

# What reads a machine's changes.
READER = Reader(
    id="0123456789ab", arch="amd64", host_arch="amd64", accel="kvm", cpus=1, memory=GIB // 2, kernel_fd=10,
    kernel_is_pvh=True, initrd_fd=11, cmdline=kernel_command_line("amd64", "kvm"), disk=Disk(fd=12, backing_fd=13),
    template_fd=14, output_fd=15,
)  # fmt: skip
