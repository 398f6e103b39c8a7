"""The guest as enemy: what root in a machine tries against the host, with real system calls.

tests/enemy is the program that attacks. Each attack is shown twice: in the machine, where it must fail, and where the
same code may do what it does, for an attack that can't succeed anywhere proves nothing. docs/security.md has the table
of attacks, defences and tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import socket
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import pytest

from berth import host
from berth.engine.crun import cgroups
from enemies import MOST_MEMORY, arm, assert_one_error, peak, resident
from person import Person

REFUSED = {"EPERM", "EACCES", "EINVAL", "EROFS"}
HIDDEN = ".vault-token.d"  # of docs/security.md's list; nobody's here, most likely
SECRET = f"berth-enemy-{os.getpid()}"  # in it; root's home has two workers' secrets at once


@dataclasses.dataclass(frozen=True, slots=True)
class Den:
    """A machine whose root is hostile. fixed: a folder of the host's that is /srv/fixed in it, read-only."""

    person: Person
    name: str
    fixed: Path

    def attack(self, *words: str, program: str = "/den/enemy") -> str:
        """Attack as the machine's root; return the error's name, nothing when it succeeded."""
        return self.attacks([words], program=program)[0]

    def attacks(self, attacks: Iterable[Sequence[str]], *, program: str = "/den/enemy", before: str = ":") -> list[str]:
        """Attack many times in one command; `before` is run before each."""
        lines = [f'{before}; said=$({shlex.join([program, *words])}); echo "$?|$said"' for words in attacks]
        return [_outcome(line) for line in self.sh("\n".join(lines)).splitlines()]

    def sh(self, script: str) -> str:
        """Run a script as the machine's root, which must succeed."""
        return self.person.berth("run", "-n", self.name, "--root", "--", "sh", "-c", script)

    @property
    def secret(self) -> Path:
        return self.person.home / HIDDEN / SECRET


def _outcome(line: str) -> str:
    status, _, said = line.partition("|")
    assert status == "0" or (status == "1" and said), line
    return "" if status == "0" else said


@pytest.fixture(scope="session")
def on_host(weapon: Path) -> Callable[..., str]:
    """Attack as the host's root, for comparison."""

    def attack(*words: str) -> str:
        done = subprocess.run([str(weapon), *words], capture_output=True, timeout=60, check=False)
        return _outcome(f"{done.returncode}|{done.stdout.decode().strip()}")

    return attack


@pytest.fixture(scope="session")
def den(person: Person, alpine: str, alpine_tar: Path, weapon: Path, session: Path) -> Generator[Den]:
    """A hostile machine that all tests here share, with the home, a read-only folder and something to hide."""
    del alpine
    fixed = session / f"fixed-{person.label}-{person.isolation}"
    fixed.mkdir(mode=0o755)
    (fixed / "hello.txt").write_text("hello\n")
    for path in (fixed, fixed / "hello.txt"):
        os.chown(path, person.uid, -1)
    made = Den(person, "enemy", fixed)
    made.secret.parent.mkdir(mode=0o700, exist_ok=True)
    made.secret.write_text("secret\n")
    for path in (made.secret.parent, made.secret):
        os.chown(path, person.uid, person.home.stat().st_gid)
    person.berth("create", f"rootfs:{alpine_tar}", "--name", made.name, "--mount", f"{fixed}:/srv/fixed:ro")
    arm(person, made.name, weapon)
    yield made
    assert made.secret.read_text() == "secret\n"
    assert (fixed / "hello.txt").read_text() == "hello\n"
    made.secret.unlink()
    with contextlib.suppress(OSError):  # somebody's own is in it, or the other worker's
        made.secret.parent.rmdir()
    person.try_berth("rm", "--force", made.name)


# Mounts: what hides, what is read-only, what lies outside ------------------------------------------------------------

