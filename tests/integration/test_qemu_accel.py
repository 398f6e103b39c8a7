"""QEMU itself: it accepts every plan, keeps one disk to one machine, and runs the probe's guest program."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from berth import host, proc
from berth.engine.qemu import accel
from berth.engine.qemu.monitor import Monitor
from berth.engine.qemu.plan import Disk, Nic, Share, Vm, qemu_command, qemu_program
from berth.engine.qemu.virtiofsd import find_virtiofsd, virtiofsd_command
from berth.errors import DeadlineError, InvalidStateError
from berth.layout import Layout
from ordinary import Ordinary
from qemuplans import CASES
from support import need

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000
_DEADLINE_S = 20.0


def need_programs(*names: str) -> None:
    missing = [name for name in names if proc.find_program(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


class Hosting:
    """Everything that a plan inherits, real, in one folder. Closed in reverse order."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack

    def file(self, name: str, flags: int = os.O_RDONLY) -> int:
        fd = os.open(self._folder / name, flags)
        self._stack.callback(os.close, fd)
        return fd

    def listening(self, name: str) -> int:
        sock = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.bind(str(self._folder / name))
        sock.listen(1)
        return sock.fileno()

    def share(self, share: Share) -> Share:
        daemon = find_virtiofsd()
        if daemon is None:
            pytest.skip("needs virtiofsd")
        need("root")
        listener = self.listening(f"{share.tag}.sock")
        argv = virtiofsd_command(daemon, shared=str(self._folder), listener=listener, read_only=False)
        self._stack.enter_context(running(argv, [listener]))
        sock = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.connect(str(self._folder / f"{share.tag}.sock"))
        return dataclasses.replace(share, fd=sock.fileno())

    def nic(self, nic: Nic | None) -> Nic | None:
        if nic is None or nic.kind == "user":
            return nic
        if nic.kind == "stream":
            ours, theirs = socket.socketpair()
            self._stack.enter_context(ours)
            return dataclasses.replace(nic, fd=self._stack.enter_context(theirs).fileno())
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR)
        except OSError as error:
            pytest.skip(f"needs /dev/net/tun: {error}")
        self._stack.callback(os.close, fd)
        name = f"btest{os.getpid()}".encode()
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name, _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        return dataclasses.replace(nic, fd=fd)

    def vm(self, case: Vm) -> Vm:
        """Give `case` real descriptors, and TCG: not every host has KVM. It does not start: any file is a kernel."""
        return dataclasses.replace(
            case, accel="tcg", virtualization=False, kernel_fd=self.file("kernel"), initrd_fd=self.file("initrd"),
            disk=Disk(self.file("disk.qcow2", os.O_RDWR), self.file("template.raw")),
            modules_fd=None if case.modules_fd is None else self.file("template.raw"),
            shares=tuple(self.share(share) for share in case.shares), nic=self.nic(case.nic),
            channel_fd=self.listening("channel"), console_fd=self.listening("console"),
            serial_fd=self.listening("serial"), monitor_fd=self.listening("monitor"),
            keeper_monitor_fd=self.listening("keeper-monitor"),
        )  # fmt: skip


@contextlib.contextmanager
def running(argv: list[str], fds: list[int], said: Path | None = None) -> Generator[int]:
    """Run a program until the block ends; it must be gone then."""
    with open(said or os.devnull, "wb") as file:
        process = proc.spawn(argv, stdout=file, stderr=file, pass_fds=fds)
    try:
        yield process.pid
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def hosting(scratch: Path) -> Generator[Hosting]:
    need_programs("qemu-img")
    (scratch / "template.raw").touch()
    os.truncate(scratch / "template.raw", 1 << 20)
    (scratch / "initrd").write_bytes(b"initrd")
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "template.raw", str(scratch / "disk.qcow2")]
    proc.run([*argv, "4M"])
    with contextlib.ExitStack() as stack:
        yield Hosting(scratch, stack)


def kernel(folder: Path, arch: str) -> None:
    """Write a kernel that is accepted and does nothing: the boot sector of a bzImage, the header of an Image."""
    head = bytearray(4096)
    if arch == "amd64":
        # Source: kernel, Documentation/arch/x86/boot.rst: setup_sects to initrd_addr_max.
        head[0x1F1] = 1
        head[0x1FE:0x200] = b"\x55\xaa"
        head[0x202:0x206] = b"HdrS"
        head[0x206:0x208] = (0x20C).to_bytes(2, "little")
        head[0x211] = 1
        head[0x22C:0x230] = (0x37FFFFFF).to_bytes(4, "little")
    else:
        # Source: kernel, Documentation/arch/arm64/booting.rst: image_size, magic.
        head[16:24] = (4096).to_bytes(8, "little")
        head[56:60] = b"ARM\x64"
    (folder / "kernel").write_bytes(head)


