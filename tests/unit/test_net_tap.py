"""TAPs and passt: what is told to whom, what is noted down. That it works is for tests/integration/test_net_tap.py."""

from __future__ import annotations

import array
import json
import os
import socket
from pathlib import Path

import pytest

from berth.errors import BerthError, CommandError, UnsupportedError
from berth.layout import Layout
from berth.names import MachineName
from berth.net import passt, plan, record, tap
from berth.net.addresses import plan_address
from berth.net.network import Network, publish
from berth.net.subnet import Subnet

ADDRESS = plan_address("10.209.1.7", Subnet.parse("10.209.0.0/22"), 0)
NETWORK = Network("berth0", "10.209.0.1", None, "", ())


def test_the_tap_hangs_on_the_bridge() -> None:
    assert plan.tap_batch("berth0", ADDRESS) == f"link set dev {ADDRESS.interface} master berth0 up\n"
    assert len(ADDRESS.interface) < 16  # IFNAMSIZ, with its zero


@pytest.mark.parametrize(
    ("error", "said"),
    [(FileNotFoundError(2, ""), "is not there"), (PermissionError(13, "Permission denied"), "can't be opened")],
)
def test_no_tun_is_told_apart(monkeypatch: pytest.MonkeyPatch, error: OSError, said: str) -> None:
    def refuse(*_arguments: object) -> int:
        raise error

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UnsupportedError, match=f"/dev/net/tun {said}"):
        tap.open_tap(NETWORK, ADDRESS)


def test_the_descriptor_comes_over_the_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open("/dev/null", "rb") as null:
        theirs.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()]))])
        fd = tap._receive(ours)
        assert os.path.sameopenfile(fd, null.fileno())
        assert not os.get_inheritable(fd)
        os.close(fd)
        theirs.sendmsg([b"."])
        with pytest.raises(BerthError, match="no TAP"):
            tap._receive(ours)


def test_a_vm_is_noted_down_as_one(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data", tmp_path / "run", tmp_path / "config", tmp_path / "cache")
    record.save_attached(layout, MachineName("vm"), ADDRESS, os.getpid(), tap=True)
    record.save_attached(layout, MachineName("container"), ADDRESS, os.getpid())
    assert {machine.name: machine.tap for machine in record.running_machines(layout)} == {
        "container": False, "vm": True,
    }  # fmt: skip
    path = layout.hub_machines / "container.json"
    document = json.loads(path.read_text())
    del document["tap"]  # as an older berth wrote it
    path.write_text(json.dumps(document))
    assert [machine.tap for machine in record.running_machines(layout)] == [False, True]
    assert publish.__kwdefaults__ == {"tap": False}


# passt ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward_dns", "pid_file", "dns", "pid"),
    [(True, Path("/r/pid"), ["--dns-forward", "169.254.1.1"], ["--pid", "/r/pid"]), (False, None, [], [])],
)
def test_passt_lets_nothing_of_the_host_in(
    forward_dns: bool, pid_file: Path | None, dns: list[str], pid: list[str]
) -> None:
    assert plan.passt_command(ADDRESS, fd=5, pid_file=pid_file, forward_dns=forward_dns) == [
        "passt", "--quiet", "--fd", "5", *pid, "--ipv4-only",
        "--address", "10.209.1.7", "--netmask", "255.255.252.0", "--gateway", "10.209.0.1",
        "--mac-addr", "02:be:0a:d1:00:01", "--no-map-gw", *dns,
        "--no-dhcp", "--no-ndp", "--no-dhcpv6", "--no-ra", "--tcp-ports", "none", "--udp-ports", "none",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("version", "drops"),
    [
        ("passt unknown version\n", False),
        ("passt 0.0~git20230309.7c7625d-1\n", False),
        ("passt 0.0~git20250503.587980c-2\n", True),
        ("passt 2026_01_20.abcdef\n", True),
        ("passt 2024_12_11.09478d5\n", False),  # perhaps: not tried
        ("", False),
    ],
)
def test_which_passt_keeps_guests_from_the_loopback(version: str, drops: bool) -> None:
    assert passt.drops_loopback(version) is drops


def test_resolver_of_qemus_network_is_no_machine() -> None:
    subnet = Subnet.parse("10.209.0.0/22")
    assert passt.resolver_address(ADDRESS) == "10.209.0.255"
    assert "10.209.0.255" not in set(subnet.machines())
    assert subnet.contains("10.209.0.255")


def test_without_passt_it_is_qemu_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "find_program", lambda _name: None)
    uplink = passt.open_uplink(ADDRESS, tmp_path, "no TAP")
    assert (uplink.socket, uplink.process, uplink.dns) == (None, None, "10.209.0.255")
    assert uplink.resolv_conf.endswith("nameserver 10.209.0.255\n")
    assert uplink.notes[0].startswith("no TAP, and passt is not installed (sudo apt-get install passt): ")
    assert "loopback" in uplink.notes[1]


def test_passt_that_does_not_start_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str], **_options: object) -> None:
        raise CommandError(tuple(argv), 1, "no")

    monkeypatch.setattr(passt, "find_program", Path)
    monkeypatch.setattr(passt, "run", fail)
    uplink = passt.open_uplink(ADDRESS, tmp_path, "no TAP")
    assert uplink.socket is None
    assert "no TAP, and passt failed with status 1: no" in uplink.notes[0]