# The attack, and the same on a mount of the machine's own. {hidden} covers a credential, /srv/fixed is read-only.
_MOUNTS = (
    (("umount", "{hidden}"), ("umount", "/mnt/own")),
    (("detach", "{hidden}"), ("detach", "/mnt/own")),
    (("detach", "{home}"), ("detach", "/mnt/own")),
    (("move", "{hidden}", "/mnt/place"), ("move", "/mnt/own", "/mnt/place")),
    (("move-mount", "{hidden}", "/mnt/place"), ("move-mount", "/mnt/own", "/mnt/place")),
    (("bind", "{home}", "/mnt/place"), ("bind", "/mnt/own", "/mnt/place")),
    (("open-tree", "{home}", "{name}"), ("open-tree", "/mnt/own", "file")),
    (("nested", "detach", "{hidden}"), ("nested", "mount", "own", "/mnt/place", "tmpfs")),
    (("nested", "bind", "{home}", "/mnt/place"), ("nested", "mount", "own", "/mnt/place", "tmpfs")),
    (("nested", "open-tree", "{home}", "{name}"), ("nested", "mount", "own", "/mnt/place", "tmpfs")),
    (("remount-rw", "/srv/fixed"), ("remount-rw", "/mnt/own")),
    (("clear-ro", "/srv/fixed"), ("clear-ro", "/mnt/own")),
    (("nested", "clear-ro", "/srv/fixed"), ("nested", "mount", "own", "/mnt/place", "tmpfs")),
    (("remount-rw", "/run/berth/agent"), ("remount-rw", "/mnt/own")),
    (("clear-ro", "/run/berth/agent"), ("clear-ro", "/mnt/own")),
    (("open-write", "/srv/fixed/hello.txt"), ("open-write", "/den/enemy.own")),
)  # fmt: skip


@pytest.mark.container("in a VM these mounts are the guest kernel's own; the folder's server hides on the host's side")
def test_what_hides_and_what_is_read_only_stays(den: Den) -> None:
    words = {"home": str(den.person.home), "hidden": str(den.secret.parent), "name": f"{HIDDEN}/{SECRET}"}
    fresh = (
        "umount -l /mnt/own /mnt/place 2>&-; mkdir -p /mnt/own /mnt/place; touch /den/enemy.own;"
        "mount -t tmpfs own /mnt/own && touch /mnt/own/file && mount -o remount,bind,ro /mnt/own"
    )
    assert den.attacks([control for _, control in _MOUNTS], before=fresh) == [""] * len(_MOUNTS), "each works"
    attacks = [[word.format(**words) for word in attack] for attack, _ in _MOUNTS]
    for attack, found in zip(attacks, den.attacks(attacks, before=fresh), strict=True):
        assert found in REFUSED, attack
    den.sh("umount -l /mnt/own /mnt/place 2>&-; true")
    read = den.person.try_berth("run", "-n", den.name, "--root", "--", "cat", str(den.secret))
    assert (read.status, read.stdout) == (1, b"")
    assert den.attack("open-write", "/srv/fixed/hello.txt") in REFUSED


@pytest.mark.vm("in a container the mounts themselves can't be changed")
def test_a_kernel_of_ones_own_finds_nothing_hidden(den: Den) -> None:
    """Root of a VM may mount what it likes; the folder's server knows no name for what is hidden."""
    hidden, home = den.secret.parent, den.person.home
    tag = den.sh(f"awk '$2 == \"{home}\" {{print $1}}' /proc/mounts").split()[0]
    den.sh("mkdir -p /mnt/again")
    assert den.attack("mount", tag, "/mnt/again", "virtiofs") == ""
    for path in (hidden / SECRET, Path("/mnt/again", HIDDEN, SECRET)):
        assert den.attack("open-read", str(path)) == "ENOENT"
    assert den.attack("remount-rw", "/srv/fixed") == "", "the guest's own mount is its own"
    assert den.attack("open-write", "/srv/fixed/hello.txt") == "EROFS"
    # Links and `..` are the guest's to resolve, and there is nothing above the folder.
    outside = den.fixed.parent / "enemy"
    den.sh(f"ln -sfn {outside} /den/link; cd /mnt/again; cd ..; cd ..; ls {outside} 2>&- && exit 1; umount /mnt/again")
    assert den.attack("open-read", "/den/link/amd64") == "ENOENT"