def monitor_of(folder: Path, said: Path, pid: int) -> Monitor:
    """Connect to QEMU, which serves the socket that is bound already once it has started; its last words if it ends."""
    end = time.monotonic() + _DEADLINE_S
    while proc.start_time(pid) is not None and time.monotonic() < end:
        with contextlib.suppress(DeadlineError, InvalidStateError):
            return Monitor(folder / "monitor", timeout_s=1.0)
    pytest.fail(said.read_text())


@pytest.mark.parametrize("case", CASES)
def test_qemu_accepts_the_plan(case: str, hosting: Hosting, scratch: Path) -> None:
    need_programs(qemu_program(CASES[case].arch))
    kernel(scratch, CASES[case].arch)
    vm = hosting.vm(CASES[case])
    said = scratch / "said"
    with running([*qemu_command(vm), "-S"], list(vm.inherited_fds), said) as pid:
        with monitor_of(scratch, said, pid) as monitor:
            assert monitor.command("query-status")["status"] == "prelaunch"
            assert monitor.command("query-balloon")["actual"] == vm.memory
            with Monitor(scratch / "keeper-monitor", timeout_s=_DEADLINE_S) as second:
                assert second.command("query-name") == {"name": f"berth-{vm.id}"}
            monitor.command("quit")
    assert said.read_text() == ""  # no warning, nothing that is deprecated


def test_a_disk_belongs_to_one_qemu(hosting: Hosting, scratch: Path) -> None:
    """The lock holds although QEMU gets the file as a descriptor: a second one is refused while the first lives."""
    need_programs(qemu_program("amd64"))
    kernel(scratch, "amd64")
    case = dataclasses.replace(CASES["amd64-kvm-root"], nic=None)
    vm = hosting.vm(case)
    said = scratch / "said"
    with running([*qemu_command(vm), "-S"], list(vm.inherited_fds), said) as pid:
        monitor_of(scratch, said, pid).close()
        for name in ("channel", "console", "serial", "monitor", "keeper-monitor"):
            (scratch / name).unlink()
        second = hosting.vm(case)
        done = proc.run(
            [*qemu_command(second), "-S"], pass_fds=second.inherited_fds, success=(1,), timeout_s=_DEADLINE_S
        )
        assert b'Failed to get "write" lock' in done.stderr


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_the_guest_program_runs_to_its_end(arch: str) -> None:
    need_programs(qemu_program(arch))
    verdict = accel.run_guest(accel.require_qemu(arch), arch, accel="tcg", deadline_s=_DEADLINE_S)
    assert verdict.works, verdict.reason


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_a_guest_program_that_counts_too_long_is_ended(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_programs(qemu_program(arch))
    monkeypatch.setattr(accel, "_AMD64_COUNT", (1 << 32) - 1)
    monkeypatch.setattr(accel, "_ARM64_COUNT", 0xFFFF << 16)
    verdict = accel.run_guest(accel.require_qemu(arch), arch, accel="tcg", deadline_s=0.8)
    assert not verdict.works
    assert "opens" in verdict.reason
    assert not children()


def children() -> list[str]:
    """List the QEMUs that this process has started and that still live."""
    mine = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in mine]
    return [name for name in names if name.startswith("qemu")]


def test_this_host(layout: Layout) -> None:
    """Whatever it is: an answer in time, with a reason, kept for the next time; and nothing left running."""
    arch = host.architecture()
    need_programs(qemu_program(arch))
    found = accel.probe(layout, arch)
    assert found.reason
    assert accel.probe(layout, arch) == found
    assert not children()
    if accel.KVM.exists() and os.access(accel.KVM, os.R_OK | os.W_OK):
        assert json.loads(layout.accelerators.read_text())["works"] == (found.kind == "kvm")


def test_an_ordinary_user_is_told_how_to_get_kvm(ordinary_user: Ordinary) -> None:
    if not accel.KVM.exists():
        pytest.skip("needs /dev/kvm")
    script = (
        "from berth import host; from berth.engine.qemu.accel import probe; from berth.layout import Layout;"
        "found = probe(Layout.from_environment(), host.architecture()); print(found.kind, found.hint)"
    )
    done = ordinary_user.run([str(ordinary_user.python), "-c", script])
    assert done.status == 0, done.stderr.decode()
    facts = accel.KVM.stat()
    if facts.st_mode & 0o006 != 0o006:
        by_group = facts.st_gid != 0 and facts.st_mode & 0o060 == 0o060
        way = f"usermod -aG {accel.KVM.group()} {ordinary_user.name}" if by_group else "chmod 0666 /dev/kvm"
        assert done.stdout.decode().startswith(f"tcg sudo {way}")
