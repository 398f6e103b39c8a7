"""What carries VMs here: KVM, when guest code has been seen to run on it at speed, else TCG, QEMU's emulator.

That /dev/kvm opens proves little: under other hypervisors it may open and then not run guests, or interpret them a
thousand times too slowly. So `probe` has QEMU run a tiny program of ours, under a deadline, once per boot of the host.
Called by `engine`, `available` and `berth system check`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import getpass
import grp
import os
import select
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Literal

from berth import files, host
from berth.engine.qemu.plan import qemu_program
from berth.errors import BerthError, InvalidArgumentError
from berth.host import tool_version
from berth.layout import Layout
from berth.log import log
from berth.proc import require_program, spawn

SCHEMA = 1  # of accelerators.json
KVM = Path("/dev/kvm")
# Source: kernel, Documentation/virt/kvm/api.rst: "Applications should refuse to run" with another version than 12.
_KVM_GET_API_VERSION = 0xAE00
_KVM_API = 12
# QEMU starts in 0.1 s and the program takes 0.01 s; where KVM only interprets, it takes 10 s and more.
_DEADLINE_S = 1.0
# A process inside of KVM can't be killed before the kernel leaves it.
_KILL_S = 2.0
_PACKAGES = {"amd64": "qemu-system-x86", "arm64": "qemu-system-arm"}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NESTED = (Path("/sys/module/kvm_intel/parameters/nested"), Path("/sys/module/kvm_amd/parameters/nested"))
_SIGN = b"B"  # what the program prints before it counts


@dataclasses.dataclass(frozen=True, slots=True)
class Accelerator:
    """What VMs run on. reason: why, in words. hint: what would make it KVM. nested: VMs can be given virtualization."""

    kind: Literal["kvm", "tcg"]
    reason: str
    hint: str | None = None
    nested: bool = False
    nested_reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What was found out by running the program. works: KVM is what VMs should run on."""

    works: bool
    reason: str


def probe(layout: Layout, arch: str, *, fresh: bool = False) -> Accelerator:
    """Say what carries VMs of `arch` here. At most some seconds once per boot, then some file reads.

    fresh: try again, whatever was found before. BERTH_ACCEL=kvm or tcg is believed unseen.
    Raises UnsupportedError when QEMU is not installed, InvalidArgumentError when BERTH_ACCEL says something else.
    """
    if arch != host.architecture():
        return _emulated(f"this {host.architecture()} host can only emulate {arch}")
    wanted = os.environ.get("BERTH_ACCEL", "")
    if wanted == "kvm":
        return _accelerated("BERTH_ACCEL says so")
    if wanted == "tcg":
        return _emulated("BERTH_ACCEL says so")
    if wanted:
        raise InvalidArgumentError(f"BERTH_ACCEL is '{wanted}'", hint="set it to kvm or tcg, or not at all")
    closed = _why_closed()
    if closed is not None:
        return closed
    verdict = _tried(layout, arch, fresh=fresh)
    return _accelerated(verdict.reason) if verdict.works else _emulated(verdict.reason)


def require_qemu(arch: str) -> Path:
    """Find the QEMU that runs guests of `arch`. Raises UnsupportedError, which says how to get it."""
    return require_program(qemu_program(arch), package=_PACKAGES[arch])


def _emulated(reason: str, hint: str | None = None) -> Accelerator:
    return Accelerator("tcg", reason, hint, nested=False, nested_reason="VMs are emulated in software here")


def _accelerated(reason: str) -> Accelerator:
    why_not = why_not_nested()
    return Accelerator("kvm", reason, nested=why_not is None, nested_reason=why_not or "")


def why_not_nested() -> str | None:
    """Say why KVM here can't give a VM virtualization of its own; None when it can."""
    if host.architecture() != "amd64":
        return "only x86-64 processors are known to pass it on"
    for path in NESTED:
        with contextlib.suppress(OSError):
            is_on = path.read_text().strip() in ("Y", "1")
            return None if is_on else f"the kernel's module forbids it: {path} is not Y"
    return "neither kvm_intel nor kvm_amd is loaded"


def _why_closed() -> Accelerator | None:
    """Say what stands in the way before any guest could run; None when /dev/kvm opens and speaks our version."""
    try:
        fd = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        hint = "switch on virtualization in the firmware (or nested virtualization in the hypervisor around this host)"
        return _emulated(f"there is no {KVM}", hint)
    except PermissionError:
        return _emulated(f"this user may not open {KVM}", _grant())
    except OSError as error:
        return _emulated(f"{KVM} can't be opened: {error.strerror}")
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return _emulated(f"{KVM} is not KVM: {errno.errorcode.get(error.errno or 0, error)}")
    finally:
        os.close(fd)
    return None if version == _KVM_API else _emulated(f"{KVM} speaks version {version}, not {_KVM_API}")