def test_nothing_outside_can_be_opened(den: Den, on_host: Callable[..., str], weapon: Path) -> None:
    jail = den.fixed.parent / f"jail-{den.person.label}"
    jail.mkdir(exist_ok=True)
    den.sh("mkdir -p /den/jail")
    assert on_host("chroot", str(jail), str(weapon)) == ""
    assert den.attack("chroot", "/den/jail", "/den/enemy") == "", "it leaves the jail that it made"
    assert den.attack("chroot", "/den/jail", str(weapon)) == "ENOENT"
    if den.person.isolation == "container":
        home = str(den.person.home)
        assert on_host("handle", home, home) == ""
        assert den.attack("handle", home, home) == "EPERM"
    links = {
        "/den/up": "../" * 40 + str(weapon),
        "/den/straight": str(weapon),
        "/den/proc": f"/proc/1/root{weapon}",
    }
    for link, target in links.items():
        den.sh(f"ln -sfn {target} {link}")
        assert den.attack("open-read", link) == "ENOENT"


# The kernel that all share --------------------------------------------------------------------------------------------

_KNOBS = (
    "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/vm/drop_caches", "/proc/sys/fs/file-max",
    "/proc/sysrq-trigger", "/sys/kernel/uevent_helper", "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/power/state", "/sys/kernel/mm/ksm/run", "/proc/irq/default_smp_affinity",
)  # fmt: skip


@pytest.mark.container("the kernel of a VM is its own")
def test_the_kernel_can_not_be_turned(den: Den, on_host: Callable[..., str]) -> None:
    knobs = [path for path in _KNOBS if os.path.exists(path) and on_host("open-write", path) == ""]
    assert len(knobs) >= 5, "the host's root may"
    den.sh("mkdir -p /mnt/own; mount -o remount,rw /sys 2>&-; mount -t sysfs own /mnt/own")
    knobs += [f"/mnt/own{path[4:]}" for path in knobs if path.startswith("/sys/")]
    for path, found in zip(knobs, den.attacks(("open-write", path) for path in knobs), strict=True):
        assert found in REFUSED, path
    den.sh("umount /mnt/own")
    for path in ("/proc/kcore", "/proc/kmsg"):
        if os.path.exists(path) and on_host("open-read", path) == "":
            assert den.attack("open-read", path) in REFUSED, path


@pytest.mark.container("the kernel of a VM is its own")
def test_the_kernel_takes_no_programs(den: Den, on_host: Callable[..., str]) -> None:
    file = f"{den.person.home}/berth-enemy-{os.getpid()}"
    den.sh(f"touch {file}")
    try:
        allowed = {
            "bpf": "",
            "perf": "",
            "module": "not EPERM",
            "swapon /etc/passwd": "EINVAL",
            f"immutable {file}": "",
        }
        for attack, expected in allowed.items():
            found = on_host(*attack.split())
            assert found == expected or (expected == "not EPERM" and found != "EPERM"), attack
            assert den.attack(*attack.split()) in ("EPERM", "EACCES"), attack
    finally:
        den.sh(f"rm {file}")


@pytest.mark.container("the kernel of a VM is its own")
def test_a_32_bit_program_goes_round_no_filter(den: Den, weapons: dict[str, Path]) -> None:
    if "386" not in weapons:
        pytest.skip("needs a processor with another mode")
    home = str(den.person.home)
    assert subprocess.run([weapons["386"], "handle", home, home], check=False).returncode == 0, "the attack works"
    den.person.berth(
        "run", "-n", den.name, "--root", "--", "sh", "-c", "cat > /den/enemy32; chmod 755 /den/enemy32",
        input=weapons["386"].read_bytes(),
    )  # fmt: skip
    assert den.attack("open-read", "/etc/passwd", program="/den/enemy32") == "", "such programs run"
    assert den.attack("handle", home, home, program="/den/enemy32") == "EPERM"


