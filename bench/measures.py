"""What is measured, and how: one function a benchmark, each giving rows of a table. Used by __main__ and vms.

The functions that VMs have, too, go by the place's part; what is different there is in vms.py.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.contenders import Contender, NotOffered, disk_bytes
from bench.goals import Goal, Result, Unit
from bench.imports import own_imports, parse_importtime
from bench.turns import STEADY, Place, ensure_steady, finish, fresh_name, take_turns
from bench.watch import BenchError, Files, Memory, One, Step

MIB = 1024 * 1024

# A command in a running machine -----------------------------------------------------------------------------------

RUN_GOAL = Goal(
    at_most=60, below=("podman", "lxc"),
    why={
        "lxc": "lxc-attach is a C program that enters the namespaces by itself and execs. The bare Python "
        "interpreter's start (see *floor*) is most of that whole call or more than it, and berth then has modules to "
        "import and a session with its agent to hold: below lxc-attach is out of a Python program's reach",
        "limit": "most of it is the interpreter's start and its imports (see *imports*)",
    },
)  # fmt: skip


def run_command(place: Place) -> list[Result]:
    result = Result("run", place.person, "`run -- true` in a running machine, whole process", "ms", RUN_GOAL)
    ready = ensure_steady(place, result)
    take_turns(
        result, ready, place.rounds(40, 10),
        lambda contender: contender.watch.time(*contender.run(STEADY, "true")) * 1000,
    )  # fmt: skip
    return [result]


def floor(place: Place) -> list[Result]:
    """What berth's number stands on: starting anything, the bare interpreter, and what berth does without a machine."""
    python = str(place.installed.python)
    programs = {
        "floor: starting /bin/true": ["/bin/true"],
        "floor: `python -I -S -c pass`": [python, "-I", "-S", "-c", "pass"],
        "floor: `python -c pass`, as `berth` is started": [python, "-c", "pass"],
        "floor: `berth --version`": [str(place.installed.berth), "--version"],
    }
    results: list[Result] = []
    for what, argv in programs.items():
        result = Result("floor", place.person, what, "ms", part=place.part)
        step = Step(tuple(argv))
        rounds = place.rounds(40, 10, share=1 / len(programs))

        def measure(one: Contender, step: Step = step) -> float:
            return one.watch.time(step) * 1000

        take_turns(result, [place.berth], rounds, measure)
        results.append(result)
    return results


def imports(place: Place) -> list[Result]:
    """The sum of the modules that `berth run` imports over those of the bare interpreter."""
    result = Result("imports", place.person, "imports of `berth run` over the bare interpreter's", "ms")
    ensure_steady(place, result)
    watch, python, berth = place.berth.watch, str(place.installed.python), str(place.installed.berth)
    script = '"$@" 2>&1 >/dev/null'
    bare = ["sh", "-c", script, "sh", python, "-X", "importtime", "-c", "pass"]
    ours = ["sh", "-c", script, "sh", python, "-X", "importtime", berth, "run", "-n", STEADY, "--", "true"]

    def measure(_berth: Contender) -> float:
        known = {row.name for row in parse_importtime(watch.output(*bare))}
        rows = own_imports(parse_importtime(watch.output(*ours)), known)
        result.extra = f"{len(rows)} modules; " + ", ".join(
            f"{row.name} {row.self_us / 1000:.1f}" for row in sorted(rows, key=lambda row: -row.self_us)[:8]
        )
        return sum(row.self_us for row in rows) / 1000

    take_turns(result, [place.berth], place.rounds(15, 5), measure)
    return [result]


# Bytes ------------------------------------------------------------------------------------------------------------

BULK_GOAL = Goal(
    at_least=1000,
    why={"limit": "each byte is copied five times (file, pipe, agent, socket, berth) on the cores that also run `cat`"},
)


def bulk(place: Place) -> list[Result]:
    """`cat` of a file that all machines share, out and in; to a file (/dev/null), and through a pipe."""
    return measure_bulk(place, place.bulk_inside, BULK_GOAL)


def measure_bulk(place: Place, inside: str, goal: Goal) -> list[Result]:
    """inside: where machines find the bytes."""
    amount, outside = f"{place.bulk_bytes // MIB} MiB", str(place.bulk)
    swallow = ("sh", "-c", "cat > /dev/null")
    ways = [
        (f"`run -- cat` of {amount} to /dev/null", ("cat", inside), Files(stdout="/dev/null")),
        (f"`run -- cat` of {amount} into a pipe", ("cat", inside), Files(sink=swallow)),
        (f"{amount} from a file into `run -- cat`", swallow, Files(stdin=outside)),
        (f"{amount} from a pipe into `run -- cat`", swallow, Files(source=("cat", outside))),
    ]
    return [_measure_way(place, Result("bulk", place.person, what, "MB/s", goal, part=place.part), words, files)
            for what, words, files in ways]  # fmt: skip


