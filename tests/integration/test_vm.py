"""What only a VM has: a kernel of its own, a disk, memory that comes back, QEMU beside it and all that can go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from person import Person

MIB = 1 << 20


pytestmark = pytest.mark.vm


def wait(check: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def as_guest_root(person: Person, machine: str, script: str) -> str:
    return person.berth("run", "-n", machine, "--root", "--", "sh", "-c", script)


def test_it_has_a_kernel_of_its_own(person: Person, alpine: str) -> None:
    release = person.run(alpine, "uname", "-r").strip()
    assert release != os.uname().release
    found = person.inspect(alpine)
    assert (found["kernel"], found["isolation"]) == (release, "vm")
    assert release in person.berth("system", "kernel", "ls")


def test_modules_of_its_kernel_can_be_loaded(person: Person, alpine: str) -> None:
    as_guest_root(person, alpine, "modprobe dummy && modprobe wireguard && ip link add probe type dummy")
    assert "wireguard" in person.run(alpine, "cat", "/proc/modules")
    as_guest_root(person, alpine, "ip link del probe")


def test_qemu_is_nobody_and_in_a_sandbox(person: Person, alpine: str) -> None:
    pid = person.main_pid(alpine)
    facts = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    uid = int(facts["Uid"].split()[0])
    assert uid >= 1 << 30 if person.is_root else uid == person.uid
    assert int(facts["CapEff"], 16) == 0
    assert facts["NoNewPrivs"].strip() == "1"
    assert facts["Seccomp"].strip() == "2"
    inodes = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            assert f"socket:[{line.split()[9]}]" not in inodes, f"QEMU has a {table} socket: {line}"
    live = person.layout.live(alpine)  # type: ignore[arg-type]
    assert live.stat().st_mode & 0o077 == 0
    assert [path.name for path in live.glob("*.sock") if path.stat().st_mode & 0o077] == []


def test_a_killed_agent_comes_back_by_itself(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    main = person.main_pid(name)
    person.berth("run", "-n", name, "--root", "-d", "--", "sleep", "4545")
    person.try_berth("run", "-n", name, "--root", "--", "sh", "-c", "kill -9 $(pgrep -f 'agent serve')")
    wait(lambda: person.try_berth("run", "-n", name, "--", "true").status == 0, "no agent answers")
    assert person.run(name, "sh", "-c", "pgrep -f 'sleep 4545' | head -1").strip()
    assert person.main_pid(name) == main


def test_the_clock_is_right(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    assert abs(int(person.run(name, "date", "+%s")) - time.time()) < 5
    as_guest_root(person, name, "date -s @86400")
    os.kill(person.pids(name)["keeper"], signal.SIGKILL)  # the next one sets it, as after the host's sleep
    wait(lambda: not person.pids(name)["keeper"], "the keeper lives")
    person.run(name, "true")
    wait(lambda: abs(int(person.run(name, "date", "+%s")) - time.time()) < 5, "the clock stays wrong")


def test_what_was_synced_outlives_a_killed_qemu(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    as_guest_root(person, name, "echo kept > /srv/kept; sync; yes > /srv/half & sleep 0.5")
    os.kill(person.main_pid(name), signal.SIGKILL)
    wait(lambda: person.inspect(name)["status"] == "stopped", "it is not found stopped")
    assert person.run(name, "cat", "/srv/kept") == "kept\n"
    assert person.run(
        name, "sh", "-c", "touch /tmp/x && dmesg 2>/dev/null | grep -c 'EXT4-fs error'; true"
    ).strip() in ("0", "")


def test_a_qemu_that_nobody_recorded_is_ended(person: Person, machine: Callable[..., str]) -> None:
    """As when the launcher is killed right after it has started QEMU."""
    name = machine()
    stray = person.main_pid(name)
    (person.layout.live(name) / "vm.json").unlink()  # type: ignore[arg-type]
    assert person.run(name, "echo", "again") == "again\n"
    assert person.main_pid(name) != stray
    assert not Path(f"/proc/{stray}/exe").exists()


def test_a_panic_ends_it_and_is_told(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    person.try_berth("run", "-n", name, "--root", "--", "sh", "-c", "sync; echo c > /proc/sysrq-trigger")
    wait(lambda: person.inspect(name)["status"] == "stopped", "it still runs")
    assert "sysrq triggered crash" in person.berth("logs", "--boot", name)
    assert person.run(name, "echo", "again") == "again\n"


def test_an_init_that_fails_is_told(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    as_guest_root(person, name, "mv /sbin/init /sbin/init.away")
    person.try_berth("stop", name)
    done = person.try_berth("start", name)
    assert done.status == 1
    assert "/sbin/init" in done.stderr.decode()
    assert "berth logs --boot" in done.stderr.decode()
    assert person.inspect(name)["status"] == "stopped"


def test_a_kernel_that_is_none_is_refused(person: Person, machine: Callable[..., str]) -> None:
    name = machine("--no-boot", "--kernel", "/etc/services")
    done = person.try_berth("start", name)
    assert done.status == 2
    assert "/etc/services" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_virtualization_is_refused_with_the_reason(person: Person, machine: Callable[..., str]) -> None:
    if os.environ.get("BERTH_REQUIRE", "").find("kvm") >= 0:
        pytest.skip("needs a host without hardware virtualization")
    name = machine("--no-boot", "--virtualization")
    done = person.try_berth("start", name)
    assert done.status == 1
    assert "virtualization" in done.stderr.decode()
    assert "hint: " in done.stderr.decode()


def test_a_damaged_disk_is_told_and_kept(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    person.berth("stop", name)
    disk = person.layout.bundle(name) / "vm/disk.qcow2"  # type: ignore[arg-type]
    size = disk.stat().st_size
    with disk.open("r+b") as file:
        file.write(b"\0" * 4096)
    done = person.try_berth("start", name)
    assert done.status == 1
    assert "disk" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert disk.stat().st_size == size


def test_the_disk_grows(person: Person, machine: Callable[..., str]) -> None:
    name = machine("--disk", "2G")

    def blocks() -> int:
        return int(person.run(name, "df", "-k", "/").splitlines()[-1].split()[1])

    wait(lambda: 1.7 * MIB < blocks() < 2.1 * MIB, "it does not have 2 GiB")
    assert b"restart" in person.try_berth("set", "-n", name, "disk=5G").stderr
    person.berth("restart", name)
    wait(lambda: blocks() > 4.6 * MIB, "it has not grown")
    assert person.try_berth("set", "-n", name, "disk=3G").status == 2


def test_what_is_deleted_leaves_the_hosts_file(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    disk = person.layout.bundle(name) / "vm/disk.qcow2"  # type: ignore[arg-type]
    as_guest_root(person, name, "dd if=/dev/urandom of=/srv/big bs=1M count=200 2>/dev/null; sync")
    full = disk.stat().st_blocks * 512
    assert full > 200 * MIB
    as_guest_root(person, name, "rm /srv/big; sync; fstrim /")
    wait(lambda: disk.stat().st_blocks * 512 < full - 180 * MIB, "the file keeps its size")


def resident(pid: int) -> int:
    """Bytes of memory that belong to a process, shared memory counted."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def test_memory_that_the_guest_frees_comes_back(person: Person, machine: Callable[..., str]) -> None:
    name = machine("--memory", "1536M")
    pid = person.main_pid(name)
    before = resident(pid)
    as_guest_root(person, name, "mount -t tmpfs -o size=800m tmpfs /mnt && dd if=/dev/zero of=/mnt/x bs=1M count=600")
    peak = resident(pid)
    assert peak > before + 500 * MIB
    as_guest_root(person, name, "umount /mnt")
    wait(lambda: resident(pid) < peak - 450 * MIB, f"it keeps what it had: {before} {peak}")