@pytest.mark.container("the devices of a VM are its own")
def test_no_device_can_be_made_or_opened(den: Den, on_host: Callable[..., str]) -> None:
    disk = next(
        (
            name.stat().st_rdev
            for name in Path("/dev").iterdir()
            if stat.S_ISBLK(name.stat(follow_symlinks=False).st_mode)
        ),
        os.makedev(7, 0),
    )
    devices = {"b": disk, "c": os.makedev(1, 1)}  # a disk; /dev/mem
    folder = den.fixed.parent
    for kind, device in devices.items():
        number = (kind, str(os.major(device)), str(os.minor(device)))
        assert on_host("mknod", str(folder / "node"), *number) in ("", "ENXIO", "EACCES"), "it can be made"
        nodes = [f"{place}/enemy-node" for place in ("/den", "/dev", "/tmp", "/var/lib/docker", den.person.home)]
        assert den.attacks(("mknod", node, "p", "0", "0") for node in nodes) == [""] * len(nodes), "the attack works"
        assert den.attacks(("mknod", node, *number) for node in nodes) == ["EPERM"] * len(nodes)
        assert set(den.attacks(("nested", "mknod", node, *number) for node in nodes)) <= {"EPERM", "EACCES"}
    listed = den.sh("find /dev -xdev \\( -type b -o -type c \\) -exec stat -c '%F %t:%T' {} +").splitlines()
    # null, zero, full, random, urandom, tty; FUSE and tunnels; what else is a terminal is in /dev/pts.
    known = {"1:3", "1:5", "1:7", "1:8", "1:9", "5:0", "a:e5", "a:c8"}
    for line in listed:
        what, _, node = line.rpartition(" ")
        assert what == "character special file", line
        assert node in known or node.startswith("88:"), line


# Other processes, sockets, groups, namespaces -------------------------------------------------------------------------


def test_processes_of_the_host_are_out_of_reach(den: Den, on_host: Callable[..., str]) -> None:
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        try:
            pid = str(sleeper.pid)
            assert on_host("kill", pid, "0") == ""
            assert on_host("ptrace", pid) == ""
            # The machine's own processes have small numbers.
            assert not den.sh(f"ls -d /proc/{pid} 2>&-; true")
            assert den.attack("kill", pid, "0") == "ESRCH"
            assert den.attack("ptrace", pid) == "ESRCH"
            assert den.attack("setns", pid, "mnt") == "ENOENT"
            assert den.attack("open-read", f"/proc/{pid}/root/etc/passwd") == "ENOENT"
        finally:
            sleeper.kill()
    assert den.attack("kill", "1", "0") == "", "the attack works"


@pytest.mark.container("a VM's namespaces are its own")
def test_namespaces_above_can_not_be_entered(den: Den) -> None:
    below = "unshare -U sleep 600 >/dev/null 2>&1 & sleep 0.3; /den/enemy parent-ns $!; s=$?; kill $!; exit $s"
    den.sh(below)  # of a namespace of its own making the parent is told
    assert den.attack("parent-ns", "self") == "EPERM"
    assert den.attack("nested", "parent-ns", "1") in REFUSED
    assert den.attack("foreign-fds") == "nothing foreign"


def test_sockets_of_the_host_are_out_of_reach(den: Den, on_host: Callable[..., str]) -> None:
    """The network namespace has its own abstract names; the socket's files are in nothing that is mounted."""
    abstract = f"@berth-enemy-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{abstract[1:]}")
        listener.listen()
        assert on_host("connect", abstract) == ""
        assert den.attack("connect", abstract) == "ECONNREFUSED"
    runtime = den.person.layout.runtime
    sockets = [path for path in runtime.rglob("*") if path.is_socket()]
    assert runtime / "m" / den.name / "agent.sock" in sockets
    assert on_host("connect", str(runtime / "m" / den.name / "agent.sock")) == ""
    for path in sockets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert den.attack("connect", str(path)) == "ENOENT"
    for path in (den.person.layout.data, den.person.layout.runtime, den.person.layout.config, den.person.layout.cache):
        assert den.attack("open-read", str(path)) == "ENOENT"


@pytest.mark.container("a VM's control groups are its own")
def test_control_groups_of_the_host_are_out_of_reach(person: Person, den: Den) -> None:
    """Limits are the host's to set, and nothing of the hierarchy above the machine can be seen or joined."""
    groups = _groups(person, den)
    if not groups:
        pytest.skip("needs a control group for the machine")
    limit = Path(groups[0], "cgroup.max.descendants")
    limit.write_text("30")
    own = "/sys/fs/cgroup"
    den.sh(f"for i in $(seq 10); do mkdir {own}/own$i; done; rmdir {own}/own*")
    den.attack("write", f"{own}/cgroup.max.descendants", "max")
    assert limit.read_text() == "30\n"
    said = den.sh(f"for i in $(seq 60); do mkdir {own}/own$i 2>&-; done; ls -d {own}/own* | wc -l; rmdir {own}/own*")
    assert 10 <= int(said) <= 30
    limit.write_text("max")
    assert not [line for line in den.sh("cat /proc/self/cgroup").splitlines() if ":/berth" in line or "/.." in line]
    files = ("release_agent", "notify_on_release", "pids.max", "memory.limit_in_bytes", "cgroup.procs")
    den.sh("mkdir -p /mnt/own")
    for name in ("memory", "pids", "cpu", "devices", "freezer"):
        if den.attack("mount", "none", "/mnt/own", "cgroup", name) == "":
            for file, found in zip(files, den.attacks(("write", f"/mnt/own/{f}", "1") for f in files), strict=True):
                assert found in (*REFUSED, "ENOENT"), (name, file)
            den.sh("umount /mnt/own")


