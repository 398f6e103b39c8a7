"""Hosts that lack something: a full disk, no subordinate ids, no delegated cgroup, an unreadable home."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

from berth import proc
from person import Person
from support import need


@pytest.fixture
def small_disk(person: Person, session: Path) -> Generator[Path]:
    """A file system of 24 MiB on a loop device, the person's own."""
    need("root")
    image, folder = session / f"disk-{person.label}.img", session / f"disk-{person.label}"
    with image.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    folder.mkdir()
    try:
        subprocess.run(person.beside(["mount", "-o", "loop", str(image), str(folder)]), check=True)
    except subprocess.CalledProcessError:
        pytest.skip("needs loop devices")
    subprocess.run(person.beside(["chown", str(person.uid), str(folder)]), check=True)
    yield folder
    subprocess.run(person.beside(["umount", str(folder)]), check=True)
    folder.rmdir()
    image.unlink()


@pytest.mark.container("test_vm.py has a VM's own full disk")
def test_a_full_disk_is_told_and_nothing_is_half_made(
    person: Person, small_disk: Path, alpine: str, alpine_tar: Path
) -> None:
    roots = {"BERTH_DATA_DIR": str(small_disk / "data")}
    assert person.berth("create", "--no-boot", f"rootfs:{alpine_tar}", "--name", "small", env=roots).strip() == "small"
    filler = small_disk / "filler"
    subprocess.run(person.beside(["sh", "-c", f"cat /dev/zero > {filler}"]), stderr=subprocess.DEVNULL, check=False)
    # root may use ext4's reserve; a second image does not fit even there.
    done = person.try_berth("create", "rootfs:/usr/lib/x86_64-linux-gnu", "--name", "big", env=roots, timeout_s=300)
    assert done.status == 1
    said = done.stderr.decode()
    assert "No space left" in said or "disk is full" in said, said
    assert "Traceback" not in said
    assert person.berth("ls", "-q", env=roots).split() == ["small"]
    subprocess.run(person.beside(["rm", str(filler)]), check=True)
    person.berth("rm", "small", env=roots)
    find = person.beside(["find", str(small_disk / "data"), "-name", "*partial*"])
    assert subprocess.run(find, capture_output=True, check=True).stdout == b""
    assert person.run(alpine, "echo", "untouched") == "untouched\n"


def _covered(person: Person, path: str, cover: Path, words: Sequence[str]) -> proc.Completed:
    """Run berth where `path` shows `cover`."""
    script = 'mount --bind "$0" "$1" && shift && exec "$@"'
    command = person.command([*person.program, *words], {}, None)
    entered = len(person.beside([]))  # the command enters the person's mounts itself: the cover goes in after that
    argv = [*command[:entered], "unshare", "-m", "sh", "-c", script, str(cover), path, *command[entered:]]
    done = subprocess.run(argv, input=b"", capture_output=True, timeout=120, check=False)
    return proc.Completed(done.returncode, done.stdout, done.stderr)


def test_no_subordinate_ids_is_told_with_the_cure(person: Person, session: Path, alpine: str, alpine_tar: Path) -> None:
    if person.is_root:
        pytest.skip("needs an ordinary user: root needs no subordinate ids")
    empty = session / "empty-subuid"
    empty.touch()
    empty.chmod(0o644)
    done = _covered(person, "/etc/subuid", empty, ("create", f"rootfs:{alpine_tar}", "--name", "nosub"))
    empty.unlink()
    assert done.status == 1
    assert "has no range of 65536 ids in /etc/subuid" in done.stderr.decode()
    assert "usermod --add-subuids" in done.stderr.decode()
    assert "nosub" not in person.berth("ls", "-q").split()
    assert person.run(alpine, "echo", "untouched") == "untouched\n"


@pytest.mark.container("a VM's cgroups are its kernel's")
def test_without_a_cgroup_machines_run_without_services(person: Person, debian: str) -> None:
    """An ordinary user outside of any delegated cgroup: systemd can't run, commands do, and both is told."""
    if person.is_root:
        pytest.skip("needs an ordinary user: root may make cgroups")
    person.berth("stop", debian)
    done = _without_cgroup(person, ("start", debian))
    assert done.status == 0, done.stderr
    assert "no services: systemd needs a cgroup" in done.stderr.decode()
    assert _without_cgroup(person, ("run", "-n", debian, "echo", "up")).stdout == b"up\n"
    limits = str(person.inspect(debian)["limits"])
    assert "not limited" in limits
    assert "no services" in limits
    assert _without_cgroup(person, ("stop", debian)).status == 0
    person.berth("start", debian)
    assert person.inspect(debian)["limits"] != limits


def _without_cgroup(person: Person, words: Sequence[str]) -> proc.Completed:
    command = person.command([*person.program, *words], {}, None)
    joins = [index for index, word in enumerate(command) if str(word).endswith("cgroup.procs")]
    if not joins:
        pytest.skip("needs a host where the tests can delegate a cgroup")
    at = joins[0]
    # Before it stand `sh -c SCRIPT`, which joins; what follows is the command itself.
    argv = command[: at - 3] + command[at + 1 :]
    done = subprocess.run(argv, input=b"", capture_output=True, timeout=120, check=False)
    return proc.Completed(done.returncode, done.stdout, done.stderr)


def test_an_unreadable_home(person: Person, machine: Callable[..., str]) -> None:
    if person.is_root:
        pytest.skip("needs an ordinary user: root reads everything")
    mode = person.home.stat().st_mode & 0o7777
    name = machine("--no-boot")
    person.home.chmod(0)
    try:
        done = person.try_berth("run", "-n", name, "--", "pwd", cwd=Path("/"))
    finally:
        person.home.chmod(mode)
    assert (done.status, done.stdout) == (0, b"/\n"), done.stderr
