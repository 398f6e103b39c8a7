"""Folders of the host in VMs: what is shared and covered, how virtiofsd is found and started."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from berth.bundle import Bundle
from berth.config import BootConfig, HostUser, MachineConfig, Mount
from berth.engine.base import Machine
from berth.engine.qemu import shares, virtiofsd
from berth.engine.qemu.shares import Cover, ShareSpec, plan_shares, start_shares
from berth.engine.qemu.virtiofsd import Virtiofsd, find_virtiofsd, parse_virtiofsd, require_virtiofsd, virtiofsd_command
from berth.engine.running import Process
from berth.errors import BerthError, UnsupportedError
from berth.layout import Layout
from berth.names import MachineName
from berth.net.addresses import plan_address
from berth.net.subnet import Subnet

_C_USAGE = """usage: /usr/lib/qemu/virtiofsd [options]
    -o source=PATH             shared directory tree
    --fd=FDNUM                 fd number of vhost-user socket
    --rlimit-nofile=<num>      set maximum number of file descriptors
"""
_RUST_USAGE = """Launch a virtiofsd backend.
Usage: virtiofsd [OPTIONS] --shared-dir <SHARED_DIR>
      --shared-dir <SHARED_DIR>  Shared directory path
      --readonly                 Do not permit any write operations
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home/ann"
    home.mkdir(parents=True)
    return home


def _machine(tmp_path: Path, boot: BootConfig) -> Machine:
    layout = Layout(tmp_path / "data", tmp_path / "run", tmp_path / "config", tmp_path / "cache")
    user = HostUser("ann", 1000, 1000, "ann", str(tmp_path / "home/ann"), "/bin/bash")
    config = MachineConfig(
        MachineName("dev"), "0123456789abcdef" * 2, "docker.io/library/debian:12", "sha256:" + "ab" * 32, "linux/amd64",
        "vm", "2026-11-22T14:16:00Z", user,
    )  # fmt: skip
    address = plan_address("10.209.0.2", Subnet.parse("10.209.0.0/22"), 1000)
    return Machine(Bundle(layout, config.name), config, boot, address)


def test_home_first_then_mounts_outer_before_inner(tmp_path: Path, home: Path) -> None:
    boot = BootConfig(
        home_mount="ro",
        mounts=(Mount("/usr/share", "/srv/b/c"), Mount("/etc", "/srv/b", read_only=True), Mount("/etc/hosts", "/a/h")),
    )
    found = plan_shares(_machine(tmp_path, boot))
    assert [(spec.tag, spec.source, spec.target, spec.read_only, spec.file) for spec in found] == [
        ("share0", str(home), str(home), True, None),
        ("share1", "/etc/hosts", "/a/h", False, "h"),
        ("share2", "/etc", "/srv/b", True, None),
        ("share3", "/usr/share", "/srv/b/c", False, None),
    ]
    assert found[1].to_document() == {
        "tag": "share1", "target": "/a/h", "type": "virtiofs", "readOnly": False, "file": "h",
    }  # fmt: skip


def test_nothing_is_shared_of_a_home_that_is_not_mounted(tmp_path: Path, home: Path) -> None:
    (home / ".ssh").mkdir()
    assert plan_shares(_machine(tmp_path, BootConfig(home_mount="none"))) == ()


def test_credentials_are_covered_where_they_really_lie(tmp_path: Path, home: Path) -> None:
    (home / "keys").mkdir()
    (home / ".ssh").symlink_to("keys")
    (home / ".netrc").touch()
    (home / ".config/gh").mkdir(parents=True)
    machine = _machine(tmp_path, BootConfig(expose=(".config/gh",)))
    private = machine.bundle.vm_private
    assert plan_shares(machine)[0].covers == (
        Cover(".netrc", str(private / ".netrc"), directory=False, read_only=True),
        Cover("keys", str(private / ".ssh"), directory=True, read_only=False),
    )


def test_every_share_is_covered_for_itself(tmp_path: Path, home: Path) -> None:
    """The guest's root can unmount the inner folder in the guest: what it sees then must be covered as well."""
    (home / "work").mkdir()
    (tmp_path / "data/machines").mkdir(parents=True)
    boot = BootConfig(mounts=(Mount(str(tmp_path), str(home / "work"), read_only=True),))
    machine = _machine(tmp_path, boot)
    (home / ".aws").mkdir()
    outer, inner = plan_shares(machine)
    private = machine.bundle.vm_private
    aws = Cover(".aws", str(private / ".aws"), directory=True, read_only=False)
    assert [cover.path for cover in inner.covers] == ["data", "home/ann/.aws"]
    assert outer.covers[:2] == (Cover("work", str(tmp_path), directory=True, read_only=True), aws)
    assert [cover.path for cover in outer.covers[2:]] == ["work/data", "work/home/ann/.aws"]


def test_inner_mount_whose_place_is_not_there_needs_nothing(tmp_path: Path, home: Path) -> None:
    (home / "file").touch()
    (home / "out").symlink_to("/usr")
    boot = BootConfig(
        mounts=(Mount("/etc", f"{home}/new"), Mount("/etc", f"{home}/file"), Mount("/etc", f"{home}/out"))
    )
    assert plan_shares(_machine(tmp_path, boot))[0].covers == ()


def test_plan_for_the_namespace() -> None:
    spec = ShareSpec("share0", "/a", "/b", True, "b", (Cover("c", "/d", True, False),))
    assert spec.to_plan() == {
        "source": "/a", "file": "b", "read_only": True,
        "covers": [{"path": "c", "source": "/d", "directory": True, "read_only": False}],
    }  # fmt: skip