def _measure_way(place: Place, result: Result, words: tuple[str, ...], files: Files) -> Result:
    contenders = [one for one in ensure_steady(place, result) if one.name in ("berth", "podman")]
    for other in ("lxc", "systemd-nspawn"):
        if other in place.steady:
            result.absent[other] = "hands its descriptors over: no byte passes through it"

    def measure(contender: Contender) -> float:
        return place.bulk_bytes / 1e6 / contender.watch.time(*contender.run(STEADY, *words, files=files))

    take_turns(result, contenders, place.rounds(5, 3, share=1 / 4), measure, warm_up=False)
    return result


# Memory -----------------------------------------------------------------------------------------------------------

MEMORY_GOAL = Goal(
    at_most=5,
    why={"limit": "the keeper is a Go program: its runtime and the pages of its binary are most of it"},
)


def memory(place: Place) -> list[Result]:
    """What stays on the host for one running machine, and what stays once for all of a person's machines."""
    resident = Result("memory", place.person, "memory on the host per running machine, RSS", "MiB", MEMORY_GOAL)
    proportional = Result("memory", place.person, "the same, PSS (shared pages divided)", "MiB")
    shared = Result("memory", place.person, "memory on the host once for all machines, RSS", "MiB")
    for contender in ensure_steady(place, resident):
        # nspawn's directory is the steady machine's; of the others some more, for they differ.
        more = [] if contender.name == "systemd-nspawn" else [fresh_name("r") for _ in range(2 if place.quick else 4)]
        try:
            for name in more:
                contender.watch.time(*contender.launch(name), *contender.settle(name))
            own: list[Memory] = []
            for name in (STEADY, *more):
                own = contender.memory(name)
                add_memory(resident, contender.name, [one.rss for one in own])
                add_memory(proportional, contender.name, [one.pss for one in own])
            _add_shared(shared, contender)
            resident.extra += f"{contender.name}: {', '.join(one.name for one in own)}; "
        except (BenchError, OSError) as error:
            resident.absent[contender.name] = str(error)
        finally:
            for name in more:
                contender.watch.time(*contender.remove(name))
    return [resident, proportional, *([shared] if shared.samples else [])]


def _add_shared(shared: Result, contender: Contender) -> None:
    once = contender.shared_memory()
    if once:
        add_memory(shared, contender.name, [one.rss for one in once])
        shared.extra += f"{contender.name}: {', '.join(_describe(one) for one in once)}; "


def add_memory(result: Result, name: str, sizes: Sequence[int | None]) -> None:
    known = [size for size in sizes if size is not None]
    if known and len(known) == len(sizes):
        result.samples.setdefault(name, []).append(sum(known) / MIB)
    else:
        result.absent[name] = "its processes may not be looked into"


def _describe(one: Memory) -> str:
    return one.name if one.rss is None else f"{one.name} {one.rss / MIB:.1f}"


# Start and stop ---------------------------------------------------------------------------------------------------

COLD_GOAL = Goal(
    at_most=350, below=("podman", "lxc", "systemd-nspawn"),
    why={
        "podman": "podman's start waits for nothing in the container and, as root, makes no user namespace; berth's "
        "two Python starts (the command, and the launcher inside the namespaces) cost more than podman's in Go",
        "lxc": "lxc starts in C, with no user namespace, nothing hidden and a network that is only a cable; what berth "
        "adds is two Python starts (the command, and the launcher inside the namespaces) and crun",
        "systemd-nspawn": "nspawn starts in C, with no user namespace, no overlay and an interface that stays down; "
        "what berth adds is two Python starts (the command, and the launcher inside the namespaces) and crun",
        "limit": "most of it are two interpreter starts (the command's, the launcher's inside the namespaces), crun "
        "and the network's tools",
    },
)  # fmt: skip


def cold_start(place: Place) -> list[Result]:
    """Stop a settled machine, then time a command in it until it is done."""
    cold = Result("cold", place.person, "stopped → `run -- true` done", "ms", COLD_GOAL)
    stop = Result("stop", place.person, "stop (the init powers off)", "ms")
    ready = ensure_steady(place, cold)

    def measure(contender: Contender) -> float:
        stopped = contender.watch.time(*contender.stop(STEADY)) * 1000
        # `berth run` starts the machine by itself; the others have to be told.
        first = [] if contender.name == "berth" else contender.start(STEADY)
        started = contender.watch.time(*first, *contender.run(STEADY, "true")) * 1000
        contender.watch.time(*contender.settle(STEADY))
        stop.samples.setdefault(contender.name, []).append(stopped)
        return started

    take_turns(cold, ready, place.rounds(10, 3), measure)
    return [cold, stop]


