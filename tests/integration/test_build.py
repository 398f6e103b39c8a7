"""`berth build`, with real buildah: as root and as an ordinary user, and what comes out read by other programs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from berth import proc
from berth.oci.digest import digest_of
from person import Person
from support import need

pytestmark = pytest.mark.container  # what is built is the same for both isolations; a VM boots it in the last test

MACHINE = """
FROM local/debian:12
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get -o Acquire::Check-Valid-Until=false update \\
 && apt-get install -y --no-install-recommends dbus systemd openssh-server net-tools iproute2 iputils-ping \\
    curl wget vim-tiny man sudo \\
 && rm -rf /var/lib/apt/lists/*
RUN : > /etc/machine-id \\
 && systemctl set-default multi-user.target \\
 && systemctl mask dev-hugepages.mount sys-fs-fuse-connections.mount systemd-update-utmp.service \\
    systemd-tmpfiles-setup.service console-getty.service
"""


@pytest.fixture(scope="module")
def base(person: Person, alpine_tar: Path) -> str:
    """A small image in the store, to build on."""
    need("buildah")
    person.berth("image", "import", str(alpine_tar), "local/base:1")
    return "local/base:1"


@pytest.fixture
def context(person: Person) -> Generator[Path]:
    """A folder to build in: the person's, and closed to everybody else."""
    folder = person.home / f"berth build {os.getpid()}"
    folder.mkdir(mode=0o700)
    os.chown(folder, person.uid, -1)
    yield folder
    shutil.rmtree(folder)


def write(person: Person, folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name
        path.write_text(text)
        path.chmod(0o600)
        os.chown(path, person.uid, -1)


def saved(person: Person, reference: str, scratch: Path) -> Path:
    """Save an image where root can read it."""
    archive = scratch / "image.tar"
    with (
        archive.open("wb") as file,
        person.popen("image", "save", reference, "-o", "-", stdout=file, stderr=subprocess.DEVNULL) as process,
    ):
        assert process.wait(timeout=120) == 0
    return archive


def content(person: Person, reference: str, scratch: Path) -> Path:
    """Unpack an image by umoci, which is none of ours, out of an archive of it; return its root file system."""
    need("skopeo")
    need("umoci")
    archive = saved(person, reference, scratch)
    proc.run(["skopeo", "--insecure-policy", "copy", f"oci-archive:{archive}", f"oci:{scratch / 'layout'}:x"])
    proc.run(["umoci", "unpack", "--image", f"{scratch / 'layout'}:x", str(scratch / "bundle")])
    return scratch / "bundle/rootfs"


def test_a_dockerfile_becomes_an_image_that_others_read(
    person: Person, base: str, context: Path, scratch: Path
) -> None:
    need("root")
    write(
        person, context, kept="kept\n", ignored="no\n", **{".dockerignore": "ignored\n"},
        Dockerfile=f"""
            ARG BASE=nothing
            FROM ${{BASE}} AS tools
            ARG WORD
            RUN echo "$WORD" > /word && rm -rf /opt && rm -rf /media && mkdir /media && touch /media/new
            RUN mv /srv /srv2 && ln /word /word2 && chown 1234:4321 /word && chmod 4755 /bin/busybox
            FROM tools AS test
            RUN false
            FROM {base}
            COPY --from=tools /word /media /from/
            COPY . /context
            COPY --from=tools / /all
        """,
    )  # fmt: skip
    person.berth(
        "build", "-t", "local/built:1", "--build-arg", f"BASE={base}", "--build-arg", "WORD=a b", str(context),
        timeout_s=300,
    )  # fmt: skip
    root = content(person, "local/built:1", scratch)
    assert (root / "from/word").read_text() == "a b\n"
    assert sorted(os.listdir(root / "context")) == [".dockerignore", "Dockerfile", "kept"]
    assert os.listdir(root / "all/media") == ["new"]
    assert not (root / "all/opt").exists()
    assert (root / "all/srv2").is_dir()
    status = (root / "all/word").stat()
    assert (status.st_uid, status.st_gid) == (1234, 4321)
    assert (root / "all/bin/busybox").stat().st_mode & 0o7777 == 0o4755


def test_layers_are_shared_and_steps_cached(person: Person, base: str, context: Path) -> None:
    write(person, context, Dockerfile=f"FROM {base}\nRUN date +%N > /now\n")
    first, second = (person.berth("build", str(context), timeout_s=300) for _ in range(2))
    layers = [
        [layer["digest"] for layer in json.loads(person.berth("image", "inspect", name))["manifest"]["layers"]]
        for name in (base, first.strip(), second.strip())
    ]
    assert layers[1][:1] == layers[0]
    assert layers[1] == layers[2]
    third = person.berth("build", "--no-cache", str(context), timeout_s=300)
    assert (
        json.loads(person.berth("image", "inspect", third.strip()))["manifest"]["layers"][1]["digest"] not in layers[1]
    )


def test_secrets_are_shown_and_not_kept(person: Person, base: str, context: Path, scratch: Path) -> None:
    of_file, of_word = (f"s3cret of {word} {os.getpid()}" for word in ("file", "word"))
    write(
        person, context, token=of_file, **{".dockerignore": "token\n"},
        Dockerfile=f"""
            FROM {base}
            RUN --mount=type=secret,id=file sha256sum < /run/secrets/file | grep {digest_of(of_file.encode())[7:]}
            RUN --mount=type=secret,id=word sha256sum < /run/secrets/word | grep {digest_of(of_word.encode())[7:]}
            COPY . /context
            RUN ! test -s /run/secrets/file
        """,
    )  # fmt: skip
    person.berth(
        "build", "-t", "local/secret:1", "--secret", f"id=file,src={context}/token", "--secret", "id=word,env=WORD",
        str(context), env={"WORD": of_word}, timeout_s=300,
    )  # fmt: skip
    data = saved(person, "local/secret:1", scratch).read_bytes()  # its layers are not compressed
    assert b"grep" in data
    assert not [secret for secret in (of_file, of_word) if secret.encode() in data]


def test_a_failed_step_is_told_with_its_output(person: Person, base: str, context: Path) -> None:
    write(person, context, Dockerfile=f"FROM {base}\nRUN echo about to fail >&2; exit 7\n")
    done = person.try_berth("build", "-t", "local/failed:1", str(context), timeout_s=300)
    assert done.status == 1
    assert done.stdout == b""
    assert b"about to fail" in done.stderr
    assert b"berth: the build failed" in done.stderr
    assert "local/failed" not in person.berth("image", "ls")


def test_an_interrupt_ends_everything(person: Person, base: str, context: Path) -> None:
    mark = f"{os.getpid()}.25"  # of a sleep that nobody else sleeps
    write(person, context, Dockerfile=f"FROM {base}\nRUN sleep {mark}\n")
    null = subprocess.DEVNULL
    with person.popen("build", str(context), stdout=null, stderr=null) as process:
        deadline = time.monotonic() + 60
        while not sleeping(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert sleeping(mark)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    for _ in range(100):
        if not sleeping(mark):
            break
        time.sleep(0.05)
    assert not sleeping(mark)
    write(person, context, Dockerfile=f"FROM {base}\nRUN true\n")
    person.berth("build", str(context), timeout_s=300)
    assert not list(person.layout.build.glob("work-*"))


def sleeping(mark: str) -> list[str]:
    """Find the processes that sleep for `mark` seconds."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:2] == [b"sleep", mark.encode()]:
            found.append(path.parent.name)
    return found


def test_a_build_has_no_rights_on_the_host(person: Person, base: str, context: Path) -> None:
    outside = context.parent / f"outside-{os.getpid()}"
    write(
        person, context,
        Dockerfile=f"""
            FROM {base}
            RUN test "$(head -c 5 /proc/1/comm)" = build
            RUN ! mount -t tmpfs none /mnt
            RUN ! mknod /node b 8 0 || ! cat /node
            RUN ! ls {outside} && ! cat /proc/sys/kernel/core_pattern > /proc/sys/kernel/core_pattern
        """,
    )  # fmt: skip
    person.berth("build", str(context), timeout_s=300)


@pytest.mark.mirror
def test_the_well_known_machine_builds_and_boots(person: Person, debian_tar: Path, context: Path) -> None:
    need("buildah")
    person.berth("image", "import", str(debian_tar), "local/debian:12")
    write(person, context, Dockerfile=MACHINE)
    person.berth("build", "-t", "local/debian-machine:latest", str(context), timeout_s=900)
    person.berth("create", "local/debian-machine:latest", "--name", "built", timeout_s=180)
    try:
        person.berth("wait", "built", "--for", "init", "--timeout", "120")
        assert person.run("built", "systemctl", "is-system-running").strip() == "running"
        assert person.run("built", "systemctl", "get-default").strip() == "multi-user.target"
        for program in ("sshd", "ifconfig", "ip", "ping", "curl", "wget", "man", "sudo"):
            assert person.run("built", "sh", "-c", f"PATH=$PATH:/usr/sbin:/sbin command -v {program}")
    finally:
        person.berth("rm", "-f", "built")