def _groups(person: Person, den: Den) -> list[str]:
    """List the machine's control groups, that of version 2 first."""
    record = json.loads((person.layout.live(den.name) / "container.json").read_text())  # type: ignore[arg-type]
    return [str(item) for item in record["cgroups"]]


@pytest.mark.container("a VM's processes are its kernel's own")
def test_the_number_of_processes_ends_somewhere(person: Person, den: Den) -> None:
    """The limit itself is the kernel's business: here a lower one is set from outside, where berth sets its own."""
    limits = [path for group in _groups(person, den) if (path := Path(group, "pids.max")).exists()]
    if not limits:
        said = json.dumps(person.inspect(den.name)["limits"])
        assert "the number of processes can't be limited" in said or "not limited" in said, "it is said where it is so"
        pytest.skip("needs the control group's controller `pids`")
    bomb = "for i in $(seq 300); do sleep 5 & done 2>&-; jobs | wc -l"
    assert limits[0].read_text() == f"{cgroups.TASKS_MAX}\n"
    assert int(den.sh(bomb)) == 300, "the attack works"
    limits[0].write_text("400")
    den.person.try_berth("run", "-n", den.name, "--root", "--", "sh", "-c", bomb.replace("300", "5000"))
    assert int(limits[0].with_name("pids.current").read_text()) <= 400
    limits[0].write_text(str(cgroups.TASKS_MAX))
    den.sh("pkill sleep; true")


# An agent that was ended by its own machine --------------------------------------------------------------------------


@pytest.fixture
def own_agent(person: Person) -> Generator[None]:
    """Let the program of the agent be the user's own, as it is when they have installed berth for themselves."""
    if person.is_root:
        yield
        return
    program = next((Path(person.program[0]).parents[1] / "lib/berth/_agent").glob(f"*{host.architecture()}"))
    os.chown(program, person.uid, person.home.stat().st_gid)
    yield
    os.chown(program, 0, 0)


@pytest.mark.container("a VM has a copy of its agent of its own, and no keys of the host's")
@pytest.mark.usefixtures("own_agent")
def test_an_agent_started_again_brings_nothing_of_the_hosts(
    person: Person, machine: Callable[..., str], weapon: Path
) -> None:
    """CVE-2019-5736: the program of a process in the machine must be none of the host's that can be written to.

    Nor may it bring the session's keys, descriptors or directories along.
    """
    name = machine("--no-boot")
    key = f"berth-enemy-{os.getpid()}"
    with_key = [str(weapon), "with-key", key]
    control = subprocess.run(person.command([*with_key, str(weapon), "find-key", key], {}, None), check=False)
    assert control.returncode == 0, "who starts berth has the key"
    subprocess.run(person.command([*with_key, *person.program, "start", name], {}, None), timeout=60, check=True)
    arm(person, name, weapon)
    den = Den(person, name, Path("/"))
    assert den.attack("find-key", key) == "ENOKEY"
    den.sh("cp /bin/busybox /den/sleep; /den/sleep 600 >/dev/null 2>&1 &")
    assert den.attack("replace-exe", "/den/sleep 600") == "", "the attack works"
    # The agent that came with the start, whose program the keeper is running too; and the one that was started again.
    for expected in ({"EROFS", "EACCES", "ETXTBSY"}, {"EPERM", "EACCES"}):
        attack = "/den/enemy replace-exe 'agent serve' > /den/try; echo $? >> /den/try"
        script = f"rm -f /den/said; {attack}; mv /den/try /den/said"
        person.berth("run", "-n", name, "--root", "-d", "--", "sh", "-c", script)
        deadline = time.monotonic() + 20
        while person.inspect(name)["status"] != "broken":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        read = "until cat /den/said 2>&-; do sleep 0.05; done"
        repair = [*with_key, *person.program, "run", "-n", name, "--root", "--", "sh", "-c", read]
        done = subprocess.run(person.command(repair, {}, None), capture_output=True, timeout=60, check=False)
        said, status = done.stdout.decode().split()
        assert status == "1"
        assert said in expected
        assert den.attack("find-key", key) == "ENOKEY"
    assert den.attack("foreign-fds") == "nothing foreign"
    den.sh("unshare -m sleep 600 >/dev/null 2>&1 & sleep 0.3")
    assert den.attack("foreign-fds") == "", "what is foreign is found"


