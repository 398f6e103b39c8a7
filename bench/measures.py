"""What is measured, and how: one function a benchmark, each giving rows of the table. Used by __main__.

Contenders take turns (one round: everybody once), so that what else the machine does hits all alike; the first round of
each is thrown away. A contender that fails is named with its reason, and the others go on.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.contenders import Contender, NotOffered, disk_bytes
from bench.goals import Goal, Result, Unit
from bench.imports import own_imports, parse_importtime
from bench.watch import BenchError, Files, Memory, One, Step
from bench.worlds import Installed

MIB = 1024 * 1024
STEADY = "steady"
_numbers = itertools.count(1)

Say = Callable[[str], None]


@dataclasses.dataclass(slots=True)
class Place:
    """One person's contenders, berth first. shared: a folder that all machines see at /bench, with `bulk` in it."""

    person: str
    contenders: list[Contender]
    installed: Installed
    shared: Path
    bulk_bytes: int
    quick: bool
    say: Say
    steady: set[str] = dataclasses.field(default_factory=set[str])

    def rounds(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @property
    def berth(self) -> Contender:
        return self.contenders[0]


def set_up(place: Place, tar: Path) -> dict[str, str]:
    """Store the root file system for everybody; drop who can't, and say why."""
    dropped: dict[str, str] = {}
    for contender in list(place.contenders):
        place.say(f"{place.person}: setting up {contender.name}")
        try:
            contender.setup(tar)
        except BenchError as error:
            if contender is place.berth:
                raise
            dropped[contender.name] = str(error)
            place.contenders.remove(contender)
    return dropped


def _ensure_steady(place: Place, result: Result) -> list[Contender]:
    """Have a settled machine running for every contender; return those that have one."""
    for contender in place.contenders:
        if contender.name not in place.steady:
            try:
                contender.watch.time(*contender.launch(STEADY), *contender.settle(STEADY))
                place.steady.add(contender.name)
            except BenchError as error:
                result.absent[contender.name] = str(error)
    return [contender for contender in place.contenders if contender.name in place.steady]


def take_turns(
    result: Result, contenders: Sequence[Contender], rounds: int, measure: Callable[[Contender], float]
) -> None:
    """Fill `result` with `rounds` values from each contender, in turns, after one round that does not count."""
    going = list(contenders)
    for turn in range(rounds + 1):
        for contender in list(going):
            try:
                value = measure(contender)
            except (BenchError, NotOffered) as error:
                result.absent[contender.name] = str(error)
                result.samples.pop(contender.name, None)
                going.remove(contender)
                continue
            if turn:
                result.samples.setdefault(contender.name, []).append(value)


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
    ready = _ensure_steady(place, result)
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
        result = Result("floor", place.person, what, "ms")
        step = Step(tuple(argv))
        for _ in range(place.rounds(40, 10)):
            result.samples.setdefault("berth", []).append(place.berth.watch.time(step) * 1000)
        results.append(result)
    return results


def imports(place: Place) -> list[Result]:
    """The sum of the modules that `berth run` imports over those of the bare interpreter."""
    result = Result("imports", place.person, "imports of `berth run` over the bare interpreter's", "ms")
    _ensure_steady(place, result)
    watch, python, berth = place.berth.watch, str(place.installed.python), str(place.installed.berth)
    script = '"$@" 2>&1 >/dev/null'
    bare = ["sh", "-c", script, "sh", python, "-X", "importtime", "-c", "pass"]
    ours = ["sh", "-c", script, "sh", python, "-X", "importtime", berth, "run", "-n", STEADY, "--", "true"]
    values: list[float] = []
    for turn in range(place.rounds(15, 5) + 1):
        known = {row.name for row in parse_importtime(watch.output(*bare))}
        rows = own_imports(parse_importtime(watch.output(*ours)), known)
        if turn:
            values.append(sum(row.self_us for row in rows) / 1000)
            result.extra = f"{len(rows)} modules; " + ", ".join(
                f"{row.name} {row.self_us / 1000:.1f}" for row in sorted(rows, key=lambda row: -row.self_us)[:8]
            )
    result.samples["berth"] = values
    return [result]


# Bytes ------------------------------------------------------------------------------------------------------------

BULK_GOAL = Goal(
    at_least=1000,
    why={"limit": "each byte is copied five times (file, pipe, agent, socket, berth) on the cores that also run `cat`"},
)


def bulk(place: Place) -> list[Result]:
    """`cat` of a file that all machines share, out and in; to a file (/dev/null), and through a pipe."""
    size = place.bulk_bytes
    host, machine = f"{place.shared}/bulk", "/bench/bulk"
    swallow = ("sh", "-c", "cat > /dev/null")
    ways = [
        (f"`run -- cat` of {size // MIB} MiB to /dev/null", ("cat", machine), Files(stdout="/dev/null")),
        (f"`run -- cat` of {size // MIB} MiB into a pipe", ("cat", machine), Files(sink=swallow)),
        (f"{size // MIB} MiB from a file into `run -- cat`", swallow, Files(stdin=host)),
        (f"{size // MIB} MiB from a pipe into `run -- cat`", swallow, Files(source=("cat", host))),
    ]
    results: list[Result] = []
    for what, words, files in ways:
        result = Result("bulk", place.person, what, "MB/s", BULK_GOAL)
        contenders = [one for one in _ensure_steady(place, result) if one.name in ("berth", "podman")]
        for other in ("lxc", "systemd-nspawn"):
            if other in place.steady:
                result.absent[other] = "hands its descriptors over: no byte passes through it"

        def measure(contender: Contender, words: tuple[str, ...] = words, files: Files = files) -> float:
            return size / 1e6 / contender.watch.time(*contender.run(STEADY, *words, files=files))

        take_turns(result, contenders, place.rounds(5, 3), measure)
        results.append(result)
    return results


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
    for contender in _ensure_steady(place, resident):
        # nspawn's directory is the steady machine's; of the others some more, for they differ.
        more = [] if contender.name == "systemd-nspawn" else [f"r{next(_numbers)}" for _ in range(place.rounds(4, 2))]
        try:
            for name in more:
                contender.watch.time(*contender.launch(name), *contender.settle(name))
            own: list[Memory] = []
            for name in (STEADY, *more):
                own = contender.memory(name)
                _add_memory(resident, contender.name, [one.rss for one in own])
                _add_memory(proportional, contender.name, [one.pss for one in own])
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
        _add_memory(shared, contender.name, [one.rss for one in once])
        shared.extra += f"{contender.name}: {', '.join(_describe(one) for one in once)}; "


def _add_memory(result: Result, name: str, sizes: Sequence[int | None]) -> None:
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
    ready = _ensure_steady(place, cold)

    def measure(contender: Contender) -> float:
        stopped = contender.watch.time(*contender.stop(STEADY)) * 1000
        # `berth run` starts the machine by itself; the others have to be told.
        first = [] if contender.name == "berth" else contender.start(STEADY)
        started = contender.watch.time(*first, *contender.run(STEADY, "true")) * 1000
        contender.watch.time(*contender.settle(STEADY))
        stop.samples.setdefault(contender.name, []).append(stopped)
        return started

    take_turns(cold, ready, place.rounds(8, 3), measure)
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
    result = Result("create", place.person, "`create --no-boot`, a second machine from the image", "ms", CREATE_GOAL)
    disk = Result("disk", place.person, "disk that it takes", "KiB", DISK_GOAL)

    def measure(contender: Contender) -> float:
        name = f"c{next(_numbers)}"
        steps = contender.create(name)
        before = disk_bytes(contender.storage())
        seconds = contender.watch.time(*steps)
        disk.samples.setdefault(contender.name, []).append((disk_bytes(contender.storage()) - before) / 1024)
        contender.watch.time(*contender.remove(name))
        return seconds * 1000

    take_turns(result, place.contenders, place.rounds(10, 3), measure)
    return [result, disk, _create_in_process(place)]


# argv: how many; prints the milliseconds of each but the first.
_CREATE = """
import sys, time
import berth
taken = []
for number in range(int(sys.argv[1]) + 1):
    start = time.perf_counter()
    machine = berth.Machine.create("bench:latest", name=f"api{number}", boot=False)
    taken.append((time.perf_counter() - start) * 1000)
    machine.remove()
print(*taken[1:])
"""


def _create_in_process(place: Place) -> Result:
    """The same by the Python API in one process: what is left when the interpreter and its imports are there."""
    result = Result("create", place.person, "the same by `berth.Machine.create` in one Python process", "ms")
    rounds = str(place.rounds(10, 3))
    try:
        said = place.berth.watch.output(str(place.installed.python), "-c", _CREATE, rounds)
        result.samples["berth"] = [float(word) for word in said.split()]
    except BenchError as error:
        result.absent["berth"] = str(error)
    return result


def boot(place: Place) -> list[Result]:
    """Create and boot: until a command can run in it, and until its systemd has settled."""
    ready = Result("ready", place.person, "`create`, to agent ready", "ms", READY_GOAL)
    settled = Result("settled", place.person, "`create`, to systemd settled", "s", SETTLED_GOAL)

    def measure(contender: Contender, *, settle: bool) -> float:
        name = f"b{next(_numbers)}"
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
    take_turns(ready, contenders, place.rounds(6, 3), lambda contender: measure(contender, settle=False))
    take_turns(settled, contenders, place.rounds(6, 3), lambda contender: measure(contender, settle=True))
    return [ready, settled]


# Twenty at once ---------------------------------------------------------------------------------------------------

TWENTY = 20
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
    peers = ("podman",) if place.person == "root" and not place.quick else ()
    contenders = [one for one in place.contenders if one.name in ("berth", *peers)]
    finish(place)  # the shared machines would count
    for contender in contenders:
        names = [f"t{next(_numbers)}" for _ in range(TWENTY)]
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


def finish(place: Place) -> None:
    """Stop the machines that the benchmarks shared."""
    for contender in place.contenders:
        if contender.name in place.steady:
            contender.watch.time(*contender.remove(STEADY))
    place.steady.clear()
