"""Faults on purpose: a berth command whose process is killed, or whose system call fails, at a point that can be named.

A point is text, `SCENARIO:VICTIM:NUMBER`, and means the same again when it is replayed:

    start:cli.rename:2          the command itself dies at its second rename (strace)
    start:cli.mkdir=ENOSPC:1    its first mkdir fails, as on a full disk
    start:crun.mount:3          the first program of that name on PATH dies at its third mount
    start:@keeper:40            a process that is known by its command line dies 40 ms after it was first seen

`World.strike` brings a point about, `World.problems` looks at what is left. Used by tests/integration/test_kills.py.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from berth import proc
from berth.check.cgroups import parse_mounts
from berth.net.addresses import bridge_name, port_prefix
from berth.net.firewall import remove_rules
from berth.net.plan import table_name
from berth.net.subnet import parse_ip
from person import Person

NAME = "victim"  # the machine that every scenario is about
BYSTANDER = "bystander"  # a running one, which no scenario may touch
_ANSWER_S = 180.0
_SETTLE_S = 5.0
# What changes something, or hands it over: between two of them nothing can have happened. "?": where there is such.
_CHANGES = (
    "execve", "clone", "clone3", "fork", "vfork", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink",
    "unlinkat", "rmdir", "link", "linkat", "symlink", "symlinkat", "mknod", "mknodat", "fsync", "fdatasync",
    "ftruncate", "fallocate", "flock", "write", "pwrite64", "writev", "copy_file_range", "sendfile", "sendto",
    "sendmsg", "connect", "bind", "listen", "mount", "umount2", "setns", "unshare", "move_mount", "mount_setattr",
    "chmod", "fchmod", "fchmodat", "chown", "fchown", "fchownat", "kill", "pidfd_send_signal", "wait4", "waitid",
    "prctl", "setresuid", "dup2", "pivot_root",
)  # fmt: skip
# What a file system refuses when it is full, or can't be written.
_FILE_CHANGES = (
    "mkdir", "mkdirat", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "mknod", "mknodat",
    "fsync", "fdatasync", "ftruncate", "fallocate", "copy_file_range", "bind", "chmod", "fchmod", "fchmodat",
)  # fmt: skip
# Of the programs that berth starts: what one of them may be doing, and how often at most.
_PROGRAM_CALLS = {"execve": 1, "write": 4, "mount": 12, "clone": 2, "clone3": 2, "setns": 1, "sendmsg": 4, "mkdirat": 4}
_SEEN = {
    "inside": b"berth.inside", "keeper": b"\0keeper\0", "holder": b"\0pause\0", "dnsmasq": b"dnsmasq\0",
    "pasta": b"pasta", "virtiofsd": b"virtiofsd", "qemu": b"qemu-system-", "passt": b"passt\0",
    "buildah": b"buildah", "mmdebstrap": b"mmdebstrap", "init": b"",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """Where something is done to whom; see the module's docstring."""

    scenario: str
    victim: str
    number: int

    @classmethod
    def parse(cls, text: str) -> Point:
        scenario, victim, number = text.split(":")
        return cls(scenario, victim, int(number))

    def __str__(self) -> str:
        return f"{self.scenario}:{self.victim}:{self.number}"


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """One command and what must be there before it. helpers: whom else it can lose; with a most of milliseconds.

    Words: IMAGE is known and unpacked, FRESH is not, and both are root file systems that boot; NOINIT has none to boot.
    """

    before: Sequence[str]
    command: str
    helpers: Sequence[str]