# An agent that is none ------------------------------------------------------------------------------------------------

_MANNERS = ("hangup", "garbage", "huge", "escapes", "unasked", "noise")


@dataclasses.dataclass(frozen=True, slots=True)
class Hostage:
    """A machine whose agent can be replaced. orders: the folder of the host's in which the false agent finds them."""

    person: Person
    name: str
    orders: Path

    def start(self) -> None:
        """Start it afresh, and put the false agent in the place of the true one."""
        self.person.berth("stop", "--force", self.name)
        self.order("hangup")
        (self.orders / "manner.ready").unlink(missing_ok=True)
        self.person.berth("start", self.name)
        words = ("-n", self.name, "--root", "-d", "--", "/den/enemy", "be-agent", "/srv/orders/manner")
        self.person.try_berth("run", *words)
        deadline = time.monotonic() + 30
        while not (self.orders / "manner.ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def order(self, manner: str) -> None:
        (self.orders / "manner").write_text(manner)


@pytest.fixture
def hostage(person: Person, machine: Callable[..., str], weapon: Path, scratch: Path) -> Hostage:
    orders = scratch / "orders"
    orders.mkdir()
    orders.chmod(0o777)
    name = machine("--home-mount", "none", "--mount", f"{orders}:/srv/orders")
    arm(person, name, weapon)
    made = Hostage(person, name, orders)
    made.start()
    return made


@pytest.mark.container("a VM's keeper is between: test_enemy_channel.py")
def test_a_false_agent_costs_the_command_line_one_error(hostage: Hostage) -> None:
    person, name = hostage.person, hostage.name
    keeper = person.pids(name)["keeper"]
    for manner in _MANNERS:
        hostage.order(manner)
        for _ in range(3 if manner == "noise" else 1):
            status, stdout, stderr, memory = peak(person, "run", "-n", name, "--", "true")
            assert memory < MOST_MEMORY, manner
            if manner == "noise" and not stderr:
                continue  # by chance it was an answer
            assert status == 125, (manner, stderr)
            assert_one_error(stderr)
            assert manner == "noise" or stdout == b""
        status, stdout, stderr, memory = peak(person, "wait", name, "--for", "init", "--timeout", "2")
        assert memory < MOST_MEMORY, manner
        if manner != "noise":
            assert (status, stdout) == (1, b""), manner
            assert_one_error(stderr)
        assert resident(keeper), f"it does not outlive {manner}"
    # What has a time-out keeps to it; `run` waits a minute for a greeting (tests/unit/test_session.py).
    hostage.order("silence")
    status, stdout, stderr, _ = peak(person, "wait", name, "--for", "init", "--timeout", "0.5")
    assert (status, stdout) == (1, b"")
    assert_one_error(stderr)
    assert resident(keeper) < 64
    person.berth("stop", name, "-t", "0.5")
    assert person.inspect(name)["status"] == "stopped"


# Files of the guest that somebody reads ------------------------------------------------------------------------------


def test_odd_files_of_the_guest_hang_nobody(person: Person, machine: Callable[..., str], weapon: Path) -> None:
    name = machine("--home-mount", "none")
    arm(person, name, weapon)

    def as_zero(script: str) -> str:
        return person.berth("run", "-n", name, "-u", "0", "--", "sh", "-c", script)

    as_zero("cp -a /etc /den/etc; sync")  # what a VM has not written yet is lost with it
    user = person.name if not person.is_root else "root"
    assert person.run(name, "id", "-un").strip() == user
    odd = "for f in passwd group; do /den/enemy replace-node /etc/$f KIND /dev/zero; done"
    for kind in ("fifo", "directory", "huge", "socket", "link"):
        as_zero(odd.replace("KIND", kind))
        done = person.try_berth("run", "-n", name, "--", "true")
        assert done.status == 125, kind
        assert f"user '{user}' not found" in done.stderr.decode() or person.is_root
        assert_one_error(done.stderr)
    names = "passwd group shadow gshadow hosts resolv.conf hostname environment"
    as_zero(
        f"for f in {names}; do /den/enemy replace-node /etc/$f fifo; done; rm -r /var/lib/berth;"
        "mkfifo /var/lib/berth; sync"
    )
    person.berth("restart", "--force", name)  # it boots, whatever stands there
    assert as_zero("echo alive") == "alive\n"
    as_zero(
        "rm -rf /var/lib/berth; for f in passwd group shadow hosts; do rm -f /etc/$f; cp -a /den/etc/$f /etc/$f;"
        "done; sync"
    )
    person.berth("restart", "--force", name)
    assert person.run(name, "id", "-un").strip() == user


@pytest.mark.container("test_vm.py floods a VM's")
def test_a_flood_on_the_console_fills_no_disk(person: Person, den: Den) -> None:
    den.sh(r"yes \"$(printf '\\033]0;owned\\007')\" | head -c 9000000 > /dev/console")
    logs = person.layout.bundle(den.name) / "logs"  # type: ignore[arg-type]
    assert 8 << 20 < sum(path.stat().st_size for path in logs.iterdir()) <= 17 << 20
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in logs.iterdir())


