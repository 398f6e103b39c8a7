"""Debian and Ubuntu from their package mirrors: `bootstrap:debian/bookworm`. Owns what such an image holds; layer 2.

mmdebstrap does the work. The mirror, the keyring and the proxy are the host's own, out of its apt configuration: berth
knows no mirror by itself. What is put in, and why, stands below beside each package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import threading
import urllib.parse
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import IO

from berth import userns
from berth.errors import BerthError, CommandError, InvalidArgumentError, UnsupportedError
from berth.host import os_release
from berth.names import parse_reference
from berth.oci import spec
from berth.oci.aptsources import AptSource, read_apt_sources
from berth.oci.rootfs import program_output, store_rootfs
from berth.oci.spec import Descriptor, Platform
from berth.oci.store import Ingest
from berth.proc import find_program, require_program, run
from berth.progress import Progress

ANNOTATION = "dev.berth.bootstrap"

_PACKAGES = (
    "dbus",  # systemctl and logind speak over it; also with the other inits
    "kmod",  # a VM's modules
    "udev",  # device units, and persistent names in a VM
    "iproute2", "iputils-ping", "netbase",  # ip, ss, ping; the names in /etc/services and /etc/protocols
    "procps", "passwd", "login",  # ps, top, free; accounts and sessions
    "sudo",  # the host user's twin becomes root by it
    "ca-certificates", "curl",  # TLS out of the box, and something that speaks it
    "less", "nano", "bash-completion",  # what a person at the shell reaches for
)  # fmt: skip
_INITS = {
    # libpam-systemd, dbus-user-session: sessions with XDG_RUNTIME_DIR and a user bus, which rootless podman needs.
    "systemd": ("systemd", "systemd-sysv", "libpam-systemd", "dbus-user-session"),
    "sysvinit": ("sysvinit-core", "initscripts", "sysv-rc"),
    "openrc": ("sysvinit-core", "initscripts", "openrc"),
}
# Where usrmerge would still convert the system, bringing 50 MB of Perl with it; later releases come merged.
_MERGED_USR_HOOKS = {"bookworm": "merged-usr", "jammy": "maybe-merged-usr"}
_HOOKS = Path("/usr/share/mmdebstrap/hooks")
_ROLLING = frozenset({"sid", "unstable"})  # they have neither -updates nor -security
_SUITES = {
    "debian": {
        "11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky", "stable": "trixie", "latest": "trixie",
        "testing": "testing", "unstable": "sid", "sid": "sid",
    },
    "ubuntu": {"20.04": "focal", "22.04": "jammy", "24.04": "noble", "25.10": "questing", "26.04": "resolute"},
}  # fmt: skip
_POCKETS = ("-updates", "-security")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9]+)?")
_NAME = re.compile(r"(debian|ubuntu)/([a-z]+)")
_HOST_APT = ("Acquire::Check-Valid-Until", "Acquire::Check-Date", "Acquire::Languages")


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """What to bootstrap: ``debian``, ``bookworm``, the init, and packages beyond the usual ones."""

    distribution: str
    suite: str
    init: str = "systemd"
    include: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.distribution}/{self.suite}"

    @property
    def packages(self) -> tuple[str, ...]:
        return (*_INITS[self.init], *_PACKAGES, *self.include)


def parse_recipe(text: str) -> Recipe:
    """Read ``debian/bookworm?include=git,vim&init=openrc``, what follows ``bootstrap:``."""
    name, _, query = text.partition("?")
    match = _NAME.fullmatch(name)
    if match is None:
        raise InvalidArgumentError(
            f"invalid distribution '{name}'", hint="write it as bootstrap:debian/bookworm or bootstrap:ubuntu/noble"
        )
    try:
        options = dict(urllib.parse.parse_qsl(query.replace("+", "%2B"), strict_parsing=bool(query)))
    except ValueError as error:
        raise InvalidArgumentError(f"invalid options '{query}' of bootstrap:{name}") from error
    unknown = set(options) - {"include", "init"}
    if unknown:
        raise InvalidArgumentError(f"invalid option '{min(unknown)}' of bootstrap:{name}", hint="include=… or init=…")
    init = options.get("init", "systemd")
    if init not in _INITS:
        raise InvalidArgumentError(f"invalid init '{init}'", hint=f"one of {', '.join(_INITS)}")
    include = tuple(filter(None, options.get("include", "").split(",")))
    for package in include:
        if not _PACKAGE.fullmatch(package):
            raise InvalidArgumentError(f"invalid package name '{package}'")
    return Recipe(match[1], _SUITES[match[1]].get(match[2], match[2]), init, include)


def is_bootstrappable(reference: str) -> str | None:
    """Map the full form of a distribution's official image to its bootstrap name: ``debian/bookworm``; None for others.

    ``docker.io/library/debian:12``, ``:bookworm``, ``:12-slim`` and ``:bookworm-slim`` are one to us.
    """
    parsed = parse_reference(reference)
    registry_path = parsed.path.removeprefix("docker.io/library/")
    suites = _SUITES.get(registry_path)
    if parsed.transport != "docker" or suites is None or parsed.tag is None or parsed.digest is not None:
        return None
    tag = parsed.tag.removesuffix("-slim")
    suite = suites.get(tag, tag if tag in suites.values() else None)
    return f"{registry_path}/{suite}" if suite else None


def fetch_bootstrap(recipe: Recipe, ingest: Ingest, *, platform: Platform | None, progress: Progress) -> Descriptor:
    """Make an image by mmdebstrap, complete in `ingest`; takes about 20 s.

    Raises UnsupportedError when this host can't, CommandError when mmdebstrap failed.
    """
    sources = check_host(recipe, platform)
    argv = mmdebstrap_command(recipe, sources, root=os.geteuid() == 0, host_apt=_host_apt())
    progress.step(f"bootstrapping {recipe.name}")
    annotations = {ANNOTATION: recipe.name, "dev.berth.init": recipe.init}
    said = _Said()
    try:
        # From a directory that the unshared user can enter, wherever we were started.
        with _listening(said, recipe, progress) as (stderr, ear):
            where = f"bootstrap:{recipe.name}"
            # It gets the pipe's other end as well: should we be killed, what it says at its clean-up must not end it.
            with program_output(argv, where=where, stderr=stderr, cwd=Path("/"), pass_fds=[ear]) as data:
                return store_rootfs(data, ingest, platform=platform, annotations=annotations)
    except CommandError as error:
        raise BerthError(
            f"bootstrapping {recipe.name} failed: {said.error or error.message}",
            hint="is the package mirror reachable? sudo apt-get update",
        ) from error


def plan_sources(recipe: Recipe, host: Sequence[AptSource], host_codename: str) -> list[AptSource]:
    """Choose the sources of a new system: the host's archive of that distribution, with the other suite.

    -updates and -security are taken over when the host has them. Raises UnsupportedError when the host has no source
    of that distribution.
    """
    known = {*_SUITES[recipe.distribution].values(), "stable", "oldstable", "unstable"}
    if _is_family(recipe.distribution):
        known.add(host_codename)
    chosen: list[AptSource] = []
    for source in host:
        base, pocket = _split_suite(source.suite)
        wanted = pocket == "" or recipe.suite not in _ROLLING
        if base in known and wanted and _is_archive(source, recipe.distribution):
            new = dataclasses.replace(source, suite=recipe.suite + pocket)
            if new not in chosen and not any((old.suite, old.uri) == (new.suite, new.uri) for old in chosen):
                chosen.append(new)
    if not any(source.suite == recipe.suite for source in chosen):
        raise UnsupportedError(
            f"the apt sources of this host name no {recipe.distribution.capitalize()} mirror",
            hint="add one to /etc/apt/sources.list.d, or take an image from a file: oci-archive:…, rootfs:…",
        )
    return chosen


def mmdebstrap_command(
    recipe: Recipe, sources: Sequence[AptSource], *, root: bool, host_apt: Mapping[str, str]
) -> list[str]:
    """Say how to make the root file system; its tar archive comes out on stdout."""
    kept = {key: value for key, value in host_apt.items() if key.startswith(_HOST_APT)}
    merged_usr = _MERGED_USR_HOOKS.get(recipe.suite)
    return [
        # If we are killed it is told to clean up; otherwise it would work on for nobody.
        "setpriv",
        "--pdeathsig=TERM",
        "--",
        # As root it would mount in the host's namespace; killed hard, it would leave that there.
        *(["unshare", "--mount", "--propagation=slave", "--"] if root else []),
        "mmdebstrap",
        f"--mode={'root' if root else 'unshare'}",
        "--variant=minbase",
        "--format=tar",
        *([f"--hook-dir={_HOOKS / merged_usr}"] if merged_usr else []),
        f"--include={','.join(recipe.packages)}",
        # Snapshots and mirrors that stand still are older than their files' validity; the signatures still count.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=Acquire::GzipIndexes "true"',
        *(f'--aptopt={key} "{value}"' for key, value in host_apt.items()),
        # A half-written system is thrown away anyway: dpkg need not wait for the disk.
        "--dpkgopt=force-unsafe-io",
        # So that `apt-get install` works in a new machine at once.
        "--skip=cleanup/apt/lists",
        f"--customize-hook={_finish_script(sources, kept)}",
        recipe.suite,
        "-",
        *(source.line() for source in sources),
    ]


def _finish_script(sources: Sequence[AptSource], host_apt: Mapping[str, str]) -> str:
    """Remove what is the builder's own and leave a usable apt; `$1` is the new root. The engine writes its names."""
    lines = ["set -e", 'cd "$1"']
    for keyring in sorted({source.signed_by for source in sources if source.signed_by}):
        quoted = shlex.quote(keyring)
        lines.append(
            f"test -e .{quoted} || {{ mkdir -p .{shlex.quote(str(Path(keyring).parent))}; cp {quoted} .{quoted}; }}"
        )
    settings = {"Acquire::GzipIndexes": "true", **host_apt}
    text = "".join(f'{key} "{value}";\n' for key, value in settings.items())
    return "; ".join([
        *lines,
        "rm -f etc/apt/apt.conf.d/99mmdebstrap etc/dpkg/dpkg.cfg.d/99mmdebstrap etc/ssh/ssh_host_*",
        "rm -f etc/hostname etc/resolv.conf",
        ": > etc/machine-id",
        f"printf %s {shlex.quote(text)} > etc/apt/apt.conf.d/90berth",
    ])  # fmt: skip


