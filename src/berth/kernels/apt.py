"""The distribution's own kernel for VMs, from its own package source; nothing is installed and nobody needs root.

apt finds, downloads and verifies: by the system's lists where there are some for this architecture, else, and when
those are out of date, by lists of our own, made anew from the system's sources in a folder that goes away again.
dpkg-deb opens the packages; of what comes out we take the kernel, its modules and e2fsck (`gather`). No script of a
package is run.
Source: apt.conf(5), apt-get(8), apt-cache(8), sources.list(5); doc/progress-reporting.md of apt for Status-Fd.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from berth import host
from berth.errors import BerthError, CommandError, DeadlineError, UnsupportedError
from berth.kernels.gather import Gathered, Gatherer
from berth.oci.aptsources import AptSource, read_apt_sources
from berth.oci.bootstrap import parse_recipe, plan_sources
from berth.oci.rootfs import program_output
from berth.oci.tar import FILE, TarReader
from berth.proc import Completed, find_program, run
from berth.progress import Progress

_LISTS = Path("/var/lib/apt/lists")
_UPDATE_S = 300.0
_DOWNLOAD_S = 1800.0
_NOT_FOUND = (0, 100)  # apt-cache's status for a package it does not know
_PACKAGES_MAX = 8
# What the distribution builds for VMs first (Debian, Ubuntu), then its general kernels, which also boot.
_NAMES = ("linux-image-cloud-{arch}", "linux-image-virtual", "linux-image-{arch}", "linux-image-generic")
# A metapackage leads to the image, and that, where the modules have a package of their own, to them.
_PART = re.compile(r"linux-(?:image|modules|binary)-[a-z0-9.+~-]+")
_CHECKER = "e2fsck-static"
_HINT = "is the package mirror reachable? or take a kernel of your own: --kernel PATH"


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """One package as apt's lists have it. size: bytes to download. needs: names, the first of each alternative."""

    name: str
    version: str
    size: int
    needs: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """A kernel that can be downloaded. packages: the kernel's, its image first; checker: e2fsck's, if there is one."""

    apt: Apt
    packages: tuple[Package, ...]
    checker: Package | None

    @property
    def source(self) -> str:
        """Name it so that another build of the same version has another name."""
        return f"{self.packages[0].name} {self.packages[0].version}"

    def gather(self, folder: Path, progress: Progress) -> Gathered:
        """Download and unpack it into `folder`, which is empty. Raises BerthError; `folder` then holds waste."""
        wanted = [*self.packages, *([self.checker] if self.checker else [])]
        progress.step(f"downloading {self.packages[0].name}")
        files = self.apt.download(wanted, progress)
        progress.step(f"unpacking {self.packages[0].name}")
        gatherer = Gatherer(folder)
        for file in files:
            _unpack(file, gatherer)
        if self.checker is None:
            progress.note(
                f"there is no package {_CHECKER}: a root disk that is not clean can't be checked before it is mounted"
            )
        return Gathered(gatherer.version(), self.source)


def is_there() -> bool:
    """Say whether this host takes its software from packages that we can open."""
    return all(find_program(name) for name in ("apt-get", "apt-cache", "dpkg-deb"))


def offers(arch: str, work: Path, progress: Progress) -> Iterator[Offer]:
    """Find the newest kernel by the system's lists, and for who asks again, as those were out of date, by new lists.

    work: a folder for apt's own files, which the caller removes. Raises UnsupportedError when there is no kernel,
    BerthError when the lists can't be had.
    """
    progress.step(f"looking for a kernel for linux/{arch}")
    if arch == host.architecture() and any(_LISTS.glob("*Packages*")):
        offer = _find(Apt(work / "system", arch, None))
        if offer:
            yield offer
    progress.step(f"reading the package lists for linux/{arch}")
    apt = Apt(work / "own", arch, _sources())
    apt.update()
    offer = _find(apt)
    if offer is None:
        raise UnsupportedError(
            f"the apt sources of this host have no kernel for linux/{arch}",
            hint="add a source that has one to /etc/apt/sources.list.d, or take a kernel of your own: --kernel PATH",
        )
    yield offer