@pytest.mark.container("a VM's disk is not read on the host")
def test_commit_follows_no_link(person: Person, machine: Callable[..., str], weapon: Path, scratch: Path) -> None:
    name = machine("--home-mount", "none")
    outside = scratch / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    person.berth(
        "run", "-n", name, "--root", "--", "sh", "-c",
        f"ln -s {outside}/secret /srv/link; rm -rf /opt; ln -s {outside} /opt; mkfifo /srv/fifo; nc -lU /srv/socket &"
        f"ln -s / /srv/root; sleep 0.3; ls /srv",
    )  # fmt: skip
    arm(person, name, weapon)
    person.berth("stop", name)
    person.berth("commit", name, "local/enemy:links")
    seen = next(layer for layer in _layers(person.layout.images) if "srv/link" in layer)
    assert seen["srv/link"].linkname == f"{outside}/secret"
    assert seen["opt"].linkname == str(outside)
    assert not [path for path in seen if path.startswith(("srv/root/", "srv/link/", "opt/secret"))]
    person.berth("image", "rm", "local/enemy:links")


def _layers(store: Path) -> list[dict[str, tarfile.TarInfo]]:
    """List what is in the layers of an image store."""
    found: list[dict[str, tarfile.TarInfo]] = []
    for blob in store.glob("blobs/sha256/*"):
        with contextlib.suppress(tarfile.TarError), tarfile.open(blob) as layer:
            found.append({member.name.removeprefix("./"): member for member in layer})
    return found


# What we write --------------------------------------------------------------------------------------------------------


def test_all_that_berth_writes_is_its_users_own(person: Person, den: Den) -> None:
    """Nobody else enters the roots; in the runtime directory nothing has more rights than its owner's."""
    person.run(den.name, "true")
    layout = person.layout
    for root in (layout.data, layout.runtime, layout.cache):  # the configuration is the person's to make
        if root.exists():
            status = root.stat()
            assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, person.uid), root
    sockets = 0
    for folder, _, names in os.walk(layout.runtime):
        for path in (Path(folder), *(Path(folder, name) for name in names)):
            status = path.lstat()
            sockets += stat.S_ISSOCK(status.st_mode)
            assert not stat.S_ISSOCK(status.st_mode) or stat.S_IMODE(status.st_mode) == 0o600, path
            assert stat.S_ISLNK(status.st_mode) or not status.st_mode & 0o002, path
    assert sockets
    bundle = layout.bundle(den.name)  # type: ignore[arg-type]
    for path in (bundle, bundle / "logs"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for path in (*bundle.glob("*.json"), *bundle.glob("logs/*")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