def check_host(recipe: Recipe, platform: Platform | None) -> list[AptSource]:
    """Find out whether this host can make it; return the sources it would get. Raises UnsupportedError."""
    _check_programs(platform)
    return plan_sources(recipe, read_apt_sources(), _host_codename())


def _check_programs(platform: Platform | None) -> None:
    require_program("mmdebstrap", package="mmdebstrap")
    if platform is not None and not platform.same(spec.host_platform()):
        raise UnsupportedError(f"only images for {spec.host_platform()} can be bootstrapped here, not for {platform}")
    if os.geteuid() != 0:
        require_program("newuidmap", package="uidmap")
        userns.plan_idmap(os.getuid(), os.getgid())  # raises, with the command that gives subordinate ids


def _host_codename() -> str:
    return os_release().get("VERSION_CODENAME", "")


def _is_family(distribution: str) -> bool:
    return os_release().get("ID") == distribution


def _host_apt() -> Mapping[str, str]:
    """Return the host's apt settings that reach the mirror or read it: proxies, and how it takes old files."""
    if find_program("apt-config") is None:
        return {}
    settings: dict[str, str] = {}
    for line in run(["apt-config", "dump"]).stdout.decode(errors="replace").splitlines():
        key, _, value = line.partition(" ")
        value = value.rstrip(";").strip('"')
        proxy = key.startswith(("Acquire::http", "Acquire::https")) and "::Proxy" in key
        if value and '"' not in value and (proxy or key.rstrip(":") in _HOST_APT):
            settings[key.rstrip(":")] = value
    return settings