def _grant() -> str | None:
    if os.geteuid() == 0:  # forbidden to root too: a container's device filter
        return None
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name is known for this id
        user = str(os.geteuid())
    facts = KVM.stat()
    if facts.st_gid == 0 or facts.st_mode & 0o060 != 0o060:  # no udev has been here: no group that would help
        return f"sudo chmod 0666 {KVM}"
    return f"sudo usermod -aG {_group_name(facts.st_gid)} {user}  # then log in again"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


# What was found, kept until something that matters changes -----------------------------------------------------------


def _tried(layout: Layout, arch: str, *, fresh: bool) -> Verdict:
    program = require_qemu(arch)
    key = _key(program, arch)
    found = None if fresh else _load(layout.accelerators, key)
    if found is None:
        found = run_guest(program, arch)
        log.debug("KVM was tried: %s", found.reason)
        _save(layout.accelerators, key, found)
    return found


def _key(program: Path, arch: str) -> Mapping[str, object]:
    device, binary = KVM.stat(), program.stat()
    return {
        "boot": _BOOT_ID.read_text().strip(),
        "device": f"{device.st_rdev:x} {device.st_mode:o} {device.st_uid} {device.st_gid}",
        # The file says which QEMU it is as well as its version does, and 0.05 s sooner.
        "qemu": f"{program} {binary.st_size} {binary.st_mtime_ns}",
        "arch": arch,
    }


def _load(path: Path, key: Mapping[str, object]) -> Verdict | None:
    try:
        document = files.load_json(path, schema=SCHEMA)
    except (OSError, BerthError):  # never written, or damaged, or a newer berth's: it can be found out again
        return None
    match document:
        case {"key": known, "works": bool(works), "reason": str(reason)} if known == key:
            return Verdict(works=works, reason=reason)
        case _:
            return None


def _save(path: Path, key: Mapping[str, object], verdict: Verdict) -> None:
    try:
        files.make_private_directory(path.parent)
        files.save_json(path, {"key": dict(key), **dataclasses.asdict(verdict)}, schema=SCHEMA)
    except (OSError, BerthError) as error:  # found out anew each time, which is slow and right
        log.debug("%s can't be written: %s", path, error)


# The guest -----------------------------------------------------------------------------------------------------------


def run_guest(program: Path, arch: str, *, accel: str = "kvm", deadline_s: float = _DEADLINE_S) -> Verdict:
    """Have `program` (a QEMU) run our guest program on `accel`; judge by its words and its status."""
    # Only its own work counts below: a QEMU that comes from the disk for the first time may take a second to load.
    tool_version((str(program), "--version"))
    guest, said = os.memfd_create("guest"), os.memfd_create("said")
    try:
        os.write(guest, guest_program(arch))
        argv = guest_command(program, arch, accel, guest)
        with open(said, "r+b", closefd=False) as file:
            status, is_dead = _run_until(argv, guest, file, deadline_s)
        return _judge(arch, status, os.pread(said, 1000, 0), is_dead=is_dead)
    finally:
        os.close(guest)
        os.close(said)


def _run_until(argv: tuple[str, ...], guest: int, said: IO[bytes], deadline_s: float) -> tuple[int | None, bool]:
    """Run QEMU until it ends or the deadline; return its status (None: it was killed) and whether it is gone."""
    process = spawn(argv, stdout=said, stderr=said, pass_fds=[guest])
    end = os.pidfd_open(process.pid)
    try:
        if _is_readable(end, deadline_s):
            return process.wait(), True
        process.kill()
        is_dead = _is_readable(end, _KILL_S)
        if is_dead:
            process.wait()
        return None, is_dead
    except BaseException:
        process.kill()
        raise
    finally:
        os.close(end)


def _is_readable(fd: int, timeout_s: float) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def _judge(arch: str, status: int | None, said: bytes, *, is_dead: bool) -> Verdict:
    if status == _GOOD_STATUS[arch] and said.startswith(_SIGN):
        return Verdict(works=True, reason="KVM runs guest code")
    stuck = "" if is_dead else "; the process that tried it can't be killed"
    if status is None:
        if said.startswith(_SIGN):
            return Verdict(works=False, reason=f"{KVM} opens, but runs guest code far too slowly{stuck}")
        return Verdict(works=False, reason=f"{KVM} opens, but guest code does not run on it{stuck}")
    lines = said.removeprefix(_SIGN).decode(errors="replace").splitlines()
    why = next((line[:200] for line in lines if "error" in line), f"QEMU ended with status {status}")
    return Verdict(works=False, reason=f"{KVM} opens, but guest code does not run on it ({why})")


def guest_command(program: Path, arch: str, accel: str, guest: int) -> tuple[str, ...]:
    """Say how to run the guest program, whose image is the open file `guest`; its sign goes to stdout."""
    image = f"/proc/self/fd/{guest}"
    machine: tuple[str, ...] = (
        "-machine", "q35",
        "-bios", image,
        "-chardev", "stdio,id=sign,signal=off",
        "-device", "isa-debugcon,iobase=0xe9,chardev=sign",
        "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04",
    )  # fmt: skip
    if arch == "arm64":
        machine = (
            "-machine", "virt,gic-version=max",
            "-device", f"loader,file={image},addr={_ARM64_LOAD:#x},force-raw=on,cpu-num=0",
            "-chardev", "stdio,id=sign,signal=off",
            "-serial", "chardev:sign",
        )  # fmt: skip
    return (
        str(program),
        "-nodefaults",
        "-no-user-config",
        "-display", "none",
        "-no-reboot",
        "-accel", accel,
        "-cpu", "host" if accel == "kvm" else "max",
        "-m", "64M",
        *machine,
    )  # fmt: skip