_CREATED = f"create IMAGE --name {NAME} --no-boot"
_BOOTED = f"create IMAGE --name {NAME}"
_STARTERS = ("@inside:150", "@keeper:120", "crun", "ip", "nsenter", "dnsmasq")
SCENARIOS = {
    "create": Scenario([], _BOOTED, _STARTERS),
    "create-fresh": Scenario([], f"create FRESH --name {NAME} --no-boot", ["@inside:200"]),
    "start": Scenario([_CREATED], f"start {NAME}", _STARTERS),
    "run": Scenario([_CREATED], f"run -n {NAME} -- true", _STARTERS),
    "run-more": Scenario([_BOOTED], f"run -n {NAME} -- sleep 0.2", ["@keeper:200", "@init:200"]),
    "stop": Scenario([_BOOTED], f"stop -t 1 {NAME}", ["@keeper:900", "@init:900", "@dnsmasq:500"]),
    "restart": Scenario([_BOOTED], f"restart -f {NAME}", [*_STARTERS, "@init:100"]),
    "rm": Scenario([_CREATED], f"rm {NAME}", ["@inside:100"]),
    "rm-force": Scenario([_BOOTED], f"rm --force {NAME}", ["@keeper:200", "@init:200"]),
    "set": Scenario([_CREATED], f"set -n {NAME} cpus=1", []),
    "ls": Scenario([_BOOTED], "ls", ["@keeper:200"]),
    "prune": Scenario(["image import FRESHTAR local/fresh:1", "image rm local/fresh:1", _CREATED], "system prune", []),
    "import": Scenario([], "image import FRESHTAR local/fresh:1", []),
    "pull": Scenario([], "image pull REGISTRY/fresh:1", []),
    "commit": Scenario([_CREATED], f"commit {NAME} local/fresh:1", ["@inside:150"]),
    "adapt": Scenario([], f"create NOINIT --name {NAME} --no-boot", _STARTERS),
    "build": Scenario([], "build -t local/fresh:1 CONTEXT", ["@buildah:3000", "@inside:3000"]),
}


def choose(seed: int, rounds: int, scenarios: Sequence[str], record: Callable[[str], Sequence[str]]) -> Iterator[Point]:
    """Draw points: each scenario as often as the others, the command itself as often as all its helpers together.

    record: gives the system calls of a scenario's command, in order (`World.record`).
    """
    dice = random.Random(seed)
    for number in range(rounds):
        name = scenarios[number % len(scenarios)]
        helper = dice.choice([*SCENARIOS[name].helpers, ""])
        kind = dice.choice(["kill", "kill", "ENOSPC", "EROFS", *(["helper"] * 4 if helper else [])])
        if kind != "helper":
            calls = [call for call in record(name) if kind == "kill" or call in _FILE_CHANGES]
            if not calls:  # it changes no file
                kind, calls = "kill", list(record(name))
            position = dice.randrange(len(calls))
            error = "" if kind == "kill" else f"={kind}"
            yield Point(name, f"cli.{calls[position]}{error}", calls[: position + 1].count(calls[position]))
        elif helper.startswith("@"):
            victim, _, most = helper.partition(":")
            yield Point(name, victim, dice.randint(1, int(most)))
        else:
            call = dice.choice(list(_PROGRAM_CALLS))
            yield Point(name, f"{helper}.{call}", dice.randint(1, _PROGRAM_CALLS[call]))


@dataclasses.dataclass(frozen=True, slots=True)
class Struck:
    """What a struck command left: its status (negative: the signal) and what it said on stderr."""

    status: int
    said: str


