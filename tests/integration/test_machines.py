"""Machines through their life: create, stop, start, settings, list, inspect, logs, delete."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from person import Person


def test_systemd_runs_and_nothing_failed(person: Person, debian: str) -> None:
    assert person.berth("wait", debian, "--for", "init", "--timeout", "60").strip()
    assert person.run(debian, "systemctl", "is-system-running").strip() == "running"


def test_what_was_written_is_there_after_a_restart(person: Person, debian: str) -> None:
    person.berth("run", "-n", debian, "--root", "--", "sh", "-c", "echo kept > /etc/kept; useradd -m kept || true")
    assert person.berth("stop", debian).strip() == debian
    assert person.inspect(debian)["status"] == "stopped"
    assert person.berth("stop", debian).strip() == debian  # idempotent
    assert person.run(debian, "cat", "/etc/kept") == "kept\n"  # boots it
    assert person.inspect(debian)["status"] == "running"


def test_list_shows_it(person: Person, debian: str) -> None:
    table = person.berth("ls")
    assert table.split()[:9] == ["NAME", "CREATED", "IP", "CPUS", "MEMORY", "DISK", "STATE", "ISOLATION", "DEFAULT"]
    assert debian in person.berth("ls", "-q").split()
    listed = {item["name"]: item for item in json.loads(person.berth("ls", "--format", "json"))}
    assert listed[debian]["status"] == "running"
    assert listed[debian]["isolation"] == person.isolation
    assert listed[debian]["ipAddress"].startswith("10." if person.is_root else "127.")
    assert person.berth("machine", "ls", "-q") == person.berth("m", "list", "-q") == person.berth("ls", "-q")


def test_inspect_says_all_of_it(person: Person, debian: str) -> None:
    found = person.inspect(debian)
    keys = {
        "id", "name", "image", "status", "ipAddress", "cpus", "memory", "disk", "homeMount", "mounts", "isolation",
        "user", "createdDate", "startedDate", "platform", "kernel", "paths", "pids", "problems",
    }  # fmt: skip
    assert keys <= found.keys()
    assert found["id"] == debian
    assert found["problems"] == []
    pids = person.pids(debian)
    assert Path(f"/proc/{person.main_pid(debian)}").exists()
    assert b"keeper" in Path(f"/proc/{pids['keeper']}/cmdline").read_bytes()


def test_no_python_stays_on_the_host(person: Person, debian: str) -> None:
    """Only the keeper does, and, of an ordinary user, the hub's processes."""
    del debian
    mark = str(person.layout.runtime).encode()
    python: list[bytes] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if mark in command and b"python" in command and b"pytest" not in command:
            python.append(command)
    assert python == []


def test_logs(person: Person, debian: str) -> None:
    person.berth("wait", debian, "--for", "init", "--timeout", "100")  # the agent answers before there is a journal
    assert "Debian" in person.berth("logs", "--boot", debian)
    person.berth("run", "-n", debian, "--root", "--", "logger", "-t", "berth-test", "a line for the journal")
    assert "a line for the journal" in person.berth("logs", debian)
    assert len(person.berth("logs", debian, "-n", "3").splitlines()) <= 3


def test_logs_of_a_stopped_machine_hold_its_services_words(person: Person, debian: str) -> None:
    person.berth("wait", debian, "--for", "init", "--timeout", "100")
    person.berth("run", "-n", debian, "--root", "--", "logger", "-t", "berth-test", "words that outlive the machine")
    person.berth("stop", debian)
    assert "words that outlive the machine" in person.berth("logs", debian)
    person.berth("start", debian)
    person.berth("wait", debian, "--for", "init", "--timeout", "60")


def test_default_machine(person: Person, debian: str, alpine: str) -> None:
    assert person.berth("set-default", alpine).strip() == alpine
    assert "Alpine" in person.berth("run", "--", "cat", "/etc/os-release")
    person.berth("set-default", debian)
    assert "Debian" in person.berth("run", "--", "cat", "/etc/os-release")
    rows = [line.split() for line in person.berth("ls").splitlines()]
    assert [row[0] for row in rows if row[-1] == "*"] == [debian]


def test_settings_take_effect_and_are_told(person: Person, machine: Callable[..., str]) -> None:
    name = machine("--no-boot")
    done = person.try_berth("set", "-n", name, "memory=300M", "cpus=1", "env+=COLOUR=blue", "autostart=yes")
    assert done.status == 0
    assert done.stdout.decode().strip() == name
    found = person.inspect(name)
    assert (found["memory"], found["cpus"]) == (300 * 1024 * 1024, 1)
    assert person.run(name, "sh", "-c", "echo $COLOUR").strip() == "blue"
    done = person.try_berth("set", "-n", name, "memory=1G")
    assert b"restart" in done.stderr
    before = person.inspect(name)
    done = person.try_berth("set", "-n", name, "cpus=2", "no-such-key=1")
    assert done.status == 2
    assert person.inspect(name) == before


def test_limits_hold_where_the_host_has_them(person: Person, machine: Callable[..., str]) -> None:
    name = machine("--memory", "200M", "--cpus", "1")
    limits = person.inspect(name)["limits"]
    if limits:
        assert any("memory" in str(line) for line in limits)  # type: ignore[attr-defined]
        return
    # 400 MiB in tmpfs count for the machine; the kernel ends whoever goes on.
    script = "dd if=/dev/zero of=/dev/shm/fill bs=1M count=400"
    done = person.try_berth("run", "-n", name, "--root", "--", "sh", "-c", script)
    assert done.status != 0
    person.try_berth("run", "-n", name, "--root", "--", "rm", "-f", "/dev/shm/fill")