def test_a_flood_on_the_console_costs_little(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    person.berth("run", "-n", name, "--root", "-d", "--", "sh", "-c", "timeout 8 yes berth-flood > /dev/console")
    assert person.run(name, "echo", "answers") == "answers\n"
    time.sleep(3)
    assert person.run(name, "echo", "answers") == "answers\n"
    logs = person.layout.bundle(name) / "logs"  # type: ignore[arg-type]
    assert sum(path.stat().st_size for path in logs.iterdir()) < 24 * MIB


def test_a_dead_folder_server_is_told_and_a_restart_mends_it(
    person: Person, machine: Callable[..., str], project: Path
) -> None:
    name = machine()
    live = person.layout.live(name)  # type: ignore[arg-type]
    servers = json.loads((live / "vm.json").read_text())["servers"]
    assert [server["target"] for server in servers] == [str(person.home)]
    os.kill(servers[0]["pid"], signal.SIGKILL)
    wait(lambda: person.inspect(name)["problems"] != [], "nobody tells")
    assert str(person.home) in str(person.inspect(name)["problems"])
    person.berth("restart", name)
    assert person.run(name, "cat", "hello.txt", cwd=project) == "hello from the host\n"


@pytest.fixture
def little_room(person: Person, session: Path) -> Generator[Path]:
    """A file system of 700 MiB, the person's own, for berth's data."""
    image, folder = session / f"room-{person.label}.img", session / f"room-{person.label}"
    image.touch()
    os.truncate(image, 700 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    folder.mkdir()
    subprocess.run(person.beside(["mount", "-o", "loop", str(image), str(folder)]), check=True)
    subprocess.run(person.beside(["chown", str(person.uid), str(folder)]), check=True)
    yield folder
    subprocess.run(person.beside(["umount", str(folder)]), check=True)
    folder.rmdir()
    image.unlink()


def test_a_full_host_disk_pauses_it_and_loses_nothing(person: Person, little_room: Path, alpine_tar: Path) -> None:
    roots = {"BERTH_DATA_DIR": str(little_room / "data"), "BERTH_RUNTIME_DIR": str(little_room / "run")}

    def inside(*words: str) -> list[str | bytes]:
        return person.beside(list(words))

    person.berth("create", f"rootfs:{alpine_tar}", "--name", "tight", "--home-mount", "none", env=roots, timeout_s=300)
    try:
        filler = little_room / "filler"
        subprocess.run(inside("sh", "-c", f"cat /dev/zero > {filler}"), stderr=subprocess.DEVNULL, check=False)
        script = "dd if=/dev/urandom of=/srv/big bs=1M count=64 && sync && md5sum /srv/big"
        writing = subprocess.Popen(
            person.command([*person.program, "run", "-n", "tight", "--root", "--", "sh", "-c", script], roots, None),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

        def problems() -> str:
            return str(json.loads(person.berth("inspect", "tight", env=roots))["problems"])

        wait(lambda: "paused" in problems(), "nobody tells", 120)
        assert writing.poll() is None
        subprocess.run(inside("rm", str(filler)), check=True)
        said, _ = writing.communicate(timeout=120)
        assert writing.returncode == 0
        wait(lambda: "paused" not in problems(), "it is still told to be paused")
        again = person.berth("run", "-n", "tight", "--root", "--", "md5sum", "/srv/big", env=roots)
        assert again == said.decode()
    finally:
        person.berth("rm", "--force", "tight", env=roots)


def test_a_container_and_a_vm_see_each_other(person: Person, alpine: str, alpine_tar: Path) -> None:
    person.berth("create", f"rootfs:{alpine_tar}", "--name", "neighbour", "--isolation", "container")
    try:
        for here, there in ((alpine, "neighbour"), ("neighbour", alpine)):
            as_guest_root(person, here, f"ping -c 1 -w 10 {there}")
    finally:
        person.berth("rm", "--force", "neighbour")


def test_an_arm64_image_runs_on_any_host(person: Person, alpine_tar: Path) -> None:
    if not person.is_root:
        pytest.skip("needs minutes of emulation: once, as root, is enough")
    tar = alpine_tar.with_name("alpine-minirootfs-3.20.3-aarch64.tar.gz")
    words = ("create", f"rootfs:{tar}", "--platform", "linux/arm64", "--name", "arm")
    person.berth(*words, timeout_s=280)
    try:
        assert person.run("arm", "uname", "-m", timeout_s=120).strip() == "aarch64"
        assert person.inspect("arm")["platform"] == "linux/arm64"
    finally:
        person.berth("rm", "--force", "arm")