# virtiofsd ------------------------------------------------------------------------------------------------------------


def test_the_two_kinds_are_told_apart() -> None:
    old = parse_virtiofsd(Path("/c"), "virtiofsd version 7.2.22 (Debian 1:7.2)\n", _C_USAGE)
    assert (old.kind, old.version) == ("c", "7.2.22")
    new = parse_virtiofsd(Path("/r"), "virtiofsd 1.13.2\n", _RUST_USAGE)
    assert (new.kind, new.version) == ("rust", "1.13.2")
    assert "--readonly" in new.options
    assert parse_virtiofsd(Path("/c"), "setgroups() failed with error=1:Operation not permitted\n", "").version == ""


def test_command_of_the_c_kind() -> None:
    argv = virtiofsd_command(Virtiofsd(Path("/v"), "c", "7.2"), shared="/share", listener=7, read_only=True)
    modes = (
        "sandbox=chroot,cache=auto,timeout=0,announce_submounts,no_writeback,no_posix_lock,no_flock,no_xattr,"
        "modcaps=-mknod:-setfcap,log_level=err"
    )
    assert argv == ["/v", "-f", "--fd=7", "-o", "source=/share", "-o", modes, "--rlimit-nofile=0"]


@pytest.mark.parametrize(
    ("options", "read_only", "words"),
    [({"--readonly"}, True, ["--readonly"]), ({"--readonly"}, False, []), (set[str](), True, [])],
)
def test_command_of_the_rust_kind(options: set[str], read_only: bool, words: list[str]) -> None:
    daemon = Virtiofsd(Path("/v"), "rust", "1.13.2", frozenset(options))
    assert virtiofsd_command(daemon, shared="/share", listener=7, read_only=read_only) == [
        "/v", "--fd=7", "--shared-dir=/share", "--sandbox=chroot", "--cache=auto", "--announce-submounts",
        "--inode-file-handles=never", "--modcaps=-mknod:-setfcap", "--log-level=error", "--rlimit-nofile=0", *words,
    ]  # fmt: skip


def test_virtiofsd_is_found_where_it_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\necho virtiofsd 1.10.0\necho --shared-dir\n")
    program.chmod(0o755)
    monkeypatch.setattr(virtiofsd, "find_program", lambda _name: None)
    monkeypatch.setattr(virtiofsd, "PLACES", (str(tmp_path / "absent"), str(tmp_path), str(program)))
    assert find_virtiofsd() == Virtiofsd(program, "rust", "1.10.0", frozenset({"--shared-dir"}))


def test_no_virtiofsd_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtiofsd, "find_program", lambda _name: None)
    monkeypatch.setattr(virtiofsd, "PLACES", ())
    assert find_virtiofsd() is None
    with pytest.raises(UnsupportedError, match="virtiofsd is not installed") as caught:
        require_virtiofsd()
    assert caught.value.hint is not None
    assert "berth system check" in caught.value.hint


def test_a_vm_without_shares_needs_no_virtiofsd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtiofsd, "PLACES", ())
    assert start_shares((), tmp_path, tmp_path / "private") == []
    assert not (tmp_path / "private").exists()


# The socket -----------------------------------------------------------------------------------------------------------


def test_socket_has_no_name_and_one_connection(tmp_path: Path) -> None:
    listener, connection = shares._connected_pair(tmp_path / "share0.sock")
    assert os.listdir(tmp_path) == []
    with listener, connection, listener.accept()[0] as accepted:
        connection.sendall(b"x")
        assert accepted.recv(1) == b"x"


def test_what_a_server_says_is_bounded() -> None:
    log = shares._bounded_file(64)
    with open(log, "r+b", buffering=0) as file:
        file.write(b"first\n\x1b[31mvirtio: no such folder\n")
        assert shares._said(log) == "[31mvirtio: no such folder"
        file.seek(64)
        with pytest.raises(PermissionError):
            file.write(b"y")
        with pytest.raises(PermissionError):
            file.truncate(128)
        assert os.fstat(log).st_size == 64
        assert fcntl.fcntl(log, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def _converse(answer: Callable[[socket.socket], None]) -> BerthError | None:
    """Let `answer` play the server, which is nobody's process; return the error that came of it."""
    ours, theirs = socket.socketpair()
    log = shares._bounded_file(4096)
    os.pwrite(log, b"it has its reasons\n", 0)
    thread = threading.Thread(target=answer, args=(theirs,))
    thread.start()
    try:
        shares._await_answer(ours, ShareSpec("share0", "/folder", "/f", False), Process(2**22 + 1, 1), log)
        assert ours.gettimeout() is None
        return None
    except BerthError as error:
        return error
    finally:
        thread.join()
        ours.close()
        theirs.close()
        os.close(log)


def test_answer_may_come_in_parts() -> None:
    def answer(sock: socket.socket) -> None:
        assert sock.recv(12) == struct.pack("=III", 1, 1, 0)
        sock.sendall(struct.pack("=III", 1, 5, 8))
        sock.sendall(struct.pack("=Q", 0x1_7500_0000))

    assert _converse(answer) is None


@pytest.mark.parametrize("sent", [b"", b"\1\0\0\0\5"])
def test_server_that_hangs_up_is_quoted(sent: bytes) -> None:
    def answer(sock: socket.socket) -> None:
        sock.recv(12)
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_RDWR)

    error = _converse(answer)
    assert error is not None
    assert error.message == "/folder can't be shared with the machine: it has its reasons"
