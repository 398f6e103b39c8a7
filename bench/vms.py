"""Measure VMs: `bench/run-vms`. Boots beside the bare kernel's own, runs, bytes, folders against the root disk, memory.

Prints a Markdown table; with `--docs` writes it into docs/performance.md, between the marks of this module. Everything
is made below one folder and removed at the end. Needs root, QEMU, and an Alpine root file system as its argument.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from berth import host
from berth.engine.qemu.accel import probe
from berth.engine.qemu.plan import kernel_command_line, qemu_program
from berth.kernels.store import Kernels
from berth.layout import Layout

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
_BEGIN, _END = "<!-- bench/vms begins -->", "<!-- bench/vms ends -->"


class Bench:
    """One run: a machine, and what was measured of it."""

    def __init__(self, folder: Path, image: str, rounds: int) -> None:
        self.rows: list[tuple[str, str]] = []
        self._rounds = rounds
        self._image = image
        places = {"DATA": "data", "RUNTIME": "run", "CONFIG": "config", "CACHE": "cache"}
        roots = {f"BERTH_{kind}_DIR": str(folder / name) for kind, name in places.items()}
        self.env = {**os.environ, **roots, "BERTH_ISOLATION": "vm"}
        self.layout = Layout(*(folder / name for name in places.values()))

    def berth(self, *words: str, input: bytes | None = None) -> bytes:
        """Run a command of berth, which must succeed; return its stdout."""
        argv = [sys.executable, "-m", "berth", *words]
        return subprocess.run(argv, env=self.env, input=input or b"", stdout=subprocess.PIPE, check=True).stdout

    def inside(self, script: str) -> str:
        return self.berth("run", "-n", "m", "--root", "--", "sh", "-c", script).decode()

    def seconds(self, act: Callable[[], object], *, before: Callable[[], object] = lambda: None) -> float:
        """Return the median time of `act`, `before` each time unmeasured."""
        taken: list[float] = []
        for _ in range(self._rounds):
            before()
            started = time.monotonic()
            act()
            taken.append(time.monotonic() - started)
        return statistics.median(taken)

    def row(self, what: str, value: str) -> None:
        self.rows.append((what, value))
        sys.stdout.write(f"{what}: {value}\n")
        sys.stdout.flush()

    # What is measured ---------------------------------------------------------------------------------------------

    def boots(self) -> None:
        """Measure the kernel's own boot, then a machine's, of the same kernel on the same accelerator."""
        self.berth("create", self._image, "--name", "m")
        self.berth("stop", "m")
        bare = self.seconds(self._boot_bare_kernel)
        self.row("bare kernel: QEMU exec → first process → power off", f"{bare:.2f} s")
        cold = self.seconds(lambda: self.berth("run", "-n", "m", "true"), before=lambda: self.berth("stop", "m"))
        self.row("stopped → `run -- true` done, whole process", f"{cold:.2f} s = {cold / bare:.2f} × the bare kernel")
        settled = self.seconds(
            lambda: self.berth("wait", "m", "--for", "init"), before=lambda: self.berth("restart", "m")
        )
        self.row("agent answers → init settled", f"{settled:.2f} s")
        stop = self.seconds(lambda: self.berth("stop", "m"), before=lambda: self.berth("start", "m"))
        self.row("`stop` (busybox itself sleeps two of them)", f"{stop:.2f} s")
        make = self.seconds(
            lambda: self.berth("create", self._image, "--no-boot", "--name", "n"), before=self._no_second
        )
        disk = self.layout.machines / "n/vm"
        self.row("a second machine from the same image, `create --no-boot`", f"{make * 1000:.0f} ms")
        self.berth("start", "n")
        size = sum(path.stat().st_blocks * 512 for path in disk.iterdir() if path.is_file())
        self.row("its disk after the first boot", f"{size / MIB:.1f} MiB")
        self._no_second()
        self.berth("start", "m")

    def _no_second(self) -> None:
        subprocess.run([sys.executable, "-m", "berth", "rm", "-f", "n"], env=self.env, capture_output=True, check=False)

    def _boot_bare_kernel(self) -> None:
        """Boot the same kernel and initramfs without a document: the agent finds none and powers off."""
        arch = host.architecture()
        kernel = Kernels(self.layout).find(arch)
        assert kernel is not None
        initramfs = next(self.layout.initramfs.glob("*"))
        accel = probe(self.layout, arch).kind
        argv = [
            qemu_program(arch), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "1G",
            "-smp", "2", "-machine", f"q35,accel={accel}" if arch == "amd64" else f"virt,accel={accel}",
            "-cpu", "host" if accel == "kvm" else "max", *(["-bios", "qboot.rom"] if kernel.vmlinux else []),
            "-kernel", str(kernel.vmlinux or kernel.image), "-initrd", str(initramfs),
            "-append", kernel_command_line(arch, accel),
        ]  # fmt: skip
        subprocess.run(argv, stdin=subprocess.DEVNULL, check=True, timeout=120)

    def runs(self) -> None:
        once = self.seconds(lambda: [self.berth("run", "-n", "m", "true") for _ in range(10)]) / 10
        self.row("`run -- true` in a running machine, whole process", f"{once * 1000:.0f} ms")
        data = os.urandom(MIB) * 64
        down = self.seconds(lambda: self.berth("run", "-n", "m", "--", "sh", "-c", "cat >/dev/null", input=data))
        up = self.seconds(lambda: self.berth("run", "-n", "m", "--", "dd", "if=/dev/zero", "bs=1M", "count=64"))
        self.row("64 MiB through `run`, host → guest / guest → host", f"{64 / down:.0f} / {64 / up:.0f} MiB/s")

    def folders(self, home: Path) -> None:
        """Compare the home (virtio-fs) with the machine's own disk."""
        there = tempfile.mkdtemp(prefix="berth-bench-", dir=home)
        try:
            for name, folder in (("virtio-fs (home)", there), ("root disk", "/srv")):
                write = self._timed(f"dd if=/dev/zero of={folder}/big bs=1M count=128 && sync")
                self.inside("echo 3 > /proc/sys/vm/drop_caches")
                read = self._timed(f"dd if={folder}/big of=/dev/null bs=1M")
                make = self._timed(f"mkdir {folder}/d && cd {folder}/d && for i in $(seq 2000); do : > f$i; done")
                look = self._timed(f"ls -l {folder}/d > /dev/null")
                drop = self._timed(f"rm -r {folder}/d {folder}/big")
                self.row(f"{name}: dd write / read", f"{128 / write:.0f} / {128 / read:.0f} MiB/s")
                self.row(
                    f"{name}: 2,000 files made / listed with ls -l / removed", f"{make:.2f} / {look:.2f} / {drop:.2f} s"
                )
        finally:
            shutil.rmtree(there)

    def _timed(self, script: str) -> float:
        return self.seconds_once(lambda: self.inside(script))

    def seconds_once(self, act: Callable[[], object]) -> float:
        started = time.monotonic()
        act()
        return time.monotonic() - started

    def memory(self) -> None:
        pids = json.loads(self.berth("inspect", "m"))["pids"]
        servers = json.loads((self.layout.live("m") / "vm.json").read_text())["servers"]  # type: ignore[arg-type]
        beside = {"keeper": [pids["keeper"]], "virtiofsd": [server["pid"] for server in servers]}
        for name, found in beside.items():
            self.row(f"{name}, private memory", f"{sum(private(pid) for pid in found) / MIB:.1f} MiB")
        before = resident(pids["vmm"])
        self.inside("mount -t tmpfs -o size=1200m tmpfs /mnt && dd if=/dev/zero of=/mnt/x bs=1M count=1024 2>/dev/null")
        peak = resident(pids["vmm"])
        self.inside("umount /mnt")
        sizes = [resident(pids["vmm"]) for _ in range(20) if not time.sleep(1)]  # type: ignore[func-returns-value]
        words = " → ".join(f"{size / MIB:.0f}" for size in (before, peak, sizes[4], sizes[-1]))
        self.row("QEMU: before → 1 GiB touched → 5 s after it was freed → 20 s", f"{words} MiB")


