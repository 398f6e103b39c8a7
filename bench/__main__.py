"""bench/run: the command line of the benchmarks. Makes the places, runs what is asked for, prints, writes.

Everything lies below one folder in /tmp, which is removed at the end whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Generator
from pathlib import Path

from bench import contenders, facts, measures, report, worlds
from bench.contenders import Contender
from bench.goals import Result
from bench.measures import MIB, Place
from bench.watch import BenchError, Watch
from berth import proc
from berth.errors import BerthError
from berth.layout import Layout
from images import bootstrap
from ordinary import Ordinary, ordinary_user

RESULTS = worlds.ROOT / "bench/results"
DOCS = worlds.ROOT / "docs/performance.md"


def main() -> int:
    options = _parse()
    if options.render:
        return _show(report.Report.from_json(Path(options.render).read_text()), options)
    if os.geteuid() == 0:
        os.umask(0o022)
    found = facts.gather(shlex.join(["bench/run", *sys.argv[1:]]))
    run = Run(options, found)
    began = time.monotonic()
    try:
        run.all()
    except (BenchError, BerthError) as error:
        _say(f"bench: {error}")
        run.notes.append(f"the run ended early: {error}")
    except KeyboardInterrupt:
        _say("bench: interrupted")
        return 130
    _say(f"bench: {time.monotonic() - began:.0f} s")
    if not run.results:
        return 1
    return _show(report.Report(run.facts, run.results, run.notes), options) or int(run.failed)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description="Measure berth beside its peers.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, podman as root only, no twenty: 2 minutes")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(measures.BENCHMARKS), default=[],
                        help=f"of: {', '.join(measures.BENCHMARKS)}")  # fmt: skip
    parser.add_argument("--as", dest="persons", choices=["root", "user", "both"], default="both", help="who runs berth")
    parser.add_argument("--no-peers", action="store_true", help="berth alone")
    parser.add_argument("--rootfs", metavar="TAR", help="a root file system instead of a bootstrapped Debian")
    parser.add_argument("--json", metavar="FILE", help="write the results there too (always: bench/results/)")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
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
        self._quick = bool(options.quick)
        self._names = list(options.only) or [
            name for name in measures.BENCHMARKS if not (self._quick and name == "twenty")
        ]
        self._peers = not options.no_peers
        self._persons = options.persons
        self._rootfs = options.rootfs

    def all(self) -> None:
        with _scratch() as scratch:
            tar = self._find_tar()
            _say("bench: building berth's wheel")
            wheel = worlds.build_wheel(scratch)
            shared = self._make_shared(scratch)
            if os.geteuid() == 0:
                if self._persons in ("root", "both"):
                    self._guarded("root", lambda: self._as_root(scratch, wheel, shared, tar))
                if self._persons in ("user", "both"):
                    self._guarded("user", lambda: self._as_ordinary(scratch, wheel, shared, tar))
            else:
                self._guarded("user", lambda: self._as_ourselves(scratch, wheel, shared, tar))

    def _guarded(self, person: str, work: object) -> None:
        """Have one person's part fail alone."""
        assert callable(work)
        try:
            work()
        except (BenchError, BerthError, OSError, AssertionError, RuntimeError) as error:
            self.failed = True
            self.notes.append(f"{person}: the run ended early: {error}")
            _say(f"bench: {person}: {error}")

    def _find_tar(self) -> Path:
        if self._rootfs:
            return Path(self._rootfs).resolve()
        if os.geteuid() != 0:
            raise BenchError("only root can bootstrap a Debian: give --rootfs TAR, an archive of one with systemd")
        _say("bench: making a Debian 12 root file system (kept for today)")
        return bootstrap("bookworm")

    def _make_shared(self, scratch: Path) -> Path:
        """Make the file that bulk reads: real bytes, in the host's page cache."""
        shared = scratch / "shared"
        shared.mkdir(mode=0o755)
        block = os.urandom(16 * MIB)
        with (shared / "bulk").open("wb") as file:
            for _ in range(self._bulk_bytes // len(block)):
                file.write(block)
        return shared

    @property
    def _bulk_bytes(self) -> int:
        return (256 if self._quick else 1024) * MIB

    # Persons ------------------------------------------------------------------------------------------------------

    def _as_root(self, scratch: Path, wheel: Path, shared: Path, tar: Path) -> None:
        installed = worlds.install(wheel, os.path.realpath(sys.executable), scratch / "venv-root")
        with contextlib.ExitStack() as stack:
            layout = _layout(worlds.roots_of(scratch / "root"))
            watch = stack.enter_context(worlds.root_world(scratch, installed))
            stack.callback(self._take_down, "root", watch, installed)
            everybody: list[Contender] = [contenders.Berth(watch, installed, layout, shared)]
            self._note_python("root", watch.output(str(installed.python), "--version"))
            if self._peers:
                everybody += self._root_peers(stack, scratch, shared, tar)
            self._measure(Place("root", everybody, installed, shared, self._bulk_bytes, self._quick, _say), tar)

    def _root_peers(self, stack: contextlib.ExitStack, scratch: Path, shared: Path, tar: Path) -> list[Contender]:
        found: list[Contender] = []
        for name, program in (("podman", "podman"), ("lxc", "lxc-start"), ("nspawn", "systemd-nspawn")):
            if proc.find_program(program) is None:
                self.notes.append(f"{program} is not installed")
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
            everybody: list[Contender] = [contenders.Berth(watch, installed, ordinary.layout, shared)]
            if self._peers and not self._quick:
                everybody += self._user_peers(stack, scratch, shared, ordinary)
            self._note_python("user", watch.output(str(installed.python), "--version"))
            readable = scratch / "rootfs.tar"
            shutil.copyfile(tar, readable)
            self._measure(Place("user", everybody, installed, shared, self._bulk_bytes, self._quick, _say), readable)

    def _user_peers(
        self, stack: contextlib.ExitStack, scratch: Path, shared: Path, ordinary: Ordinary
    ) -> list[Contender]:
        self.notes.append("user: lxc and systemd-nspawn are measured as root only")
        if proc.find_program("podman") is None:
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
            everybody: list[Contender] = [contenders.Berth(watch, installed, layout, shared)]
            self.notes.append("the peers are only measured when root runs bench/run")
            self._note_python("user", watch.output(str(installed.python), "--version"))
            self._measure(Place("user", everybody, installed, shared, self._bulk_bytes, self._quick, _say), tar)

    # Measuring ----------------------------------------------------------------------------------------------------

    def _measure(self, place: Place, tar: Path) -> None:
        for contender in place.contenders:
            if contender.note:
                self.notes.append(f"{place.person}: {contender.name}: {contender.note}")
        for name, why in measures.set_up(place, tar).items():
            self.notes.append(f"{place.person}: {name} does not work here: {why}")
        for name in self._names:
            _say(f"bench: {place.person}: {name}")
            try:
                self.results += measures.BENCHMARKS[name](place)
            except BenchError as error:
                self.failed = True
                self.notes.append(f"{place.person}: {name} failed: {error}")
                _say(f"bench: {place.person}: {name}: {error}")
        with contextlib.suppress(BenchError):  # the worlds end what is left
            measures.finish(place)

    def _take_down(self, person: str, watch: Watch, installed: worlds.Installed) -> None:
        try:
            worlds.take_down(watch, installed)
        except BenchError as error:
            self.failed = True
            self.notes.append(f"{person}: berth could not be taken down: {error}")
            _say(f"bench: {person}: berth could not be taken down: {error}")

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
