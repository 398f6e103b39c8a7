"""`berth commit`: a machine becomes an image again, and other programs read it.

The tests share one machine, in their order: it is committed while it runs, then stopped and committed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from berth import proc
from person import Person
from support import need

CHANGE = (
    "echo new > /srv/new; rm -f /etc/motd; rm -rf /media; mv /usr/share /usr/share2; mkdir /usr/share;"
    "touch /usr/share/x; chown 1234:4321 /srv/new; chmod 4750 /srv/new; ln -s /srv/new /link; ln /srv/new /hard;"
    "echo changed >> /etc/profile; rm -rf /opt && mkdir /opt && touch /opt/own;"
    "mkfifo /srv/pipe; touch '/srv/ü b'; truncate -s 100M /srv/sparse; echo end >> /srv/sparse;"
    # The size and the time of before: only the kernel knows.
    "touch -r /etc/issue /tmp/then; tr a-z A-Z < /etc/issue > /tmp/issue; cat /tmp/issue > /etc/issue;"
    "touch -r /tmp/then /etc/issue"
)
LOOK = (
    "cat /srv/new; stat -c '%u %g %a %h' /srv/new; readlink /link; ls /usr/share /opt; tail -n 1 /etc/profile;"
    "hostname; ls -d /etc/motd /media /usr/share2/apk 2>/dev/null; tail -c 4 /srv/sparse; head -c 7 /etc/issue; echo;"
    "ls /srv; true"
)
SEEN = [
    "new", "1234 4321 4750 2", "/srv/new", "/opt:", "own", "", "/usr/share:", "x", "changed", "again",
    "/usr/share2/apk", "end", "WELCOME", "new", "pipe", "sparse", "ü b",
]  # fmt: skip
# What every machine has of its own, or its isolation makes.
OWN = (
    "proc", "sys", "dev", "run", "tmp", "lost+found", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/machine-id",
    "var/lib/berth", "var/lib/docker", "var/lib/containers", "lib/modules",
)  # fmt: skip
# In few processes: each costs an emulated machine some hundredths of a second.
TREE = (
    "cd / && tree() { find . -xdev \\( " + " -o ".join(f"-path ./{path}" for path in OWN) + ' \\) -prune -o "$@"; } &&'
    "tree -type d -exec stat -c '%n %f %u %g' {} + | sort && tree -type f -exec md5sum {} + | sort &&"
    "tree ! -type d -exec stat -c '%N %f %u %g %h %s %Y' {} + | sort"
)


@pytest.fixture(scope="module")
def changed(person: Person, alpine_tar: Path) -> Generator[str]:
    """A running machine with changes of every kind."""
    person.berth("create", f"rootfs:{alpine_tar}", "--name", "changed", "--home-mount", "none")
    person.berth("run", "-n", "changed", "--root", "--", "sh", "-c", CHANGE)
    yield "changed"
    person.berth("rm", "--force", "changed")


@pytest.fixture(scope="module")
def committed(person: Person, changed: str) -> str:
    """What that machine has become, when it is stopped."""
    person.berth("stop", changed)
    assert person.berth("commit", changed, "local/own:today", "-m", "as it is") == "local/own:today\n"
    assert person.inspect(changed)["status"] == "stopped"
    return "local/own:today"


def layer(person: Person, image: str) -> Path:
    """Return where the store has what the machine has changed."""
    shown = json.loads(person.berth("image", "inspect", image))
    digest = str(shown["config"]["rootfs"]["diff_ids"][-1])
    return person.layout.images / "blobs/sha256" / digest.removeprefix("sha256:")


def names(archive: Path) -> list[str]:
    return proc.run(["tar", "-tf", str(archive)]).stdout.decode().splitlines()


def test_a_running_machine_stands_still_or_has_to_be_stopped(person: Person, changed: str) -> None:
    done = person.try_berth("commit", changed, "local/running:1")
    if done.status:  # no cgroup that could be frozen
        assert person.isolation == "container"
        assert b"berth stop" in done.stderr
        person.berth("commit", changed, "local/running:1", "--live")
    assert person.run(changed, "echo", "alive").strip() == "alive"
    assert "local/running" in person.berth("image", "ls")


FREEZE = """
import os, subprocess
from berth.agent import connect
from berth.engine.qemu.freezing import frozen
from berth.errors import InvalidStateError
from berth.layout import Layout
def guest(*words):
    return subprocess.Popen([*{program!r}, "run", "-n", {name!r}, "--root", "--", *words])
