"""What is killed, damaged or missing: one clear error or a repair, and every other machine untouched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from person import Person


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not _gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _wait(check: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_a_killed_keeper_is_replaced_and_the_machine_lives(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    before = person.pids(name)
    _kill(before["keeper"])
    assert person.inspect(name)["status"] == "running"
    assert person.run(name, "echo", "alive") == "alive\n"
    after = person.pids(name)
    assert (after["init"], after["vmm"]) == (before["init"], before["vmm"])
    assert after["keeper"] not in (None, before["keeper"])
    # The console is a new one, and is logged again.
    person.berth("run", "-n", name, "--root", "--", "sh", "-c", "echo after-the-repair > /dev/console")
    _wait(lambda: "after-the-repair" in person.berth("logs", "--boot", name), "the console is not logged")


@pytest.mark.container("a VM's agent is out of the host's reach: test_vm.py kills it from inside")
def test_a_killed_agent_is_replaced_and_the_machine_lives(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    init = person.pids(name)["init"]
    person.berth("run", "-n", name, "--root", "-d", "--", "sleep", "4444")
    agents = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if _is_agent_of(entry, init)
    ]  # fmt: skip
    assert len(agents) == 1
    _kill(agents[0])
    assert person.inspect(name)["status"] == "broken"
    assert person.run(name, "echo", "alive") == "alive\n"
    assert person.inspect(name)["status"] == "running"
    assert person.pids(name)["init"] == init
    assert person.run(name, "sh", "-c", "pgrep -f 'sleep 4444' | head -1").strip()


def _is_agent_of(entry: Path, init: int) -> bool:
    try:
        command = (entry / "cmdline").read_bytes()
        same = os.readlink(entry / "ns/pid") == os.readlink(f"/proc/{init}/ns/pid")
    except OSError:
        return False
    return same and b"serve" in command.split(b"\0")


def test_a_killed_machine_is_stopped_and_starts_again(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    _kill(person.main_pid(name))
    _wait(lambda: person.inspect(name)["status"] == "stopped", "it is not found stopped")
    assert person.run(name, "echo", "again") == "again\n"


@pytest.mark.parametrize("delay_s", [0.05, 0.15, 0.25, 0.35, 0.6])
def test_a_killed_start_leaves_a_machine_that_starts(
    person: Person, machine: Callable[..., str], delay_s: float
) -> None:
    name = machine("--no-boot")
    process = person.popen("start", name)
    with process:
        time.sleep(delay_s)
        process.kill()
        process.communicate()
    assert person.run(name, "echo", "up") == "up\n"
    person.berth("stop", name)
    assert person.inspect(name)["status"] == "stopped"


@pytest.mark.parametrize("delay_s", [0.1, 0.3, 0.6])
def test_a_killed_create_leaves_nothing_or_a_machine(
    person: Person, alpine: str, alpine_tar: Path, delay_s: float
) -> None:
    process = person.popen("create", f"rootfs:{alpine_tar}", "--name", "halfway")
    with process:
        time.sleep(delay_s)
        process.kill()
        process.communicate()
    if "halfway" in person.berth("ls", "-q").split():
        assert person.run("halfway", "echo", "whole") == "whole\n"
        person.berth("rm", "--force", "halfway")
    else:
        person.berth("create", f"rootfs:{alpine_tar}", "--name", "halfway")
        person.berth("rm", "--force", "halfway")
    assert person.run(alpine, "echo", "untouched") == "untouched\n"


def test_a_hung_init_is_stopped_in_time(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    os.kill(person.main_pid(name), signal.SIGSTOP)
    started = time.monotonic()
    person.berth("stop", name, "-t", "2")
    assert time.monotonic() - started < 20
    assert person.inspect(name)["status"] == "stopped"


@pytest.mark.container("it is about what is said, whatever the isolation")
@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("create", "rootfs:/no/such/file"), 1, "No such file"),
        (("create", "rootfs:/etc/hostname", "--name", "x"), 1, ""),
        (("create", "debian:12", "--name", "bad-"), 2, "must start and end with a letter or digit"),
        (("create", "UPPER CASE"), 2, "invalid"),
        (("create", "debian:12", "--name", "debian"), 1, "already exists"),
        (("create", "nowhere.invalid/some/image:1"), 1, ""),
        (("create", "bootstrap:debian/no-such-release"), 2, "invalid"),
        (("create", "debian:12", "--name", "y", "--memory", "lots"), 2, "invalid"),
        (("create", "debian:12", "--name", "y", "--isolation", "xen"), 2, "invalid"),
        (("create", "debian:12", "--name", "y", "--isolation", "container", "--virtualization"), 2, "--isolation vm"),
        (("create", "debian:12", "--name", "y", "--isolation", "vm", "--memory", "64M"), 2, "at least 128M"),
        (("inspect", "no-such-machine"), 1, "not found"),
        (("rm", "no-such-machine"), 1, "not found"),
        (("start", "no-such-machine"), 1, "not found"),
        (("stop", "no-such-machine"), 1, "not found"),
        (("logs", "no-such-machine"), 1, "not found"),
        (("set", "-n", "no-such-machine", "cpus=1"), 1, "not found"),
        (("run", "-n", "no-such-machine", "true"), 125, "not found"),
        (("no-such-command",), 2, ""),
        (("create",), 2, ""),
        (("image", "inspect", "no/such:image"), 1, "not found"),
        (("image", "rm", "no/such:image"), 1, "not found"),
    ],
)
def test_bad_input(person: Person, debian: str, words: tuple[str, ...], status: int, text: str) -> None:
    before = person.berth("ls", "-q")
    done = person.try_berth(*words)
    said = done.stderr.decode()
    assert done.status == status, said
    assert any(line.startswith("berth: ") for line in said.splitlines())
    assert text in said
    assert "Traceback" not in said
    assert done.stdout == b""
    assert person.berth("ls", "-q") == before
    assert person.run(debian, "true") == ""


@pytest.mark.container("it is about the bundle's documents, whatever the isolation")
@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("config.json", "{garbage", "damaged"),
        ("config.json", '{"schema": 99}', "newer"),
        ("config.json", None, "missing"),
        ("boot-config.json", "[]", "damaged"),
        ("boot-config.json", '{"schema": 1, "cpus": "many"}', "damaged"),
    ],
)
def test_a_damaged_bundle_is_listed_and_can_be_removed(
    person: Person, debian: str, machine: Callable[..., str], name: str, text: str | None, problem: str
) -> None:
    broken = machine("--no-boot")
    path = person.layout.bundle(broken) / name  # type: ignore[arg-type]
    path.unlink() if text is None else path.write_text(text)
    listed = {item["name"]: item for item in json.loads(person.berth("ls", "--format", "json"))}
    assert listed[broken]["status"] == "broken"
    assert problem in " ".join(listed[broken]["problems"])
    assert listed[debian]["status"] == "running"
    done = person.try_berth("start", broken)
    assert done.status == 1
    assert problem in done.stderr.decode()
    person.berth("rm", "-f", broken)
    assert broken not in person.berth("ls", "-q").split()


def test_a_running_machine_with_a_damaged_bundle_ends_with_it(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    init = person.main_pid(name)
    identity = json.loads((person.layout.bundle(name) / "config.json").read_text())["id"]  # type: ignore[arg-type]
    (person.layout.bundle(name) / "config.json").write_text("{garbage")  # type: ignore[arg-type]
    person.berth("rm", "-f", name)
    _wait(lambda: _gone(init), "it still runs")
    assert not (person.layout.crun / f"berth-{identity[:12]}").exists(), "crun still knows it"


@pytest.mark.container("VMs need no crun")
def test_no_crun_is_told(person: Person, machine: Callable[..., str], session: Path) -> None:
    name = machine("--no-boot")
    empty = session / "empty-path"
    empty.mkdir(exist_ok=True)
    for program in ("ip", "nsenter", "newuidmap", "newgidmap", "nft", "sh", "env", "apt-get"):
        found = subprocess.run(["which", program], capture_output=True, text=True, check=False).stdout.strip()
        if found and not (empty / program).exists():
            (empty / program).symlink_to(found)
    done = person.try_berth("start", name, env={"PATH": str(empty), "BERTH_TEST_PATH_ONLY": "1"})
    if done.status == 0:
        pytest.skip("needs a host where crun is not in the sbin folders that berth adds to PATH")
    assert "crun is not installed" in done.stderr.decode()
    assert "apt-get install crun" in done.stderr.decode()
