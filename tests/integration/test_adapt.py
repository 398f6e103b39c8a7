"""Images without an init: made machines by their own package manager, or with berth's agent as the init."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import cast

import pytest

from berth import proc, syscalls
from berth.oci.diff import write_layer
from berth.userns import Extent, IdMap
from hatch_build import find_go
from images import bootstrap
from person import Person
from support import need
from tars import END, listing, unpack

HELLO = 'package main\n\nfunc main() { println("hello from a static binary") }\n'


@pytest.fixture
def make(person: Person) -> Generator[Callable[..., proc.Completed]]:
    """Try to create machines, which are removed afterwards."""
    made: list[str] = []

    def create(image: str, name: str, *options: str, timeout_s: float = 280) -> proc.Completed:
        made.append(name)
        return person.try_berth("create", image, "--name", name, *options, timeout_s=timeout_s)

    yield create
    for name in made:
        person.try_berth("rm", "--force", name)


@pytest.fixture(scope="session")
def minbase() -> Path:
    """A Debian 12 without an init, as people know it from registries."""
    for feature in ("root", "mmdebstrap", "mirror"):
        need(feature)
    return bootstrap("bookworm", ["ca-certificates"])


@pytest.fixture(scope="session")
def static(session: Path) -> Path:
    """A root file system of one static binary, without a shell."""
    need("go")
    folder = session / "static"
    folder.mkdir(mode=0o755)
    (folder / "main.go").write_text(HELLO)
    go = find_go()
    assert go is not None
    env = {"CGO_ENABLED": "0", "GO111MODULE": "off", "GOCACHE": str(folder / "cache"), "GOFLAGS": ""}
    proc.run([str(go), "build", "-o", "usr/bin/hello", "main.go"], cwd=folder, env=env, timeout_s=250)
    return packed(folder / "hello.tar", folder / "usr")


def packed(path: Path, tree: Path) -> Path:
    """Pack a tree under its own name into a tar archive that everybody may read."""
    with tarfile.open(path, "w") as archive:
        archive.add(tree, arcname=tree.name)
    return readable(path)


def readable(path: Path) -> Path:
    path.chmod(0o644)
    for folder in path.parents:
        if folder.owner() == "root" and str(folder).startswith("/tmp/pytest"):
            folder.chmod(0o755)
    return path


def changed(base: Path, target: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """Make an archive of `base` with more members in it: the last one of a name counts."""
    shutil.copyfile(base, target)
    with tarfile.open(target, "a") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return readable(target)


def leftovers(person: Person) -> list[str]:
    folders = (person.layout.machines, person.layout.runtime / "m")
    return [path.name for folder in folders if folder.exists() for path in folder.glob(".adapt-*")]


def stored(person: Person) -> list[dict[str, object]]:
    return cast("list[dict[str, object]]", json.loads(person.berth("image", "ls", "--format", "json")))


@pytest.mark.container("the image is adapted in a container in any case; VMs are tested with the result of it")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_debian_is_given_systemd_once(person: Person, make: Callable[..., proc.Completed], suite: str) -> None:
    need("mirror")
    reference = f"rootfs:{bootstrap(suite, ['ca-certificates'])}"
    first = make(reference, f"{suite}-1")
    assert first.status == 0, first.stderr.decode()
    assert b"has no init: installing one by recipe debian 1: systemd," in first.stderr
    assert person.berth("wait", f"{suite}-1", "--for", "init", "--timeout", "60").strip() == "running"
    assert person.run(f"{suite}-1", "systemctl", "is-system-running").strip() == "running"
    assert person.run(f"{suite}-1", "sudo", "-n", "id", "-u").strip() == "0"
    assert "eth0" in person.run(f"{suite}-1", "ip", "address")
    assert person.run(f"{suite}-1", "stat", "-c", "%u:%G %a", "/etc/shadow").strip() == "0:shadow 640"
    second = make(reference, f"{suite}-2", "--no-boot")
    assert second.status == 0
    assert b"installing" not in second.stderr
    assert b"(recipe debian 1)" in second.stderr
    ids = {person.run(f"{suite}-{number}", "cat", "/etc/machine-id").strip() for number in (1, 2)}
    assert len(ids) == 2, "each machine has a machine id of its own"
    assert not leftovers(person)
    base = next(item for item in stored(person) if item["reference"] == reference)
    check_result(person, str(base["digest"]))


def check_result(person: Person, base: str) -> None:
    """The adapted image tells where it is from, and holds nothing of the throw-away machine."""
    found = [item for item in stored(person) if base in str(item["annotations"])]
    (name,) = [str(item["reference"]) for item in found]
    shown = json.loads(person.berth("image", "inspect", name))
    assert shown["annotations"]["dev.berth.adapted.recipe"] == "debian 1"
    assert shown["annotations"]["org.opencontainers.image.base.digest"] == base
    assert shown["config"]["history"][-1]["created_by"] == "berth adapt, recipe debian 1"
    assert len(shown["config"]["history"]) == len(shown["config"]["rootfs"]["diff_ids"]) == 2
    blob = shown["manifest"]["layers"][-1]["digest"].removeprefix("sha256:")
    with tarfile.open(person.layout.images / "blobs/sha256" / blob) as archive:
        entries = {entry.name: entry for entry in archive}
    assert entries["etc/machine-id"].size == 0
    assert {entry.uid for entry in entries.values()} <= {*range(1000), 65534}
    own = ("etc/hosts", "etc/hostname", "etc/resolv.conf", "var/lib/berth", "var/lib/docker", "run", "dev", "proc")
    assert not [name for name in entries if name.startswith(own)]


@pytest.mark.container("what fails here fails in the container that every image is adapted in")
def test_a_broken_package_database_is_one_clear_error(
    person: Person, make: Callable[..., proc.Completed], minbase: Path, scratch: Path
) -> None:
    info = tarfile.TarInfo("./var/lib/dpkg/status")
    broken = changed(minbase, scratch / "broken.tar", (info, b"Package: bad\nStatus: what\n"))
    done = make(f"rootfs:{broken}", "broken")
    assert done.status == 1
    message, hint = done.stderr.decode().splitlines()[-2:]
    assert message.startswith("berth: rootfs:")
    assert "could not be given one: getting the package lists failed (apt-get ended with status 100)" in message
    assert "/var/lib/dpkg/status" in message
    assert hint.startswith("hint: --adapt never")
    assert not leftovers(person)
    assert "broken" not in person.berth("ls", "-q")


@pytest.mark.container("what fails here fails in the container that every image is adapted in")
def test_a_mirror_out_of_reach_is_named_by_its_step(
    person: Person, make: Callable[..., proc.Completed], minbase: Path, scratch: Path
) -> None:
    info = tarfile.TarInfo("./etc/apt/sources.list")
    offline = changed(minbase, scratch / "off.tar", (info, b"deb http://127.0.0.1:9/debian bookworm main\n"))
    done = make(f"rootfs:{offline}", "offline")
    assert done.status == 1
    assert "getting the package lists failed" in done.stderr.decode().splitlines()[-2]
    assert not leftovers(person)


def test_a_dangling_init_is_none(
    person: Person, make: Callable[..., proc.Completed], minbase: Path, scratch: Path
) -> None:
    info = tarfile.TarInfo("./sbin/init")
    info.type, info.linkname = tarfile.SYMTYPE, "/lib/systemd/systemd"
    dangling = changed(minbase, scratch / "dangling.tar", (info, b""))
    done = make(f"rootfs:{dangling}", "dangling", "--adapt", "never")
    assert done.status == 0, done.stderr.decode()
    assert b"has no init and is not adapted: berth's agent is the machine's init" in done.stderr
    assert person.run("dangling", "cat", "/proc/1/comm").strip() in ("berth-agent", "agent", "exe", "init")
    assert person.run("dangling", "id", "-un").strip() == person.name
    person.berth("stop", "dangling", "-t", "20")
    assert person.run("dangling", "true") == ""


def test_one_static_binary_is_a_machine(person: Person, make: Callable[..., proc.Completed], static: Path) -> None:
    done = make(f"rootfs:{static}", "static")
    assert done.status == 0, done.stderr.decode()
    assert b"has no init and no shell: berth's agent is the machine's init" in done.stderr
    ran = person.try_berth("run", "-n", "static", "--root", "--", "/usr/bin/hello")
    assert (ran.status, ran.stderr) == (0, b"hello from a static binary\n")
    person.berth("stop", "static", "-t", "20")
    assert person.inspect("static")["status"] == "stopped"
    person.berth("start", "static")
    assert person.try_berth("run", "-n", "static", "--", "hello").stderr == b"hello from a static binary\n"


@pytest.fixture
def endless(person: Person) -> Generator[None]:
    """A recipe of the person's own that never ends."""
    folder = person.layout.config / "recipes"
    folder.mkdir(parents=True)
    (folder / "debian.toml").write_text(
        'schema = 1\nversion = 1\nids = ["debian"]\nmanagers = ["apt-get"]\n'
        'steps = [{ say = "waiting", run = ["sleep", "1000"] }]\n'
    )
    yield
    shutil.rmtree(folder)


