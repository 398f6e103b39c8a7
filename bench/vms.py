"""What is measured of VMs only, beside the bare kernel's own boot in QEMU. Used by __main__.

`folders` and `reclaim` have no goal in numbers and take their time: they are run when asked for.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable

from bench import measures
from bench.contenders import SETUP_S, Berth
from bench.goals import YARDSTICK, Goal, Result, Unit
from bench.turns import STEADY, Place, ensure_steady, fresh_name, take_turns
from bench.watch import BenchError, Step, Watch

MIB = 1024 * 1024

# Boots the same kernel and initramfs without a document: the agent finds none and powers off. argv: cpus, memory.
_BARE = """
import json, sys
from berth import host
from berth.agentbinary import find_agent
from berth.engine.qemu.accel import probe
from berth.engine.qemu.plan import kernel_command_line, qemu_program
from berth.kernels.initramfs import make_initramfs
from berth.kernels.store import Kernels
from berth.layout import Layout
layout, arch = Layout.from_environment(), host.architecture()
accelerator, kernel = probe(layout, arch), Kernels(layout).find(arch)
machine = "q35" if arch == "amd64" else "virt"
argv = [
    qemu_program(arch), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
    "-smp", sys.argv[1], "-m", sys.argv[2], "-machine", f"{machine},accel={accelerator.kind}",
    "-cpu", "host" if accelerator.kind == "kvm" else "max", *(["-bios", "qboot.rom"] if kernel.vmlinux else []),
    "-kernel", str(kernel.vmlinux or kernel.image),
    "-initrd", str(make_initramfs(layout, kernel, find_agent(layout, arch))),
    "-append", kernel_command_line(arch, accelerator.kind),
]
print(json.dumps({"kind": accelerator.kind, "reason": accelerator.reason, "kernel": kernel.version, "argv": argv}))
"""


@dataclasses.dataclass(frozen=True, slots=True)
class BareKernel:
    """QEMU and a kernel that goes no further than its first process: what no machine can be quicker than."""

    watch: Watch
    argv: tuple[str, ...]
    kind: str
    reason: str
    release: str
    name: str = YARDSTICK


@dataclasses.dataclass(slots=True)
class VmPlace(Place):
    """A place whose only contender is berth with VMs."""

    bare: BareKernel | None = None

    @property
    def vm(self) -> Berth:
        found = self.contenders[0]
        assert isinstance(found, Berth)
        return found

    @property
    def is_emulated(self) -> bool:
        return self.bare is None or self.bare.kind == "tcg"


def find_bare_kernel(place: VmPlace) -> BareKernel:
    """Ask berth, where it is installed, how it starts QEMU here. Raises BenchError."""
    watch, sizes = place.berth.watch, (str(place.vm.cpus), place.vm.memory_size)
    said = json.loads(watch.output(str(place.installed.python), "-c", _BARE, *sizes))
    return BareKernel(watch, tuple(said["argv"]), said["kind"], said["reason"], said["kernel"])


def describe(bare: BareKernel) -> str:
    """Say what carries the VMs."""
    name = "KVM" if bare.kind == "kvm" else "TCG, QEMU's emulator"
    return f"VMs run on {name} ({bare.reason}), with the kernel {bare.release}"


# Start and stop ---------------------------------------------------------------------------------------------------

KVM_COLD = Goal(at_most=500, why={"limit": "most of it is the kernel's own boot: see *bare kernel*"})
TCG_COLD = Goal(
    times={YARDSTICK: 1.5},
    why={
        YARDSTICK: "what berth adds is a Python process, the folder servers and the keeper on the host, and in the "
        "guest, where each instruction is emulated, mounting the disk and the folders and the user's twin"
    },
)


def cold_start(place: VmPlace) -> list[Result]:
    """Stop a settled machine, then time a command in it until it is done; beside it the bare kernel's boot."""
    goal = TCG_COLD if place.is_emulated else KVM_COLD
    cold = Result("vm-cold", place.person, "stopped → `run -- true` done", "s", goal, part="vm")
    if not place.is_emulated:
        cold.unit = "ms"
    unit = 1.0 if cold.unit == "s" else 1000.0
    settled = Result("vm-cold", place.person, "from then until systemd has settled", "s", part="vm")
    stop = Result("vm-cold", place.person, "stop (the init powers off)", "s", part="vm")
    if place.bare:
        cold.extra = "bare kernel: QEMU's start, the kernel's boot, its first process, power off, QEMU's end"

    def measure(one: Berth | BareKernel) -> float:
        if isinstance(one, BareKernel):
            return one.watch.time(Step(one.argv)) * unit
        stopped = one.watch.time(*one.stop(STEADY))
        started = one.watch.time(*one.run(STEADY, "true")) * unit
        settling = one.watch.time(*one.settle(STEADY), deadline_s=SETUP_S)
        stop.samples.setdefault(one.name, []).append(stopped)
        settled.samples.setdefault(one.name, []).append(settling)
        return started

    everybody: list[Berth | BareKernel] = [place.vm] if ensure_steady(place, cold) else []
    everybody += [place.bare] if place.bare else []
    take_turns(cold, everybody, place.rounds(8, 2), measure)
    return [cold, settled, stop]


def run_command(place: VmPlace) -> list[Result]:
    goal = Goal(at_most=60, why={"limit": "in the guest the fork and the exec of a program are emulated"})
    what = "`run -- true` in a running machine, whole process"
    result = Result("vm-run", place.person, what, "ms", goal, part="vm")
    ready = ensure_steady(place, result)
    take_turns(result, ready, place.rounds(40, 10), lambda one: one.watch.time(*one.run(STEADY, "true")) * 1000)
    return [result]