# Create -----------------------------------------------------------------------------------------------------------

CREATE_GOAL = Goal(
    at_most=50,
    why={
        "limit": "it is a whole Python process, which imports argparse, the image store, the bundle and the engine; "
        "the work itself is the row *by `berth.Machine.create`*"
    },
)
DISK_GOAL = Goal(at_most=1024)
READY_GOAL = Goal(at_most=300, why=COLD_GOAL.why)
SETTLED_GOAL = Goal(at_most=1, why={"limit": "most of it is systemd's own boot on these cores"})


def create(place: Place) -> list[Result]:
    """A second machine from the same image, not booted: time and disk."""
    part, what = place.part, "`create --no-boot`, a second machine from the image"
    result = Result("create", place.person, what, "ms", CREATE_GOAL, part=part)
    disk = Result("disk", place.person, "disk that it takes", "KiB", DISK_GOAL, part=part)

    def measure(contender: Contender) -> float:
        name = fresh_name("c")
        steps = contender.create(name)
        before = disk_bytes(contender.storage())
        seconds = contender.watch.time(*steps)
        disk.samples.setdefault(contender.name, []).append((disk_bytes(contender.storage()) - before) / 1024)
        contender.watch.time(*contender.remove(name))
        return seconds * 1000

    take_turns(result, place.contenders, place.rounds(12, 3, share=0.6), measure)
    return [result, disk, _create_in_process(place)]


# argv: how many, the isolation; prints the milliseconds of each but the first.
_CREATE = """
import sys, time
import berth
taken = []
for number in range(int(sys.argv[1]) + 1):
    start = time.perf_counter()
    machine = berth.Machine.create("bench:latest", name=f"api{number}", boot=False, isolation=sys.argv[2])
    taken.append((time.perf_counter() - start) * 1000)
    machine.remove()
print(*taken[1:])
"""


def _create_in_process(place: Place) -> Result:
    """The same by the Python API in one process: what is left when the interpreter and its imports are there."""
    what = "the same by `berth.Machine.create` in one Python process"
    result = Result("create", place.person, what, "ms", part=place.part)
    rounds = "3" if place.quick else "10"
    try:
        said = place.berth.watch.output(str(place.installed.python), "-c", _CREATE, rounds, place.part)
        result.samples["berth"] = [float(word) for word in said.split()]
    except BenchError as error:
        result.absent["berth"] = str(error)
    return result


def boot(place: Place) -> list[Result]:
    """Create and boot: until a command can run in it, and until its systemd has settled."""
    ready = Result("ready", place.person, "`create`, to agent ready", "ms", READY_GOAL)
    settled = Result("settled", place.person, "`create`, to systemd settled", "s", SETTLED_GOAL)

    def measure(contender: Contender, *, settle: bool) -> float:
        name = fresh_name("b")
        steps = contender.launch(name)
        if settle:
            steps = [*steps, *contender.settle(name)]
        elif contender.name != "berth":  # create returns when the agent has answered
            steps = [*steps, *contender.run(name, "true")]
        seconds = contender.watch.time(*steps)
        contender.watch.time(*contender.remove(name))
        return seconds if settle else seconds * 1000

    # nspawn's directory is the steady machine's.
    contenders = [one for one in place.contenders if one.name != "systemd-nspawn"]
    take_turns(ready, contenders, place.rounds(8, 3, share=0.45), lambda contender: measure(contender, settle=False))
    take_turns(settled, contenders, place.rounds(8, 3, share=0.55), lambda contender: measure(contender, settle=True))
    return [ready, settled]


# Twenty at once ---------------------------------------------------------------------------------------------------