@contextlib.contextmanager
def adapting(person: Person, image: Path, name: str) -> Generator[subprocess.Popen[bytes]]:
    """Begin to create a machine, as far as the recipe's step; whatever happens, it is ended."""
    process = person.popen("create", f"rootfs:{image}", "--name", name)
    assert process.stderr is not None
    said: list[bytes] = []
    try:
        while not said or b": waiting" not in said[-1]:
            said.append(process.stderr.readline())
            assert said[-1], b"".join(said)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.container("the throw-away machine is a container in any case")
@pytest.mark.usefixtures("endless")
def test_nothing_stays_of_an_adapting_that_was_killed(
    person: Person, make: Callable[..., proc.Completed], minbase: Path, alpine_tar: Path
) -> None:
    with adapting(person, minbase, "killed"):
        assert len(set(leftovers(person))) == 1
        assert not person.berth("ls", "-q").count("adapt")
        person.berth("image", "prune")
    assert leftovers(person)
    done = make(f"rootfs:{alpine_tar}", "after", "--home-mount", "none")  # any next create sweeps
    assert done.status == 0, done.stderr.decode()
    assert not leftovers(person)
    assert "killed" not in person.berth("ls", "-q")


@pytest.mark.container("the throw-away machine is a container in any case")
@pytest.mark.usefixtures("endless")
def test_nothing_stays_of_an_adapting_that_was_interrupted(person: Person, minbase: Path) -> None:
    with adapting(person, minbase, "interrupted") as process:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
    assert not leftovers(person)