def guest_program(arch: str) -> bytes:
    """Assemble the guest program: print the sign, count, end QEMU with `_GOOD_STATUS`."""
    return _arm64_program() if arch == "arm64" else _amd64_program()


# How often it counts: about 10 ms for a processor, and 10 s at a thousandth of its speed.
_AMD64_COUNT = 20_000_000
_ARM64_COUNT = 4 << 20  # fewer: without an MMU memory is slow, and the instruction cache is only a wish
_GOOD_STATUS = {"amd64": 0x21, "arm64": 0}
# Source: QEMU, docs/system/arm/virt.rst: RAM begins at 0x40000000, with the device tree.
_ARM64_LOAD = 0x4100_0000


def _amd64_program() -> bytes:
    """Make a firmware of 64 KiB. The processor starts it at its last 16 bytes below 4 GiB, in real mode.

    The first jump is to its copy below 1 MiB, as in every PC's firmware: some KVMs run code nowhere else this early.
    Source: Intel SDM volume 3, 10.1.4 (first instruction); volume 2 (encodings); QEMU, hw/misc/debugexit.c.
    """
    size, start, table = 0x10000, 0xFF00, 0xFF80
    base = (1 << 20) - size
    real = b"".join((
        b"\xfa",                                                     # cli
        b"\x2e\x66\x0f\x01\x16" + struct.pack("<H", table + 24),     # lgdt cs:[table + 24]
        b"\x0f\x20\xc0",                                             # mov eax, cr0
        b"\x0c\x01",                                                 # or al, 1              (protected mode)
        b"\x0f\x22\xc0",                                             # mov cr0, eax
    ))  # fmt: skip
    protected = b"".join((
        b"\x66\xb8\x10\x00\x8e\xd8\x8e\xd0",                         # mov ax, 16; mov ds, ax; mov ss, ax
        b"\xb0" + _SIGN + b"\xe6\xe9",                               # mov al, 'B'; out 0xe9, al
        b"\xb9" + struct.pack("<I", _AMD64_COUNT),                   # mov ecx, count
        b"\x49\x75\xfd",                                             # again: dec ecx; jnz again
        b"\xb0\x10\xe6\xf4",                                         # mov al, 0x10; out 0xf4, al  (status 0x21)
        b"\xf4\xeb\xfd",                                             # halt: hlt; jmp halt
    ))  # fmt: skip
    jump_size = 8
    jump = b"\x66\xea" + struct.pack("<IH", base + start + len(real) + jump_size, 8)  # jmp far 8:protected
    code = real + jump + protected
    descriptors = b"".join((
        bytes(8),                                                      # the null descriptor
        b"\xff\xff\x00\x00\x00\x9b\xcf\x00",                           # 8: code, 32 bits, 0 to 4 GiB
        b"\xff\xff\x00\x00\x00\x93\xcf\x00",                           # 16: data, likewise
        struct.pack("<HI", 23, base + table),                          # what lgdt loads: limit and base
    ))  # fmt: skip
    image = bytearray(b"\xf4" * size)
    image[start : start + len(code)] = code
    image[table : table + len(descriptors)] = descriptors
    image[0xFFF0:0xFFF5] = b"\xea" + struct.pack("<HH", start, base >> 4)  # jmp far 0xf000:start
    return bytes(image)


def _arm64_program() -> bytes:
    """Make code that runs where it is loaded, at EL1 with the MMU off.

    Source: Arm ARM (DDI 0487), C6; Arm PSCI (DEN 0022), SYSTEM_OFF; QEMU, docs/system/arm/virt.rst (the PL011).
    """
    words = (
        0xD2A12001,                              # movz x1, #0x0900, lsl 16  (the serial port, 0x09000000)
        0x52800002 | _SIGN[0] << 5,              # movz w2, #'B'
        0x39000022,                              # strb w2, [x1]
        0xD5381004,                              # mrs x4, sctlr_el1
        0xB2740084,                              # orr x4, x4, #0x1000       (the instruction cache)
        0xD5181004,                              # msr sctlr_el1, x4
        0xD5033FDF,                              # isb
        0xD2A00003 | (_ARM64_COUNT >> 16) << 5,  # movz x3, #(count >> 16), lsl 16
        0xF1000463,                              # again: subs x3, x3, #1
        0x54FFFFE1,                              # b.ne again
        0x52800100,                              # movz w0, #0x0008
        0x72B08000,                              # movk w0, #0x8400, lsl 16  (SYSTEM_OFF)
        0xD4000002,                              # hvc #0
        0x14000000,                              # b .
    )  # fmt: skip
    return struct.pack(f"<{len(words)}I", *words)