early = ""
try:
    path = Layout.from_environment().agent_socket({name!r})
    with frozen(lambda: connect(path, timeout_s=10), {name!r}):
        writer = guest("touch", "/srv/frozen")
        assert guest("true").wait() == 0
        assert writer.poll() is None
        {then}
except InvalidStateError as error:
    early = str(error)
assert writer.wait() == 0
print(early)
"""


@pytest.mark.vm
def test_whoever_is_killed_a_frozen_machine_goes_on(person: Person, changed: str) -> None:
    def freeze(then: str) -> str:
        return person.script(FREEZE.format(program=list(person.program), name=changed, then=then))

    assert freeze("pass") == "\n"
    for process in ("self/exe [f]reeze", "agent [t]haw"):
        then = f'guest("sh", "-c", "kill -9 $(pgrep -f \'{process}\')").wait(); writer.wait()'
        assert "could not be kept from changing" in freeze(then)
    with pytest.raises(AssertionError):
        freeze("os.kill(os.getpid(), 9)")
    person.run(changed, "touch", "/tmp/alive", timeout_s=60)
    person.berth("run", "-n", changed, "--root", "--", "rm", "/srv/frozen", timeout_s=60)


@pytest.mark.vm
def test_a_killed_commit_leaves_nothing(person: Person, changed: str) -> None:
    with person.popen("commit", changed, "local/never:1") as commit:

        def readers() -> set[int]:
            return {pid for pid in _children(commit.pid) if b"berth-reader-" in _text(Path(f"/proc/{pid}/cmdline"))}

        _wait(lambda: bool(readers()), "no reader starts")
        doomed = readers()
        for pid in {commit.pid, *_children(commit.pid)} - doomed:  # berth, and what the person's command stands behind
            os.kill(pid, signal.SIGKILL)
        commit.communicate()
    _wait(lambda: all(proc.start_time(pid) is None for pid in doomed), "the reader works on")
    assert "local/never" not in person.berth("image", "ls")
    assert person.run(changed, "echo", "alive") == "alive\n"


@pytest.mark.vm
def test_after_an_unclean_end_its_disk_is_only_looked_at(person: Person, changed: str) -> None:
    person.berth("run", "-n", changed, "--root", "--", "sh", "-c", "echo synced > /tmp/synced; sync")
    os.kill(person.main_pid(changed), signal.SIGKILL)
    _wait(lambda: person.inspect(changed)["status"] == "stopped", "it still runs")
    disk = person.layout.bundle(changed) / "vm/disk.qcow2"  # type: ignore[arg-type]
    before = hashlib.sha256(disk.read_bytes()).digest()
    person.berth("commit", changed, "local/unclean:1")
    assert hashlib.sha256(disk.read_bytes()).digest() == before
    assert "tmp/synced" in names(layer(person, "local/unclean:1"))


def test_a_machine_becomes_an_image_and_a_machine_again(person: Person, committed: str) -> None:
    """Of both isolations, and the same tree in each."""
    other = "container" if person.isolation == "vm" else None
    trees: list[str] = []
    for isolation in filter(None, (person.isolation, other)):
        person.berth("create", committed, "--name", "again", "--home-mount", "none", "--isolation", isolation)
        try:
            found = person.berth("run", "-n", "again", "--root", "--", "sh", "-c", LOOK).splitlines()
            trees.append(person.berth("run", "-n", "again", "--root", "--", "sh", "-c", TREE))
        finally:
            person.berth("rm", "-f", "again")
        assert found == SEEN
    assert len(trees[0].splitlines()) > 500
    assert trees[0] == trees[-1]
    shown = json.loads(person.berth("image", "inspect", committed))
    assert shown["config"]["history"][-1]["created_by"] == "berth commit changed: as it is"
    assert shown["annotations"]["org.opencontainers.image.base.digest"].startswith("sha256:")


def test_only_what_has_changed_is_in_the_layer(person: Person, committed: str) -> None:
    blob = layer(person, committed)
    found = names(blob)
    assert blob.stat().st_size < 1_000_000  # neither holes nor what is as it was
    assert {"etc/.wh.motd", ".wh.media", "etc/issue"} <= set(found)
    kept_out = ("bin/", "usr/bin/", "etc/passwd", "etc/hosts", "etc/hostname", "lost+found", "var/lib/berth", "lib/mod")
    assert [name for name in found if name.startswith(kept_out) and name not in ("etc/passwd", "etc/passwd-")] == []


def test_others_read_what_was_committed(person: Person, committed: str, scratch: Path) -> None:
    need("skopeo")
    need("umoci")
    archive = scratch / "image.tar"
    words = ("image", "save", committed, "-o", "-")
    with archive.open("wb") as file, person.popen(*words, stdout=file, stderr=subprocess.DEVNULL) as process:
        assert process.wait(timeout=120) == 0
    proc.run(["skopeo", "--insecure-policy", "copy", "--all", f"oci-archive:{archive}", f"oci:{scratch / 'l'}:x"])
    proc.run(["umoci", "unpack", "--rootless", "--image", f"{scratch / 'l'}:x", str(scratch / "bundle")])
    root = scratch / "bundle/rootfs"
    assert (root / "srv/new").read_text() == "new\n"
    assert (root / "srv/new").stat().st_ino == (root / "hard").stat().st_ino
    assert not (root / "media").exists()
    assert [path.name for path in (root / "usr/share").iterdir()] == ["x"]
    assert [path.name for path in (root / "opt").iterdir()] == ["own"]
    assert not (root / "var/lib/berth").exists()


@pytest.mark.container("it is about an image that another program has made")
def test_what_others_write_can_be_built_on_and_booted(person: Person, alpine_tar: Path, scratch: Path) -> None:
    """umoci makes an image, with layers and a configuration of its own; we take it."""
    need("umoci")
    need("root")
    layout, bundle = scratch / "layout", scratch / "bundle"
    proc.run(["umoci", "init", "--layout", str(layout)])
    proc.run(["umoci", "new", "--image", f"{layout}:x"])
    proc.run(["umoci", "unpack", "--image", f"{layout}:x", str(bundle)])
    proc.run(["tar", "-xzf", str(alpine_tar), "-C", str(bundle / "rootfs")])
    proc.run(["umoci", "repack", "--image", f"{layout}:x", str(bundle)])
    (bundle / "rootfs/second").write_text("2\n")
    (bundle / "rootfs/etc/motd").unlink()
    proc.run(["umoci", "repack", "--image", f"{layout}:x", "--refresh-bundle", str(bundle)])
    proc.run(["chmod", "-R", "a+rX", str(layout)])
    person.berth("create", f"oci:{layout}:x", "--name", "umoci", "--home-mount", "none")
    try:
        assert person.run("umoci", "sh", "-c", "cat /second; ls /etc/motd 2>/dev/null || true") == "2\n"
    finally:
        person.berth("rm", "-f", "umoci")


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _children(pid: int) -> list[int]:
    """List all processes below one, the deepest last."""
    found: list[int] = []
    for text in _text(Path(f"/proc/{pid}/task/{pid}/children")).split():
        found += [int(text), *_children(int(text))]
    return found


def _wait(check: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