@pytest.mark.container("it is about names, whatever the isolation")
def test_create_without_a_name_takes_the_images(person: Person, alpine_tar: Path) -> None:
    first = person.berth("create", "--no-boot", f"rootfs:{alpine_tar}").strip()
    second = person.berth("create", "--no-boot", f"rootfs:{alpine_tar}").strip()
    try:
        assert first.startswith("alpine-minirootfs")
        assert second == f"{first}-2"
    finally:
        person.berth("rm", first, second)


def test_a_running_machine_is_removed_only_by_force(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    done = person.try_berth("rm", name)
    assert done.status == 1
    assert b"is running" in done.stderr
    assert person.run(name, "echo", "alive") == "alive\n"
    assert person.berth("rm", "-f", name).strip() == name
    assert person.try_berth("inspect", name).status == 1


@pytest.mark.container("it is about the bundle's name, whatever the isolation")
def test_twenty_creates_of_one_name_make_one_machine(person: Person, alpine: str, alpine_tar: Path) -> None:
    del alpine
    results: list[int] = []
    words = ("create", "--no-boot", f"rootfs:{alpine_tar}", "--name", "contested")
    threads = [threading.Thread(target=lambda: results.append(person.try_berth(*words).status)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert sorted(results) == [0] + [1] * 7
    finally:
        person.berth("rm", "contested")


def test_many_runs_boot_a_stopped_machine_once(person: Person, machine: Callable[..., str]) -> None:
    name = machine("--no-boot")
    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.append(person.run(name, "echo", "up"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["up\n"] * 8


def test_restart_and_start_print_the_name(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    first = person.main_pid(name)
    assert person.berth("restart", name).strip() == name
    assert person.main_pid(name) != first
    assert person.berth("start", name).strip() == name


def test_autostart(person: Person, machine: Callable[..., str]) -> None:
    name = machine("--no-boot")
    person.berth("set", "-n", name, "autostart=yes")
    assert name in person.berth("system", "start")
    assert person.inspect(name)["status"] == "running"
    assert name in person.berth("system", "stop")
    assert person.inspect(name)["status"] == "stopped"


def test_host_name_hosts_and_resolver(person: Person, debian: str) -> None:
    assert person.run(debian, "uname", "-n").strip() == debian
    assert person.run(debian, "cat", "/etc/hostname").strip() == debian
    lines = [line for line in person.run(debian, "cat", "/etc/hosts").splitlines() if not line.startswith("#")]
    assert lines[0].split() == ["127.0.0.1", "localhost"]
    assert lines[1].split()[1] == debian
    assert "nameserver" in person.run(debian, "cat", "/etc/resolv.conf")


def test_a_file_of_ones_own_stays(person: Person, machine: Callable[..., str]) -> None:
    """Whoever removes the marker owns resolv.conf."""
    name = machine()
    person.berth("run", "-n", name, "--root", "--", "sh", "-c", "echo 'nameserver 192.0.2.1' > /etc/resolv.conf")
    person.berth("restart", name)
    assert person.run(name, "cat", "/etc/resolv.conf") == "nameserver 192.0.2.1\n"


@pytest.mark.parametrize("words", [("wait", "alpine", "--for", "agent"), ("wait", "alpine", "--for", "init")])
def test_wait(person: Person, alpine: str, words: tuple[str, ...]) -> None:
    person.berth("start", alpine)
    person.berth(*words, "--timeout", "30")


def test_the_python_api(person: Person, debian: str) -> None:
    said = person.script(
        "import berth\n"
        f"machine = berth.Machine({debian!r})\n"
        "result = machine.run(['uname', '-n'], capture=True)\n"
        "print(result.status, result.stdout.decode().strip())\n"
        "print(machine.info.status, [each.name for each in berth.Client().machines()].count(machine.name))\n"
        "result = machine.run(['cat'], capture=True, input=b'bytes')\n"
        "print(result.stdout)\n"
    )
    assert said.splitlines() == [f"0 {debian}", "running 1", "b'bytes'"]


def test_usage_and_prune(person: Person, debian: str) -> None:
    table = person.berth("system", "df")
    assert debian in table
    person.berth("system", "prune", "--force") if "--force" in person.berth("system", "prune", "--help") else None
    assert person.run(debian, "echo", "still here") == "still here\n"


def test_state_files_are_private(person: Person, debian: str) -> None:
    del debian
    for root in (person.layout.data, person.layout.runtime):
        assert os.stat(root).st_mode & 0o077 == 0


@pytest.mark.container("a VM's processes are its kernel's own")
@pytest.mark.parametrize("last_words", [("rm", "-f"), ("stop", "-t", "0")], ids=["rm", "stop"])
def test_no_control_group_stays(person: Person, machine: Callable[..., str], last_words: tuple[str, ...]) -> None:
    name = machine()
    for _ in range(2):
        # Many processes, deep down: they take a while to be gone.
        person.berth("run", "-n", name, "--root", "--", "sh", "-c", "for i in $(seq 50); do setsid sleep 1000 & done")
        record = json.loads((person.layout.live(name) / "container.json").read_text())  # type: ignore[arg-type]
        groups = [Path(str(path)) for path in record["cgroups"]]
        assert all(path.is_dir() for path in groups)
        person.berth(last_words[0], name, *last_words[1:])
        assert not [path for path in groups if path.exists()]
        if last_words[0] == "rm":
            break
        person.berth("start", name)
