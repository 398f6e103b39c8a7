"""`berth commit`: a machine becomes an image again, and other programs read it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from berth import proc
from person import Person
from support import need

pytestmark = pytest.mark.container

CHANGE = (
    "echo new > /srv/new; rm -f /etc/motd; rm -rf /media; mv /usr/share /usr/share2; mkdir /usr/share;"
    "touch /usr/share/x; chown 1234:4321 /srv/new; chmod 4750 /srv/new; ln -s /srv/new /link; ln /srv/new /hard;"
    "echo changed >> /etc/profile; rm -rf /opt && mkdir /opt && touch /opt/own"
)
LOOK = (
    "cat /srv/new; stat -c '%u %g %a %h' /srv/new; readlink /link; ls /usr/share /opt; tail -n 1 /etc/profile;"
    "hostname; ls -d /etc/motd /media /usr/share2/apk 2>/dev/null; true"
)


@pytest.fixture
def changed(person: Person, machine: Callable[..., str]) -> str:
    """A machine with changes of every kind."""
    name = machine("--home-mount", "none")
    person.run(name, "true")
    person.berth("run", "-n", name, "--root", "--", "sh", "-c", CHANGE)
    return name


def test_a_machine_becomes_an_image_and_a_machine_again(person: Person, changed: str) -> None:
    person.berth("stop", changed)
    assert person.berth("commit", changed, "local/own:today", "-m", "as it is") == "local/own:today\n"
    person.berth("create", "local/own:today", "--name", "again", "--home-mount", "none")
    try:
        found = person.berth("run", "-n", "again", "--root", "--", "sh", "-c", LOOK).splitlines()
    finally:
        person.berth("rm", "-f", "again")
    assert found == [
        "new", "1234 4321 4750 2", "/srv/new", "/opt:", "own", "", "/usr/share:", "x", "changed", "again",
        "/usr/share2/apk",
    ]  # fmt: skip
    shown = json.loads(person.berth("image", "inspect", "local/own:today"))
    assert shown["config"]["history"][-1]["created_by"] == f"berth commit {changed}: as it is"
    assert shown["annotations"]["org.opencontainers.image.base.digest"].startswith("sha256:")


def test_a_running_machine_stands_still_or_has_to_be_stopped(person: Person, changed: str) -> None:
    done = person.try_berth("commit", changed, "local/running:1")
    if done.status:  # no cgroup that could be frozen
        assert b"berth stop" in done.stderr
        person.berth("commit", changed, "local/running:1", "--live")
    assert person.run(changed, "echo", "alive").strip() == "alive"
    assert "local/running" in person.berth("image", "ls")


def test_others_read_what_was_committed(person: Person, changed: str, scratch: Path) -> None:
    need("skopeo")
    need("umoci")
    person.berth("stop", changed)
    person.berth("commit", changed, "local/own:other")
    archive = scratch / "image.tar"
    words = ("image", "save", "local/own:other", "-o", "-")
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