def resident(pid: int) -> int:
    """Bytes in memory, those shared with the guest's devices counted."""
    return _field(Path(f"/proc/{pid}/status"), "VmRSS:")


def private(pid: int) -> int:
    """Bytes that would be free without the process."""
    path = Path(f"/proc/{pid}/smaps_rollup")
    return _field(path, "Private_Dirty:") + _field(path, "Private_Clean:")


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def table(bench: Bench) -> str:
    """Make the Markdown."""
    accel = probe(bench.layout, host.architecture())
    kernel = Kernels(bench.layout).find(host.architecture())
    host_facts = f"{os.cpu_count()} processors; {accel.reason}"
    release = kernel.version if kernel else "?"
    head = [
        f"VMs on {accel.kind.upper()} ({host_facts}), kernel {release}, Alpine with busybox's init, as root. Medians.",
        "",
        "| what | measured |",
        "|---|---|",
    ]
    return "\n".join([*head, *(f"| {what} | {value} |" for what, value in bench.rows)])


def write_docs(path: Path, text: str) -> None:
    """Put the table between this module's marks, at the end when there are none."""
    page = path.read_text()
    if _BEGIN not in page:
        page = f"{page.rstrip()}\n\n## VMs\n\n{_BEGIN}\n{_END}\n"
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    path.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench/run-vms", description=__doc__)
    parser.add_argument("rootfs", help="an Alpine root file system, tar.gz")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="berth-vms-", dir="/tmp"))
    bench = Bench(folder, f"rootfs:{options.rootfs}", options.rounds)
    try:
        bench.boots()
        bench.runs()
        bench.folders(Path.home())
        bench.memory()
        text = table(bench)
    finally:
        for name in ("n", "m"):
            argv = [sys.executable, "-m", "berth", "rm", "-f", name]
            subprocess.run(argv, env=bench.env, capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(f"\n{text}\n")
    if options.docs:
        write_docs(ROOT / "docs/performance.md", text)


if __name__ == "__main__":
    main(sys.argv[1:])