def _sources() -> list[AptSource]:
    """Choose the distribution's own archive among the system's sources; all of them where it can't be told."""
    everything = read_apt_sources()
    try:
        names = host.os_release()
        suite = names.get("VERSION_CODENAME", "")
        return plan_sources(parse_recipe(f"{names.get('ID', '')}/{suite}"), everything, suite)
    except BerthError:
        return everything


def _find(apt: Apt) -> Offer | None:
    for name in _NAMES:
        packages = resolve(name.format(arch=apt.arch), apt.show)
        if packages:
            return Offer(apt, packages, apt.show(_CHECKER))
    return None


def resolve(name: str, show: Callable[[str], Package | None]) -> tuple[Package, ...]:
    """Follow a metapackage to the packages that hold the image and its modules, the image first.

    () when one is missing. A package is a metapackage when it needs another image.
    """
    found: dict[str, Package] = {}
    waiting = [name]
    while waiting and len(found) < _PACKAGES_MAX:
        package = show(waiting.pop(0))
        if package is None:
            return ()
        found[package.name] = package
        waiting += [need for need in package.needs if _PART.fullmatch(need) and need not in found]
    parts = [package for package in found.values() if not any(map(_is_image, package.needs))]
    return tuple(sorted(parts, key=lambda package: not _is_image(package.name)))


def _is_image(name: str) -> bool:
    return name.startswith("linux-image-")