# The layer maker on a real overlayfs of root's -----------------------------------------------------------------------


@pytest.mark.root
def test_roots_overlayfs_becomes_the_same_tree(scratch: Path) -> None:
    """Everything that overlayfs marks for root: whiteouts, opaque and renamed directories, capabilities."""
    for folder in ("lower/a/deep", "lower/b", "lower/gone", "upper", "work", "merged"):
        (scratch / folder).mkdir(parents=True)
    for name in ("a/f", "a/deep/g", "b/h", "gone/i", "j"):
        (scratch / "lower" / name).write_text(name)
    lower = write_packed(scratch / "lower")
    options = f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work,redirect_dir=on"
    syscalls.mount("overlay", str(scratch / "merged"), "overlay", 0, options)
    merged = scratch / "merged"
    try:
        (merged / "a").rename(merged / "renamed")
        (merged / "renamed/deep").rename(merged / "renamed/deeper")
        (merged / "renamed/f").unlink()
        (merged / "j").unlink()
        shutil.rmtree(merged / "gone")
        (merged / "gone").mkdir()
        (merged / "gone/new").write_text("new")
        shutil.rmtree(merged / "b")
        (merged / "b").write_text("a file now")
        # A capability that was granted in a user namespace names that namespace's root: here 1900000000.
        value = bytes.fromhex("0100000300040000" + "00" * 12) + (1_900_000_000).to_bytes(4, "little")
        os.setxattr(merged / "gone/new", "security.capability", value)
        expected = listing(merged)
    finally:
        subprocess.run(["umount", str(merged)], check=True)
    out = io.BytesIO()
    same = IdMap((Extent(0, 0, 2**31),), (Extent(0, 0, 2**31),))
    digests = write_layer(str(scratch / "upper"), out, lower=str(scratch / "lower"), idmap=same)
    assert digests.whiteouts == 3  # a, j, and the opaque mark of `gone`
    unpack(scratch / "root", lower, out.getvalue()[: -len(END)])
    assert listing(scratch / "root") == expected
    assert len(os.getxattr(scratch / "root/gone/new", "security.capability")) == 20, "meant for any namespace"


def write_packed(folder: Path) -> bytes:
    out = io.BytesIO()
    write_layer(str(folder), out)
    return out.getvalue()[: -len(END)]
