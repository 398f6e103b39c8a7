"""Checks of what VMs need: QEMU, KVM (by the engine's own probe), disks, folders, a kernel, nested virtualization."""

from __future__ import annotations

import dataclasses

from berth.check.model import Check, Place, Probe, Status
from berth.check.packages import install_command
from berth.check.tools import Tool, check_tool
from berth.engine.qemu import accel
from berth.engine.qemu.plan import qemu_program
from berth.engine.qemu.virtiofsd import find_virtiofsd
from berth.errors import UnsupportedError
from berth.host import compare_version
from berth.kernels.model import ARCHITECTURES
from berth.kernels.store import Kernels

_OTHERS_DO = "container machines do not need it"
_QEMU = (7, 2)  # the oldest that can be handed the network's socket (-netdev stream)
_MKE2FS = (1, 47)
_KINDS = {"rust": "the one in Rust", "c": "QEMU's own, in C"}


def check_qemu(place: Place) -> Check:
    """Look for the QEMU that runs this architecture."""
    arch = place.host.architecture
    if arch not in ARCHITECTURES:
        detail = f"there are no VMs on {arch}"
        return Check("qemu", "missing", None, detail, f"VMs; {_OTHERS_DO}", None)
    tool = Tool(qemu_program(arch), "--version", f"without it there are no VMs; {_OTHERS_DO}", _QEMU)
    return dataclasses.replace(check_tool(tool, place), name="qemu")


def check_kvm(place: Place) -> Check:
    """Have KVM run a guest program, as the engine does, whatever was found before."""
    affects = f"without it VMs are emulated in software, some ten times slower; {_OTHERS_DO}"
    try:
        found = accel.probe(place.layout, place.host.architecture, fresh=True)
    except UnsupportedError as error:
        detail = f"{accel.KVM} opens; whether guests run on it can't be tried: {error.message}"
        return Check("kvm", "warning", None, detail, affects, None)
    if found.kind == "kvm":
        return Check("kvm", "ok", None, found.reason, affects, None)
    # Opens and is of no use: nothing that could be typed here helps.
    status: Status = "missing" if found.hint else "warning"
    if found.hint and not found.hint.startswith("sudo "):
        return Check("kvm", status, None, f"{found.reason}: {found.hint}", affects, None)
    fix = found.hint and found.hint.removeprefix("sudo " if place.is_root else "")
    return Check("kvm", status, None, found.reason, affects, fix)


def check_nested_virtualization(place: Place) -> Check:
    """Look whether VMs can be given virtualization of their own."""
    name, affects = "nested-virtualization", "only machines with --virtualization need it"
    why_not = accel.why_not_nested()
    if why_not is None:
        return Check(name, "ok", None, "allowed by the kernel's module", affects, None)
    module = next((path.parts[3] for path in accel.NESTED if path.exists()), None)
    if module is None:
        return Check(name, "missing", None, why_not, affects, None, optional=True)
    file = "/etc/modprobe.d/berth-nested.conf"
    fix = f"echo 'options {module} nested=1' | {place.as_root(f'tee {file}')}  # then restart this host"
    return Check(name, "missing", None, why_not, affects, fix, optional=True)


def check_qemu_img(place: Place) -> Check:
    """Look for the program that makes and repairs the disks of VMs."""
    return check_tool(Tool("qemu-img", "--version", f"without it no VM has a disk; {_OTHERS_DO}"), place)


def check_mke2fs(place: Place) -> Check:
    """Look for the program that makes file systems for VMs, and whether it is a quick one."""
    found = check_tool(Tool("mke2fs", "-V", f"without it no VM has a disk; {_OTHERS_DO}"), place)
    if found.status == "ok" and found.version and not compare_version(found.version, _MKE2FS):
        wanted = ".".join(str(number) for number in _MKE2FS)
        return dataclasses.replace(found, detail=f"{found.detail}; {wanted} would make disks faster")
    return found


def check_virtiofsd(place: Place) -> Check:
    """Look for a virtiofsd that works, and say which of the two kinds it is."""
    affects = f"without it VMs see no folder of the host; {_OTHERS_DO}"
    found = find_virtiofsd()
    if found is None:
        fix = install_command("virtiofsd", place)
        return Check("virtiofsd", "missing", None, "not installed", affects, fix)
    return Check("virtiofsd", "ok", found.version or None, f"{found.path}, {_KINDS[found.kind]}", affects, None)


def check_vm_kernel(place: Place) -> Check:
    """Look for a stored kernel for VMs of this architecture."""
    affects = "the first VM fetches one by itself, which takes a while"
    kernel = Kernels(place.layout).find(place.host.architecture)
    if kernel is None:
        return Check(
            "vm-kernel", "missing", None, "none is stored yet", affects, "berth system kernel fetch", optional=True
        )
    return Check("vm-kernel", "ok", kernel.version or None, kernel.source, affects, None)


PROBES: tuple[Probe, ...] = (
    check_qemu,
    check_kvm,
    check_nested_virtualization,
    check_qemu_img,
    check_mke2fs,
    check_virtiofsd,
    check_vm_kernel,
)