class Apt:
    """apt for one architecture, told by a configuration file of ours to leave the system alone.

    sources: what lists of our own are made of; None: the system's own lists.
    """

    def __init__(self, folder: Path, arch: str, sources: Sequence[AptSource] | None) -> None:
        self._folder = folder
        self.arch = arch
        for name in ("lists/partial", "cache/archives/partial", "packages"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        if sources is not None:
            (folder / "sources.list").write_text("".join(f"{source.line()}\n" for source in sources))
        (folder / "apt.conf").write_text(configuration(folder, arch, own_lists=sources is not None))

    def update(self) -> None:
        """Fetch the lists. A source of several that fails is passed over. Raises BerthError when none can be had."""
        done = self._run(["apt-get", "-q", "update"], timeout_s=_UPDATE_S, success=_NOT_FOUND)
        if not any((self._folder / "lists").glob("*Packages*")):
            # apt calls a mirror that does not answer a warning, and is content.
            said = [
                line[3:] for line in done.stderr.decode(errors="replace").splitlines() if line[:3] in ("W: ", "E: ")
            ]
            raise BerthError(f"the package lists can't be had: {said[0] if said else 'apt-get gives none'}", hint=_HINT)

    def show(self, name: str) -> Package | None:
        """Look a package up: its newest version; None when the lists have none."""
        said = self._run(["apt-cache", "show", "--no-all-versions", name], timeout_s=60.0, success=_NOT_FOUND)
        return parse_package(said.stdout.decode(errors="replace")) if said.status == 0 else None

    def download(self, packages: Sequence[Package], progress: Progress) -> list[Path]:
        """Fetch package files, which apt verifies by the signed lists. Raises BerthError."""
        target = self._folder / "packages"
        total = sum(package.size for package in packages)
        words = [f"{package.name}={package.version}" for package in packages]
        with _status(progress, total) as (writer, ear):
            argv = ["apt-get", "-q", "-o", f"APT::Status-Fd={writer}", "download", *words]
            self._run(argv, timeout_s=_DOWNLOAD_S, cwd=target, pass_fds=[writer, ear])
        return sorted(target.glob("*.deb"))

    def _run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        success: Sequence[int] = (0,),
        cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Completed:
        # Should we be killed, it must not go on downloading for nobody.
        prefix = ["setpriv", "--pdeathsig=TERM", "--"] if find_program("setpriv") else []
        env = {"APT_CONFIG": str(self._folder / "apt.conf")}
        try:
            return run([*prefix, *argv], timeout_s=timeout_s, success=success, env=env, cwd=cwd, pass_fds=pass_fds)
        except CommandError as error:
            said = [line[3:] for line in error.stderr.splitlines() if line.startswith("E: ")]
            raise BerthError(f"{argv[0]} failed: {said[0] if said else error.message}", hint=_HINT) from error
        except DeadlineError as error:
            raise BerthError(error.message, hint=_HINT) from error


def configuration(folder: Path, arch: str, *, own_lists: bool) -> str:
    """Write apt's configuration: what of the system's it shall not use. It is read after the system's own."""
    lines = [
        "#clear APT::Update;",  # the system's hooks are not meant for us
        f'APT::Architecture "{arch}";',
        "#clear APT::Architectures;",
        f'APT::Architectures {{ "{arch}"; }};',
        'APT::Get::AllowUnauthenticated "false";',
        'APT::Sandbox::User "root";',  # our folders are nobody else's; without root there is no change of user anyway
        'Acquire::AllowInsecureRepositories "false";',
        'Acquire::Languages "none";',
        'Acquire::Retries "2";',
        'Acquire::http::Timeout "30";',
        'Acquire::https::Timeout "30";',
        f'Dir::Cache "{folder}/cache";',
    ]
    if own_lists:
        lines += [
            f'Dir::State "{folder}";',
            f'Dir::State::lists "{folder}/lists";',
            f'Dir::State::status "{folder}/status";',
            f'Dir::Etc::sourcelist "{folder}/sources.list";',
            'Dir::Etc::sourceparts "/dev/null";',
            'Dir::Etc::preferences "/dev/null";',  # pins of the system's are about what it installs
            'Dir::Etc::preferencesparts "/dev/null";',
        ]
    return "".join(f"{line}\n" for line in lines)


def parse_package(text: str) -> Package | None:
    """Read the first stanza of what apt-cache shows. Source: deb-control(5)."""
    fields: dict[str, str] = {}
    for line in text.partition("\n\n")[0].splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith((" ", "\t")):
            fields[name.lower()] = value.strip()
    match = re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", fields.get("package", ""))
    if match is None or not re.fullmatch(r"[0-9A-Za-z.+:~-]+", fields.get("version", "")):
        return None
    size = fields.get("size", "")
    needs = [word.partition("|")[0].split("(")[0].strip() for word in fields.get("depends", "").split(",")]
    return Package(match[0], fields["version"], int(size) if size.isdecimal() else 0, tuple(filter(None, needs)))


@contextlib.contextmanager
def _status(progress: Progress, total: int) -> Generator[tuple[int, int]]:
    """Yield both ends of a pipe for apt's status, writer first; what comes is shown as progress."""
    reader, writer = os.pipe()
    thread = threading.Thread(target=_listen, args=(reader, progress, total), daemon=True)
    thread.start()
    try:
        yield writer, reader
    finally:
        os.close(writer)
        thread.join(timeout=10)


def _listen(reader: int, progress: Progress, total: int) -> None:
    with open(reader, "rb") as pipe:
        for line in pipe:
            if done := parse_status(line.decode(errors="replace")):
                progress.advance(int(total * done), total or None)


def parse_status(line: str) -> float:
    """Read ``dlstatus:1:45.6:Retrieving file 1 of 1``: how much is done, from 0 to 1."""
    match = re.match(r"dlstatus:\d+:(\d{1,3}(?:\.\d+)?):", line)
    return min(1.0, float(match[1]) / 100) if match else 0.0


def _unpack(package: Path, gatherer: Gatherer) -> None:
    """Take out of a package what belongs to a kernel. Raises BerthError when it is damaged."""
    argv = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with tempfile.TemporaryFile() as said, program_output(argv, where=package.name, stderr=said.fileno()) as data:
        reader = TarReader(data)
        for entry in reader:
            path = os.fsdecode(entry.name).removeprefix("./")
            target = gatherer.place(path) if entry.kind == FILE and entry.sparse is None else None
            if target is not None:
                gatherer.write(target, reader.pieces())
        data.drain()