TWENTY = 20
_PEERS_TWENTY_S = 100.0
_SPIN_S = 3.0
_SETTLE_S = 35.0
_SPIN = (
    "use Time::HiRes qw(time sleep); my ($start, $end) = @ARGV; my $rounds = 0; sleep($start - time) if $start > time; "
    "while (time < $end) { my $n = 0; $n++ for 1..1000; $rounds++ } print $rounds;"
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Twenty:
    """The rows of the benchmark."""

    booted: Result
    settled: Result
    answered: Result
    share: Result
    boot_s: Result
    settle_s: Result
    slowest_ms: Result

    @classmethod
    def of(cls, person: str) -> _Twenty:
        def row(what: str, unit: Unit, goal: Goal | None = None) -> Result:
            return Result("twenty", person, f"{TWENTY} machines at once: {what}", unit, goal)

        everyone = Goal(at_least=TWENTY, why={"limit": _why_not_all()})
        return cls(
            row("booted", "of 20", everyone),
            row("systemd running, nothing failed", "of 20", everyone),
            row("answered, all asked at once", "of 20", everyone),
            row("smallest share of the cores when all are busy, of a fair one", "%", Goal(at_least=50)),
            row("until all were started", "s"),
            row("until every systemd had settled", "s"),
            row("slowest answer", "ms"),
        )

    def rows(self) -> list[Result]:
        return [self.booted, self.settled, self.answered, self.share, self.boot_s, self.settle_s, self.slowest_ms]


def _why_not_all() -> str:
    path = Path("/proc/sys/fs/inotify/max_user_instances")
    limit = path.read_text().strip() if path.exists() else "?"
    return (
        f"each Debian holds 7 inotify instances (systemd 5, dbus, logind), and the kernel allows all machines of one "
        f"user together fs.inotify.max_user_instances: {limit} on this host; it hits every peer alike"
    )


def twenty(place: Place) -> list[Result]:
    """Twenty machines started at once: all boot, all answer, none starves."""
    table = _Twenty.of(place.person)
    contenders = [one for one in place.contenders if one.name in ("berth", "podman")]
    if place.seconds < _PEERS_TWENTY_S:
        for one in contenders[1:]:
            table.booted.absent[one.name] = "takes a minute: bench/run --only twenty"
        del contenders[1:]
    finish(place)  # the shared machines would count
    for contender in contenders:
        names = [fresh_name("t") for _ in range(TWENTY)]
        made: list[str] = []
        try:
            for name in names:
                made.append(name)
                contender.watch.time(*contender.create(name))
            _measure_twenty(contender, names, table)
        except (BenchError, NotOffered) as error:
            for result in table.rows():
                if contender.name not in result.samples:
                    result.absent[contender.name] = str(error)
        finally:
            for name in made:
                contender.watch.time(*contender.remove(name))
    return table.rows()


def _measure_twenty(contender: Contender, names: Sequence[str], table: _Twenty) -> None:
    who, many = contender.name, contender.watch.many
    began = time.perf_counter()
    ran = many([_until_answered(contender, name) for name in names])
    table.boot_s.samples[who] = [max(one.ended_s for one in ran)]
    table.booted.samples[who] = [_successes(table.booted, who, ran)]
    names = [name for name, one in zip(names, ran, strict=True) if one.status == 0]

    ran = many([contender.settle(name)[0].argv for name in names], deadline_s=_SETTLE_S)
    table.settle_s.samples[who] = [time.perf_counter() - began]
    table.settled.samples[who] = [sum(one.stdout.split()[-1:] == ["running"] for one in ran)]

    ran = many([contender.run(name, "true")[0].argv for name in names])
    table.slowest_ms.samples[who] = [max(one.ended_s - one.began_s for one in ran) * 1000]
    table.answered.samples[who] = [_successes(table.answered, who, ran)]

    # All have to be there before any begins: what twenty at once just took, and some more.
    start = time.time() + 1.5 * max(one.ended_s for one in ran) + 0.5
    spin = ("perl", "-e", _SPIN, f"{start:.3f}", f"{start + _SPIN_S:.3f}")
    ran = many([contender.run(name, *spin)[0].argv for name in names])
    counts = [int(one.stdout) for one in ran if one.status == 0]
    table.share.samples[who] = [100 * min(counts) * len(counts) / sum(counts)]


def _until_answered(contender: Contender, name: str) -> tuple[str, ...]:
    """Start a machine until a command runs in it; berth's start waits for that by itself."""
    start = contender.start(name)[0].argv
    if contender.name == "berth":
        return start
    return ("sh", "-c", f"{shlex.join(start)} && {shlex.join(contender.run(name, 'true')[0].argv)}")


def _successes(result: Result, who: str, ran: Sequence[One]) -> float:
    """Count those that ended well; keep what the first of the others said."""
    failed = [one for one in ran if one.status != 0]
    if failed:
        result.extra += f"{who}: {len(failed)} failed: {' '.join(failed[0].stderr.split())[:200]}; "
    return len(ran) - len(failed)


BENCHMARKS: dict[str, Callable[[Place], list[Result]]] = {
    "run": run_command,
    "floor": floor,
    "imports": imports,
    "memory": memory,
    "bulk": bulk,
    "cold": cold_start,
    "create": create,
    "boot": boot,
    "twenty": twenty,
}