def _is_archive(source: AptSource, distribution: str) -> bool:
    """Tell the distribution's own archive from the many others that also have a suite ``bookworm``."""
    path = urllib.parse.urlsplit(source.uri).path.rstrip("/")
    keyring = os.path.basename(source.signed_by).startswith(f"{distribution}-archive")
    named = os.path.basename(path).startswith(distribution) or f"/archive/{distribution}" in path
    return "main" in source.components and (keyring or named)


def _split_suite(suite: str) -> tuple[str, str]:
    for pocket in _POCKETS:
        if suite.endswith(pocket):
            return suite.removesuffix(pocket), pocket
    return suite, ""


class _Said:
    """What mmdebstrap says on stderr, read by a thread, as the archive comes out at the same time."""

    def __init__(self) -> None:
        self.error = ""  # the first: those after it are consequences

    def listen(self, pipe: IO[bytes], recipe: Recipe, progress: Progress) -> None:
        with pipe:
            for raw in pipe:
                line = raw.decode(errors="replace").strip()
                if line.startswith("I: ") and line.endswith("..."):
                    progress.step(f"bootstrapping {recipe.name}: {line[3:-3]}")
                elif line.startswith("E: "):
                    self.error = self.error or line[3:]


@contextlib.contextmanager
def _listening(said: _Said, recipe: Recipe, progress: Progress) -> Generator[tuple[int, int]]:
    """Yield both ends of a pipe for a program's stderr, writer first; at the end of the block all has been heard."""
    reader, writer = os.pipe()
    thread = threading.Thread(target=said.listen, args=(os.fdopen(reader, "rb"), recipe, progress), daemon=True)
    thread.start()
    try:
        yield writer, reader
    finally:
        os.close(writer)
        thread.join(timeout=10)  # a daemon that a package left behind may hold the other end
