"""What a test run must not leave behind: processes, mounts, interfaces, namespaces, control groups, tables, files.

`Snapshot.take` before and after, `compare` names what is new. Where other things run on the machine too (see
tests/support.py, BERTH_TEST_ALONE) only what bears this session's mark is looked at.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from berth import proc
from berth.check.cgroups import parse_mounts

# Programs that berth starts: a new process of one of them is a leak, whoever its parent is.
_OURS = re.compile(rb"berth|\b(crun|pasta|passt|dnsmasq|mmdebstrap|qemu-system-\w+|virtiofsd|buildah)\b")
_PLACES = (
    "/run/berth",
    "/run/berth-hosts",
    "/var/lib/berth",
    "/var/cache/berth",
    "/etc/berth",
    "/run/netns",
    "/run/crun",
)
# The day's images (images.py), pytest's own folders, which it rotates, and Node's cache of compiled code.
_NOT_OURS = re.compile(r"berth-tests-|pytest-of-|node-compile-cache|\.X|systemd-private-")
_PATIENCE_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """What is there: one set of plain descriptions for each kind of thing."""

    things: dict[str, frozenset[str]]

    @classmethod
    def take(cls, folder: Path, *, alone: bool) -> Snapshot:
        """Look around. folder: the session's own, whose path marks what is this session's."""
        mark = os.fsencode(folder)
        looks: dict[str, Callable[[], Iterator[str]]] = {
            "process": lambda: _processes(mark, alone=alone),
            "mount": lambda: _mounts(str(folder), alone=alone),
        }
        if alone:
            looks |= {
                "network interface": _interfaces,
                "control group": _cgroups,
                "nftables table": _tables,
                "loop device": _loops,
                "file": _files,
            }
        return cls({kind: frozenset(look()) for kind, look in looks.items()})


def compare(before: Snapshot, after: Snapshot) -> list[str]:
    """Name what is new, sorted, one line each."""
    return sorted(f"{kind}: {thing}" for kind, things in after.things.items() for thing in things - before.things[kind])


def settle(before: Snapshot, folder: Path, *, alone: bool) -> list[str]:
    """Compare until nothing is left or a few seconds are over: what is being taken down may take that long."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        left = compare(before, Snapshot.take(folder, alone=alone))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def remove_tree(folder: Path) -> None:
    """Remove a folder of the tests, but never anything through a mount that was left in it (the home, bind-mounted)."""
    mounted = [target for target in _mount_targets() if target.is_relative_to(folder)]
    for target in reversed(mounted):
        proc.run(["umount", "--lazy", "--no-canonicalize", str(target)], timeout_s=30, success=range(256))
    left = [target for target in _mount_targets() if target.is_relative_to(folder)]
    assert not left, f"mounts that can't be taken away: {left}"
    shutil.rmtree(folder)
    assert not mounted, f"mounts were left: {mounted}"


def _mount_targets() -> list[Path]:
    # Source: proc(5), mountinfo: blanks and backslashes are written in octal.
    targets = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), target)) for target in targets]


def _processes(mark: bytes, *, alone: bool) -> Iterator[str]:
    own = os.getpid()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # Source: proc(5), stat: the parent is the 2nd field after the name's bracket, the start time the 20th.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:  # it ended meanwhile, or it is another user's
            continue
        is_child = int(fields[1]) == own
        is_marked = mark in command or b"BERTH_TEST_SESSION=" + mark + b"\0" in environment
        is_ours = alone and _OURS.search(command) is not None
        if int(folder.name) != own and (is_child or is_marked or is_ours):
            text = command.replace(b"\0", b" ").decode(errors="replace").strip() or f"(state {fields[0]})"
            yield f"{folder.name} started {fields[19]}: {text[:200]}"


def _mounts(mark: str, *, alone: bool) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if alone or mark in line:
            yield line.partition(" ")[2]  # without the mount's number, which the kernel uses again


def _interfaces() -> Iterator[str]:
    if proc.find_program("ip"):
        links = json.loads(proc.run(["ip", "-j", "link"], timeout_s=10).stdout or b"[]")
        yield from (str(link["ifname"]) for link in links)


def _cgroups() -> Iterator[str]:
    mounts = parse_mounts(Path("/proc/self/mountinfo").read_text())
    for root in {*mounts.legacy.values(), *([mounts.unified] if mounts.unified else [])}:
        for folder, names, _files in os.walk(root):
            yield from (os.path.join(folder, name) for name in names if "berth" in name)


def _tables() -> Iterator[str]:
    if os.geteuid() == 0 and proc.find_program("nft"):
        lines = proc.run(["nft", "list", "tables"], timeout_s=10).stdout.decode().splitlines()
        yield from (line for line in lines if "berth" in line)


def _loops() -> Iterator[str]:
    for folder in Path("/sys/block").glob("loop*/loop"):
        try:
            yield f"{folder.parent.name}: {(folder / 'backing_file').read_text().strip()}"
        except OSError:
            continue


def _files() -> Iterator[str]:
    for folder in ("/tmp", "/var/tmp"):
        yield from (f"{folder}/{name}" for name in os.listdir(folder) if not _NOT_OURS.match(name))
    for place in _PLACES:
        if os.path.lexists(place):
            yield place
        if os.path.isdir(place):
            yield from (f"{place}/{name}" for name in os.listdir(place))