class World:
    """One person's machines for the time of some points. folder: for what strikes need; the person can read it."""

    def __init__(self, person: Person, folder: Path, images: Mapping[str, str]) -> None:
        self.person = person
        self._folder = folder
        self._images = images
        self._temporary = folder / "tmp"
        for path in (folder, self._temporary):
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
        os.chown(self._temporary, person.uid, -1)
        self._env = {"TMPDIR": str(self._temporary)}
        self._ids: set[str] = set()
        self._recorded: dict[str, Sequence[str]] = {}
        self._image_ids = self._stored()
        self._index = (person.layout.images / "index.json").read_bytes()
        self.berth(*self._words(_BOOTED.replace(NAME, BYSTANDER)))
        self._init = person.main_pid(BYSTANDER)
        self.berth(*self._words(_BOOTED))  # once, so that what stays for good is there
        self._remember_ids()
        self._clear()
        self._before = self._inventory()

    # Striking -----------------------------------------------------------------------------------------------------

    def prepare(self, point: Point) -> None:
        """Bring about what the point's scenario starts from."""
        for text in SCENARIOS[point.scenario].before:
            self.berth(*self._words(text))
        self._remember_ids()

    def strike(self, point: Point) -> Struck:
        """Run the scenario's command and let its victim meet its end; return when the command has ended."""
        words = [*self.person.program, *self._words(SCENARIOS[point.scenario].command)]
        aim, _, error = point.victim.partition("=")
        victim, _, call = aim.partition(".")
        env = dict(self._env)
        if victim == "cli":
            words = [*_strace(call, f"error={error}" if error else "signal=KILL", point.number), *words]
        elif not victim.startswith("@"):
            env["PATH"] = self._shim(victim, call, point.number)
        argv = self.person.command(words, env, None)
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            if victim.startswith("@"):
                self._hunt(victim[1:], point.number / 1000, process)
            try:
                said, _ = process.communicate(timeout=_ANSWER_S)
            except subprocess.TimeoutExpired:
                process.kill()
                return Struck(-1, f"it hung for {_ANSWER_S} s")
        return Struck(process.returncode, said.decode(errors="replace"))

    def record(self, scenario: str) -> Sequence[str]:
        """List the system calls that change something in a scenario's command, in order; it is run once for that."""
        if scenario not in self._recorded:
            self.prepare(Point(scenario, "", 0))
            path = self._temporary / "calls"
            words = ["strace", "-D", "-qq", "-o", str(path), "-e", f"trace={_names(_CHANGES)}", *self.person.program]
            argv = self.person.command([*words, *self._words(SCENARIOS[scenario].command)], self._env, None)
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ANSWER_S, check=False)
            assert done.returncode == 0, done.stderr
            found = [line.partition("(")[0] for line in path.read_text().splitlines() if re.match(r"\w+\(", line)]
            path.unlink()
            self._recorded[scenario] = found[1:]  # without the execve that makes it berth
            self._clear()
        return self._recorded[scenario]

    def _shim(self, program: str, call: str, number: int) -> str:
        """Put a program of that name before the real one on the person's PATH; return that PATH."""
        shims = self._folder / "shims"
        shutil.rmtree(shims, ignore_errors=True)
        shims.mkdir(mode=0o755)
        real = proc.require_program(program, package=program)
        words = " ".join(_strace(call, "signal=KILL", number))
        (shims / program).write_text(f'#!/bin/sh\nexec {words} {real} "$@"\n')
        (shims / program).chmod(0o755)
        path = os.environ["PATH"] if self.person.is_root else "/usr/local/bin:/usr/bin:/bin"
        return f"{shims}:{path}"

    def _hunt(self, victim: str, delay_s: float, process: subprocess.Popen[bytes]) -> None:
        """Kill a process of ours that looks like `victim`, some time after it was first seen."""
        pattern = _SEEN[victim]
        pid = self._init_of_victim() if victim == "init" else None
        while pid is None and process.poll() is None:
            found = [*self._descendants(process.pid), *(pid for pid, _ in self._marked())]
            pid = next((one for one in found if _is_victim(_command_line(one), pattern)), None)
            time.sleep(0.005)
        if pid is None:
            return
        time.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            if victim == "init" or _is_victim(_command_line(pid), pattern):  # still that one
                os.kill(pid, signal.SIGKILL)

    def _init_of_victim(self) -> int | None:
        return self.person.pids(NAME)["vmm" if self.person.isolation == "vm" else "init"]

    def _descendants(self, pid: int) -> Iterator[int]:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                    yield int(child)
                    yield from self._descendants(int(child))

    def storm(self, commands: Sequence[str]) -> list[str]:
        """Run commands at once; say which neither succeeded nor said in one line why not."""
        running: list[tuple[str, subprocess.Popen[bytes]]] = []
        for text in commands:
            argv = self.person.command([*self.person.program, *self._words(text)], self._env, None)
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            running.append((text, process))
        found: list[str] = []
        for text, process in running:
            said = process.communicate(timeout=_ANSWER_S)[1].decode(errors="replace")
            lines = [line for line in said.splitlines() if line.startswith("berth: ")]
            is_clear = len(lines) == (process.returncode != 0) and "Traceback" not in said
            if not is_clear or "internal error" in said:
                found.append(f"{text}: {process.returncode}: {said}")
        return found

    def reboot(self) -> None:
        """Take away what a reboot takes: processes, interfaces, rules, control groups, the runtime directory."""
        self._remember_ids()
        listed = cast("list[dict[str, dict[str, int]]]", json.loads(self.berth("ls", "--format", "json")))
        layout = self.person.layout
        doomed = {pid for item in listed for pid in item["pids"].values() if pid} | {pid for pid, _ in self._marked()}
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.person.is_root:
            bridge = bridge_name(layout)
            proc.run(["ip", "link", "delete", "dev", bridge], success=range(256))
            remove_rules(table_name(bridge), list)
        self._wait_for_the_end(doomed)
        for root in (layout.runtime, layout.hub_hosts):
            if root.exists():
                shutil.rmtree(root)

    def _wait_for_the_end(self, doomed: set[int]) -> None:
        deadline = time.monotonic() + _ANSWER_S
        while any(proc.start_time(pid) for pid in doomed):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for folder in list(self._control_groups()):
            # Children first: the machine's init has made some of its own.
            for path, _, _ in os.walk(folder, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(path)

    def bystander_is_new(self) -> None:
        """Take the bystander as it is now for what must not change."""
        self._init = self.person.main_pid(BYSTANDER)

    # Looking ------------------------------------------------------------------------------------------------------

    def problems(self, struck: Struck) -> list[str]:
        """Check all that must hold after a strike; put everything back; say what did not hold."""
        self._remember_ids()
        found = [f"the command: {struck.said}"] if "Traceback" in struck.said or "internal error" in struck.said else []
        if struck.status > 0 and not re.search(r"^berth: ", struck.said, re.MULTILINE):
            found.append(f"the command failed without a word: {struck}")
        if struck.status == -1:
            found.append(struck.said)
        listed: dict[str, dict[str, object]] = {}
        steps = (
            lambda: self._check_list(listed), lambda: self._check_victim(listed), self._clear, self._check_bystander,
            self._check_left,
        )  # fmt: skip
        for step in steps:
            try:
                found += step() or []
            except AssertionError as error:
                found.append(str(error))
        return found

    def _check_list(self, listed: dict[str, dict[str, object]]) -> list[str]:
        """All machines are listed, none but ours; the bystander runs on. listed: filled, by name."""
        listed |= {item["name"]: item for item in json.loads(self.berth("ls", "--format", "json"))}
        found = [f"{name} is listed" for name in listed if name not in (NAME, BYSTANDER)]
        bystander = listed.get(BYSTANDER, {})
        pids = cast("dict[str, int]", bystander.get("pids", {}))
        if bystander.get("status") != "running" or self._init not in pids.values():
            found.append(f"the bystander: {bystander}")
        if NAME in listed and listed[NAME]["status"] not in ("running", "stopped", "broken"):
            found.append(f"the machine: {listed[NAME]}")
        return found

    def _check_victim(self, listed: dict[str, dict[str, object]]) -> list[str]:
        """The machine is absent, or whole, or made whole by the next command."""
        if NAME not in listed:
            return []
        said = self.berth("run", "-n", NAME, "--root", "--", "/bin/sh", "-c", "ls /etc/inittab && echo whole")
        well = said == "/etc/inittab\nwhole\n" and listed[NAME]["cpus"] in (listed[BYSTANDER]["cpus"], 1)
        return [] if well else [f"the machine is not whole: {said} {listed[NAME]}"]

    def _check_bystander(self) -> list[str]:
        said = self.berth("run", "-n", BYSTANDER, "--", "echo", "untouched")
        return [] if said == "untouched\n" else [f"the bystander says {said}"]

    def _check_left(self) -> list[str]:
        deadline = time.monotonic() + _SETTLE_S
        while True:
            now = self._inventory()
            left = [f"left: {thing}" for thing in (now - self._before).elements()]
            gone = [f"gone: {thing}" for thing in (self._before - now).elements()]
            if not (left or gone) or time.monotonic() > deadline:
                self._before = now  # or every later point would tell it again
                return left + gone
            time.sleep(0.1)

    def _clear(self) -> None:
        self._remember_ids()
        self._put_back()

    def _put_back(self) -> None:
        """Take the scenario's machine and images away, as a person would."""
        if os.path.lexists(self.person.layout.machines / NAME):
            self.berth("rm", "--force", NAME)
        if (self.person.layout.images / "index.json").read_bytes() != self._index:
            for reference in self._stored() - self._image_ids:
                self.berth("image", "rm", reference)
        self.berth("system", "prune")

    def _stored(self) -> set[str]:
        return {
            str(item.get("reference") or item["digest"])
            for item in json.loads(self.berth("image", "ls", "--format", "json"))
        }

    def _inventory(self) -> collections.Counter[str]:
        """Describe all that is there of this person's, without numbers that are different each time."""
        things = [*self._files(), *self._cgroups(), *self._namespaces(), *self._ports(), *self._mounts()]
        things += [f"process: {_words_of(line)}" for _, line in self._marked()]
        things.append(f"addresses of: {sorted(json.loads(self.person.layout.addresses.read_text())['machines'])}")
        return collections.Counter(things)

    @property
    def _roots(self) -> list[str]:
        layout = self.person.layout
        return [str(path) for path in (layout.data, layout.runtime, layout.config, layout.cache)]

    def _marked(self) -> Iterator[tuple[int, bytes]]:
        """Find the processes that name one of our directories."""
        marks = [os.fsencode(root) for root in self._roots]
        for name in os.listdir("/proc"):
            if name.isdecimal() and int(name) != os.getpid():
                line = _command_line(int(name))
                if any(mark in line for mark in marks) and not line.startswith(b"strace"):
                    yield int(name), line

    def _files(self) -> Iterator[str]:
        # What a machine or an image holds; and a cache, which an image may leave something in.
        lasting = re.compile(r"(^|\.)lock$|^build$")
        machine = re.compile(r"/machines/[^/]+/(container|vm)$|/rootfs$|/storage$|/inspections$")
        for root in (*self._roots, str(self.person.layout.hub_hosts), str(self._temporary)):
            for folder, folders, files in os.walk(root):
                yield from (f"file: {folder}/{name}" for name in (*folders, *files) if not lasting.search(name))
                folders[:] = [name for name in folders if not machine.search(f"{folder}/{name}")]

    def _cgroups(self) -> Iterator[str]:
        """Count the control groups of our machines, those of machines that are gone included; each start makes one."""
        return (f"control group in {os.path.dirname(path)}" for path in self._control_groups())

    def _control_groups(self) -> Iterator[str]:
        mounts = parse_mounts(Path("/proc/self/mountinfo").read_text())
        for root in {*mounts.legacy.values(), *([mounts.unified] if mounts.unified else [])}:
            for folder, names, _ in os.walk(root):
                yield from (f"{folder}/{name}" for name in names if name[6:18] in self._ids)

    def _remember_ids(self) -> None:
        """Note the ids of all machines, half-made ones too, whose traces have to go with them."""
        for folder in os.listdir(self.person.layout.machines):
            with contextlib.suppress(OSError, ValueError):
                text = (self.person.layout.machines / folder / "config.json").read_text()
                self._ids.add(json.loads(text)["id"][:12])

    def _namespaces(self) -> Iterator[str]:
        """Count the mount namespaces in which something of ours is mounted: each container, each folder server."""
        marks, seen = [f" {root}/" for root in self._roots], set[str]()
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                namespace = os.readlink(f"/proc/{name}/ns/mnt") if name.isdecimal() else ""
                if namespace and namespace not in seen:
                    seen.add(namespace)
                    if any(mark in Path(f"/proc/{name}/mountinfo").read_text() for mark in marks):
                        yield "mount namespace"

    def _ports(self) -> Iterator[str]:
        book = json.loads(self.person.layout.addresses.read_text())
        prefix = port_prefix(parse_ip(book["machines"][BYSTANDER]))
        enter: list[str] = []
        if not self.person.is_root:
            holder = json.loads(self.person.layout.hub_record.read_text())["holder"]
            enter = ["nsenter", "-t", str(holder["pid"]), "-n", "--"]
        links = json.loads(proc.run([*enter, "ip", "-j", "link"], timeout_s=20).stdout)
        # Another worker's berth may have come to the same subnet while a reboot had taken our bridge away.
        own = {None, bridge_name(self.person.layout)} if self.person.is_root else {link.get("master") for link in links}
        ports = (link["ifname"] for link in links if link.get("master") in own)
        yield from (f"interface: {name}" for name in ports if name.startswith(prefix))

    def _mounts(self) -> Iterator[str]:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if any(f" {root}/" in line for root in self._roots):
                yield f"mount: {line.split()[4]}"

    # Helpers ------------------------------------------------------------------------------------------------------

    def _words(self, text: str) -> list[str]:
        return [self._replace(word) for word in text.split()]

    def _replace(self, word: str) -> str:
        for key, value in self._images.items():
            word = re.sub(rf"^{key}\b", value, word)
        return word

    def berth(self, *words: str) -> str:
        """Run berth undisturbed; it must succeed and say nothing of a bug."""
        done = self.person.try_berth(*words, env=self._env, timeout_s=_ANSWER_S)
        said = done.stderr.decode(errors="replace")
        assert done.status == 0, f"berth {' '.join(words)}: {done.status}: {said[-1500:]}"
        assert "Traceback" not in said, said
        return done.stdout.decode()


def _strace(call: str, what: str, number: int) -> list[str]:
    # -D: the command stays our own child, and its status is what we get.
    return [
        "strace",
        "-D",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:{what}:when={number}",
    ]


def _names(calls: Sequence[str]) -> str:
    return ",".join(f"?{call}" for call in calls)  # "?": not every architecture has all of them


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _is_victim(line: bytes, pattern: bytes) -> bool:
    return pattern in line and f"/{BYSTANDER}\0".encode() not in line


def _words_of(line: bytes) -> str:
    """Show a command line without the descriptors and process ids in it."""
    return re.sub(r" --(console-fd|pid) \d+|/proc/\d+", "", line.replace(b"\0", b" ").decode(errors="replace")).strip()