def create(place: VmPlace) -> list[Result]:
    ready = Result("vm-create", place.person, "`create`, to agent ready", "s", part="vm")

    def measure(one: Berth) -> float:
        name = fresh_name("v")
        seconds = one.watch.time(*one.launch(name))
        one.watch.time(*one.remove(name))
        return seconds

    results = measures.create(place)
    take_turns(ready, [place.vm], place.rounds(5, 3, share=0.4), measure)
    return [*results, ready]


# Bytes and memory -------------------------------------------------------------------------------------------------

BULK_GOAL = Goal(
    at_least=300,
    why={"limit": "virtio-serial carries it in the guest, and `cat` and the agent are emulated, as is each copy"},
)


def bulk(place: VmPlace) -> list[Result]:
    """The same as with containers, from and to a file in the guest's memory: the folders have numbers of their own."""
    size = place.bulk_bytes
    wanted = ("sh", "-c", f"head -c {size} {place.bulk_inside} > /dev/shm/bulk")
    unmeasured = Result("vm-bulk", place.person, "", "MB/s")
    for one in ensure_steady(place, unmeasured):
        one.watch.time(*one.run(STEADY, *wanted))
    return measures.measure_bulk(place, "/dev/shm/bulk", BULK_GOAL)  # noqa: S108 (the guest's)


def memory(place: VmPlace) -> list[Result]:
    """What stays on the host beside QEMU."""
    what = "memory on the host for the supervisor of a running machine (the keeper), RSS"
    keeper = Result("vm-memory", place.person, what, "MiB", Goal(at_most=30), part="vm")
    servers = Result("vm-memory", place.person, "its folders' servers (virtiofsd) together, PSS", "MiB", part="vm")
    for one in ensure_steady(place, keeper):
        measures.add_memory(keeper, one.name, [process.rss for process in one.memory(STEADY)])
        found = place.vm.folder_servers(STEADY)
        measures.add_memory(servers, one.name, [process.pss for process in found])
        servers.extra = f"{len(found)} processes"
    return [keeper, servers]


# When asked for ---------------------------------------------------------------------------------------------------


def folders(place: VmPlace) -> list[Result]:
    """A folder of the host's (virtio-fs) beside the machine's own disk."""
    places = {"virtio-fs": "/bench-rw", "root disk": "/srv"}
    name = fresh_name("f")
    one, results = place.vm, list[Result]()

    def inside(script: str) -> float:
        return one.watch.time(*one.run_as_root(name, "sh", "-c", script))

    folder = place.shared / f"rw-{place.person}"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    one.watch.time(*one.launch(name, mount=f"{folder}:/bench-rw"), *one.settle(name))
    try:
        for kind, path in places.items():
            write = inside(f"dd if=/dev/zero of={path}/big bs=1M count=128 && sync")
            inside("echo 3 > /proc/sys/vm/drop_caches")
            read = inside(f"dd if={path}/big of=/dev/null bs=1M")
            make = inside(f"mkdir {path}/d && cd {path}/d && for i in $(seq 2000); do : > f$i; done")
            look = inside(f"ls -l {path}/d > /dev/null")
            drop = inside(f"rm -r {path}/d {path}/big")
            rows: list[tuple[str, Unit, float]] = [
                ("128 MiB written by dd", "MB/s", 128 * MIB / 1e6 / write),
                ("128 MiB read by dd", "MB/s", 128 * MIB / 1e6 / read),
                ("2,000 files made", "s", make),
                ("2,000 files listed by ls -l", "s", look),
                ("all removed", "s", drop),
            ]
            for what, unit, value in rows:
                result = Result("vm-folders", place.person, f"{kind}: {what}", unit, part="vm")
                result.samples["berth"] = [value]
                results.append(result)
    finally:
        one.watch.time(*one.remove(name))
    return results


def reclaim(place: VmPlace) -> list[Result]:
    """What QEMU holds: before, with 1 GiB touched, and after that was freed."""
    name, results = fresh_name("g"), list[Result]()
    one = place.vm
    one.watch.time(*one.launch(name, memory="2G"), *one.settle(name))

    def look(what: str) -> None:
        result = Result("vm-reclaim", place.person, f"QEMU's memory {what}, RSS", "MiB", part="vm")
        measures.add_memory(result, "berth", [one.vmm_memory(name).rss])
        results.append(result)

    try:
        look("after the boot")
        touch = "mount -t tmpfs -o size=1200m tmpfs /mnt && dd if=/dev/zero of=/mnt/x bs=1M count=1024 2>/dev/null"
        one.watch.time(*one.run_as_root(name, "sh", "-c", touch))
        look("with 1 GiB touched")
        one.watch.time(*one.run_as_root(name, "umount", "/mnt"))
        for seconds, wait_s in ((5, 5), (20, 15)):
            time.sleep(wait_s)
            look(f"{seconds} s after that was freed")
    finally:
        one.watch.time(*one.remove(name))
    return results


BENCHMARKS: dict[str, Callable[[VmPlace], list[Result]]] = {
    "vm-run": run_command,
    "vm-memory": memory,
    "vm-cold": cold_start,
    "vm-bulk": bulk,
    "vm-create": create,
    "vm-folders": folders,
    "vm-reclaim": reclaim,
}
WHEN_ASKED = ("vm-folders", "vm-reclaim")


def set_up(place: VmPlace) -> list[str]:
    """Have the image's disk made, and find out what VMs run on; return notes. Raises BenchError."""
    place.say(f"{place.person}: setting up berth (vm)")
    place.vm.setup_first()
    try:
        place.bare = find_bare_kernel(place)
    except BenchError as error:
        return [f"{place.person}: the bare kernel can't be booted: {error}"]
    return [f"{place.person}: {describe(place.bare)}"]
