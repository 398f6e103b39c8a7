"""bench/run: the command line of the benchmarks. Makes the places, runs what is asked for, prints, writes.

Everything lies below one folder in /tmp, which is removed at the end whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TypeVar

from bench import adapt, contenders, facts, measures, pull, report, turns, vms, worlds
from bench.budget import Budget, Rounds
from bench.contenders import Contender
from bench.goals import Part, Result
from bench.turns import Place
from bench.vms import VmPlace
from bench.watch import BenchError, Watch
from berth import proc
from berth.errors import BerthError
from berth.layout import Layout
from images import bootstrap
from ordinary import Ordinary, ordinary_user

RESULTS = worlds.ROOT / "bench/results"
DOCS = worlds.ROOT / "docs/performance.md"
MIB = 1024 * 1024
_VM_BULK = 128 * MIB
_LIMIT_S, _QUICK_S = 560.0, 200.0

# What all that needs no more than a name takes on two quiet cores, in seconds: the shares of the run's time.
_CONTAINERS = {
    "run": 12.0, "floor": 5.0, "imports": 4.0, "memory": 14.0, "bulk": 36.0, "cold": 26.0, "create": 10.0,
    "boot": 24.0, "twenty": 16.0,
}  # fmt: skip
_VMS = {"vm-cold": 45.0, "vm-run": 8.0, "vm-bulk": 14.0, "vm-memory": 2.0, "vm-create": 18.0,
        "vm-folders": 25.0, "vm-reclaim": 35.0}  # fmt: skip
_IMAGES = {"pull": 28.0, "adapt": 22.0}
_SETUPS = {"setup": 30.0, "root containers": 30.0, "user containers": 25.0, "root VMs": 25.0, "user VMs": 25.0}
_ALL = {**_CONTAINERS, **_VMS, **_IMAGES}


def names_of_benchmarks() -> list[str]:
    """Return what `--only` takes."""
    return list(_ALL)


AnyPlace = TypeVar("AnyPlace", bound=Place)


def main() -> int:
    options = _parse()
    if options.render:
        return _show(report.Report.from_json(Path(options.render).read_text()), options)
    if os.geteuid() == 0:
        os.umask(0o022)
    # A run in the background may have them ignored; and what ends it must not end the tidying up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    found = facts.gather(shlex.join(["bench/run", *sys.argv[1:]]))
    run = Run(options, found)
    began = time.monotonic()
    try:
        run.all()
    except (BenchError, BerthError) as error:
        _say(f"bench: {error}")
        run.notes.append(f"the run ended early: {error}")
    except KeyboardInterrupt:
        run.interrupted = True
        options.docs = False  # half a run is none to show to the world
        run.notes.append("the run was interrupted")
        _say("bench: interrupted")
    _say(f"bench: {time.monotonic() - began:.0f} s")
    if run.results:
        _show(report.Report(run.facts, run.results, run.notes), options)
    return 130 if run.interrupted else int(run.failed or not run.results)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description="Measure berth beside its peers.")
    parser.add_argument("--quick", action="store_true",
                        help="fewer rounds and bytes, podman as root only, no VMs, no twenty: 3 minutes")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(_ALL), default=[],
                        help=f"of: {', '.join(_ALL)}; only when asked for: {', '.join(vms.WHEN_ASKED)}")  # fmt: skip
    parser.add_argument("--minutes", type=float, metavar="N",
                        help="have rounds fit into this time; what finds none left is skipped (9.3)")  # fmt: skip
    parser.add_argument("--as", dest="persons", choices=["root", "user", "both"], default="both", help="who runs berth")
    parser.add_argument("--no-peers", action="store_true", help="berth alone")
    parser.add_argument("--rootfs", metavar="TAR", help="a root file system instead of a bootstrapped Debian")
    parser.add_argument("--json", metavar="FILE", help="write the results there too (always: bench/results/)")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--render", metavar="JSON", help="measure nothing: show (--docs: write) an earlier run")
    return parser.parse_args()


def _show(made: report.Report, options: argparse.Namespace) -> int:
    """Print and write the results; return 0."""
    sys.stdout.write(report.terminal_table(made))
    if not options.render:
        stamp = made.facts.date.replace(":", "").replace(" ", "-").removesuffix("-UTC")
        RESULTS.mkdir(exist_ok=True)
        for path in [RESULTS / f"{stamp}.json", *([Path(options.json)] if options.json else [])]:
            path.write_text(made.to_json())
            _say(f"bench: wrote {path}")
    if options.docs:
        report.write_docs(DOCS, made)
        _say(f"bench: wrote {DOCS}")
    return 0


class Run:
    """One run: what it was asked for, and what it has found so far (an error later does not lose it)."""

    def __init__(self, options: argparse.Namespace, found: facts.Facts) -> None:
        self.results: list[Result] = []
        self.notes: list[str] = []
        self.facts = found
        self.failed = False
        self.interrupted = False
        self._quick = bool(options.quick)
        self._names = list(options.only) or [name for name in _ALL if self._is_usual(name)]
        self._peers = not options.no_peers
        self._persons = [options.persons] if options.persons != "both" else ["root", "user"]
        if os.geteuid() != 0:
            self._persons = ["user"]
        self._rootfs = options.rootfs
        seconds = options.minutes * 60 if options.minutes else _QUICK_S if self._quick else _LIMIT_S
        self._budget = Budget(seconds, self._weights())

    def _is_usual(self, name: str) -> bool:
        if name in vms.WHEN_ASKED:
            return False
        return not (self._quick and (name in _VMS or name == "twenty"))

    def _weights(self) -> dict[str, float]:
        """Say what is to be done, and what share of the time it may have."""
        found: dict[str, float] = {"setup": _SETUPS["setup"]}
        for person in self._persons:
            for kind, weights in (("containers", _CONTAINERS), ("VMs", _VMS)):
                names = [name for name in self._names if name in weights]
                if names:
                    found[f"{person} {kind}"] = _SETUPS[f"{person} {kind}"]
                    found |= {f"{person} {name}": weights[name] for name in names}
        return found | {name: _IMAGES[name] for name in self._names if name in _IMAGES}

    def all(self) -> None:
        with _scratch() as scratch:
            tar = self._find_tar()
            _say("bench: building berth's wheel")
            wheel = worlds.build_wheel(scratch)
            shared = self._make_shared(scratch)
            self._budget.begin("setup")
            works = {"root": self._as_root, "user": self._as_ordinary if os.geteuid() == 0 else self._as_ourselves}
            for person in self._persons:
                self._guarded(person, functools.partial(works[person], scratch, wheel, shared, tar))
            if "pull" in self._names:
                self._guarded("pull", lambda: self._pull(scratch, wheel))

    def _guarded(self, person: str, work: Callable[[], None]) -> None:
        """Have one person's part fail alone."""
        try:
            work()
        except (BenchError, BerthError, OSError, AssertionError, RuntimeError) as error:
            self.failed = True
            self._note(f"{person}: the run ended early: {error}")

    def _find_tar(self) -> Path:
        if self._rootfs:
            return Path(self._rootfs).resolve()
        if os.geteuid() != 0:
            raise BenchError("only root can bootstrap a Debian: give --rootfs TAR, an archive of one with systemd")
        _say("bench: making a Debian 12 root file system (kept for today)")
        return bootstrap("bookworm")

    def _make_shared(self, scratch: Path) -> Path:
        """Make the files that bulk reads: real bytes, in the host's page cache."""
        shared = scratch / "shared"
        shared.mkdir(mode=0o755)
        block = os.urandom(16 * MIB)
        for size in (self._bulk_bytes, _VM_BULK):
            with (shared / f"bulk-{size}").open("wb") as file:
                for _ in range(size // len(block)):
                    file.write(block)
        return shared

    @property
    def _bulk_bytes(self) -> int:
        return (256 if self._quick else 1024) * MIB

    def _wants(self, weights: dict[str, float]) -> bool:
        return any(name in weights for name in self._names)

    # Persons ------------------------------------------------------------------------------------------------------

    def _as_root(self, scratch: Path, wheel: Path, shared: Path, tar: Path) -> None:
        installed = worlds.install(wheel, os.path.realpath(sys.executable), scratch / "venv-root")
        with contextlib.ExitStack() as stack:
            layout = _layout(worlds.roots_of(scratch / "root"))
            watch = stack.enter_context(worlds.root_world(scratch, installed))
            stack.callback(self._take_down, "root", watch, installed)
            self._note_python("root", watch.output(str(installed.python), "--version"))
            if self._wants(_CONTAINERS):
                self._budget.begin("root containers")
                everybody: list[Contender] = [contenders.Berth(watch, installed, layout, shared)]
                if self._peers:
                    everybody += self._root_peers(stack, scratch, shared, tar)
                self._measure(self._place(Place, "root", everybody, installed, shared), tar)
            # The world has no way out: the kernel comes by the host's own network.
            fetch = [str(installed.berth), "system", "kernel", "fetch"]
            environment = {"PATH": worlds.PATH, "HOME": "/root", **worlds.roots_of(scratch / "root")}
            self._measure_vms(
                "root", watch, installed, layout, shared, tar,
                fetch=lambda: proc.run(fetch, env=environment, timeout_s=200),
            )  # fmt: skip

    def _root_peers(self, stack: contextlib.ExitStack, scratch: Path, shared: Path, tar: Path) -> list[Contender]:
        found: list[Contender] = []
        for name, program in (("podman", "podman"), ("lxc", "lxc-start"), ("nspawn", "systemd-nspawn")):
            if proc.find_program(program) is None:
                self.notes.append(f"{name} is not measured: it is not installed ({worlds.install_hint(program)})")
                continue
            try:
                watch = stack.enter_context(worlds.peer_world(scratch, name))
                watch.output("true")
            except BenchError as error:
                self.notes.append(f"{name} can't be measured here: {error}")
                continue
            folder = scratch / name
            if name == "podman":
                found.append(contenders.Podman(watch, folder, shared))
                continue
            rootfs = folder / "rootfs"
            rootfs.mkdir()
            proc.run(["tar", "--numeric-owner", "-C", str(rootfs), "-xf", str(tar)], timeout_s=300)
            kind = contenders.Lxc if name == "lxc" else contenders.Nspawn
            found.append(kind(watch, folder, rootfs, shared))
        return found

    def _as_ordinary(self, scratch: Path, wheel: Path, shared: Path, tar: Path) -> None:
        with contextlib.ExitStack() as stack:
            ordinary = stack.enter_context(ordinary_user(scratch))
            installed = worlds.install(wheel, str(ordinary.python), scratch / "venv-user")
            watch = stack.enter_context(worlds.user_world(scratch, ordinary, installed))
            stack.callback(self._take_down, "user", watch, installed)
            self._note_python("user", watch.output(str(installed.python), "--version"))
            readable = scratch / "rootfs.tar"
            shutil.copyfile(tar, readable)
            if self._wants(_CONTAINERS):
                self._budget.begin("user containers")
                everybody: list[Contender] = [contenders.Berth(watch, installed, ordinary.layout, shared)]
                if self._peers and not self._quick:
                    everybody += self._user_peers(stack, scratch, shared, ordinary)
                self._measure(self._place(Place, "user", everybody, installed, shared), readable)
            fetch = (str(installed.berth), "system", "kernel", "fetch")
            self._measure_vms(
                "user", watch, installed, ordinary.layout, shared, readable,
                fetch=lambda: watch.output(*fetch, deadline_s=200),
            )  # fmt: skip
            if "adapt" in self._names:
                self._adapt(scratch, watch, installed, ordinary.layout, shared)

    def _user_peers(
        self, stack: contextlib.ExitStack, scratch: Path, shared: Path, ordinary: Ordinary
    ) -> list[Contender]:
        self.notes.append("user: lxc and systemd-nspawn are measured as root only")
        if proc.find_program("podman") is None:
            self.notes.append(f"user: podman is not measured: it is not installed ({worlds.install_hint('podman')})")
            return []
        try:
            watch = stack.enter_context(worlds.user_peer_world(scratch, "podman", ordinary))
            watch.output("true")
        except BenchError as error:
            self.notes.append(f"rootless podman can't be measured here: {error}")
            return []
        return [contenders.Podman(watch, scratch / "user-podman", shared, rootless=True)]

    def _as_ourselves(self, scratch: Path, wheel: Path, shared: Path, tar: Path) -> None:
        installed = worlds.install(wheel, os.path.realpath(sys.executable), scratch / "venv")
        with contextlib.ExitStack() as stack:
            layout = _layout(worlds.roots_of(scratch))
            watch = stack.enter_context(worlds.own_world(scratch, installed))
            stack.callback(self._take_down, "user", watch, installed)
            self.notes.append("the peers and adapting are only measured when root runs bench/run")
            self._note_python("user", watch.output(str(installed.python), "--version"))
            if self._wants(_CONTAINERS):
                self._budget.begin("user containers")
                everybody: list[Contender] = [contenders.Berth(watch, installed, layout, shared)]
                self._measure(self._place(Place, "user", everybody, installed, shared), tar)
            fetch = (str(installed.berth), "system", "kernel", "fetch")
            self._measure_vms(
                "user", watch, installed, layout, shared, tar,
                fetch=lambda: watch.output(*fetch, deadline_s=200),
            )  # fmt: skip

    # Measuring ----------------------------------------------------------------------------------------------------

    def _place(
        self, kind: type[AnyPlace], person: str, everybody: list[Contender], installed: worlds.Installed, shared: Path
    ) -> AnyPlace:
        part: Part = "vm" if kind is VmPlace else "container"
        size = _VM_BULK if part == "vm" else self._bulk_bytes
        return kind(person, part, everybody, installed, shared, size, self._quick, _say)

    def _measure(self, place: Place, tar: Path) -> None:
        for contender in place.contenders:
            if contender.note:
                self.notes.append(f"{place.person}: {contender.name}: {contender.note}")
        for name, why in turns.set_up(place, tar).items():
            self._note(f"{place.person}: {name} does not work here: {why}")
        self._benchmarks(place, measures.BENCHMARKS)

    def _measure_vms(
        self, person: str, watch: Watch, installed: worlds.Installed, layout: Layout, shared: Path, tar: Path,
        *, fetch: Callable[[], object],
    ) -> None:  # fmt: skip
        """Measure VMs where it was asked for. fetch: brings a kernel into the layout."""
        if not self._wants(_VMS):
            return
        self._budget.begin(f"{person} VMs")
        berth = contenders.Berth(watch, installed, layout, shared, "vm")
        place = self._place(VmPlace, person, [berth], installed, shared)
        try:
            fetch()
            turns.set_up(place, tar)
            self.notes += vms.set_up(place)
        except (BenchError, BerthError) as error:
            self.failed = True
            self._note(f"{person}: VMs can't be measured here: {error}")
            return
        self._benchmarks(place, vms.BENCHMARKS)

    def _benchmarks(self, place: AnyPlace, benchmarks: Mapping[str, Callable[[AnyPlace], list[Result]]]) -> None:
        for name in (name for name in benchmarks if name in self._names):
            place.seconds = self._begin(f"{place.person} {name}")
            if place.seconds:
                self._try(f"{place.person} {name}", functools.partial(benchmarks[name], place))
        with contextlib.suppress(BenchError):  # the worlds end what is left
            turns.finish(place)

    def _begin(self, item: str) -> float:
        """Return the seconds that `item` may take; say so where there are none."""
        seconds = self._budget.begin(item)
        if not seconds:
            self._note(f"{item}: not measured, the run's time was over (--minutes, --only)")
        return seconds

    def _try(self, item: str, measure: Callable[[], list[Result]]) -> None:
        began = time.monotonic()
        try:
            self.results += measure()
        except BenchError as error:
            self.failed = True
            self._note(f"{item} failed: {error}")
        _say(f"bench: {item}: {time.monotonic() - began:.0f} s")

    def _pull(self, scratch: Path, wheel: Path) -> None:
        seconds = self._begin("pull")
        if seconds:
            installed = worlds.install(wheel, os.path.realpath(sys.executable), scratch / "venv-pull")
            rounds = Rounds(2, 3, seconds) if self._quick else Rounds(3, 10, seconds)
            self._try("pull", lambda: pull.pull(scratch, installed, rounds))

    def _adapt(self, scratch: Path, watch: Watch, installed: worlds.Installed, layout: Layout, shared: Path) -> None:
        """Only as an ordinary user: root's world has no way to a package mirror."""
        seconds = self._begin("adapt")
        if not seconds:
            return
        everybody: list[Contender] = [contenders.Berth(watch, installed, layout, shared)]
        place = self._place(Place, "user", everybody, installed, shared)
        place.seconds = seconds
        readable = scratch / "bare.tar"
        shutil.copyfile(bootstrap("bookworm", ["ca-certificates"]), readable)
        self._try("adapt", lambda: adapt.adapt(place, readable, str(installed.berth)))

    def _take_down(self, person: str, watch: Watch, installed: worlds.Installed) -> None:
        try:
            worlds.take_down(watch, installed)
        except BenchError as error:
            self.failed = True
            self._note(f"{person}: berth could not be taken down: {error}")

    def _note(self, words: str) -> None:
        """Keep words for the report, and say them at once."""
        self.notes.append(words)
        _say(f"bench: {words}")

    def _note_python(self, person: str, said: str) -> None:
        version = said.strip().removeprefix("Python ") or platform.python_version()
        self.facts = dataclasses.replace(self.facts, pythons={**self.facts.pythons, person: version})


@contextlib.contextmanager
def _scratch() -> Generator[Path]:
    """A folder of this run's own with a short path (sockets), which everybody may enter."""
    folder = Path(f"/tmp/bb-{os.getpid()}")  # noqa: S108 (a short path; made here, and mkdir fails if it is there)
    folder.mkdir(mode=0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _layout(roots: dict[str, str]) -> Layout:
    return Layout(*(Path(roots[f"BERTH_{kind}_DIR"]) for kind in ("DATA", "RUNTIME", "CONFIG", "CACHE")))


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
