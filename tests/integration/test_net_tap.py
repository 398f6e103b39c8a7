"""TAPs of VMs on the bridge, for root and for an ordinary user. The guest is this file: it speaks Ethernet."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from berth import syscalls
from berth.layout import Layout
from berth.net.processes import find_programs, network_namespace
from networld import World, kill, make_world, until
from ordinary import Ordinary

pytestmark = [pytest.mark.root, pytest.mark.net]
_EVERYBODY = b"\xff" * 6
_HEADER = bytes(10)  # of virtio-net: nothing to be computed, nothing left to do


@pytest.fixture(params=["root", "user"])
def world(request: pytest.FixtureRequest, scratch: Path, layout: Layout, ordinary_user: Ordinary) -> Generator[World]:
    """A host in which root, or an ordinary user, runs berth."""
    user = ordinary_user if request.param == "user" else None
    with make_world(scratch, _owned(scratch, user) if user else layout, user) as world:
        yield world


def _owned(scratch: Path, user: Ordinary) -> Layout:
    folder = scratch / "user"
    folder.mkdir(mode=0o700)
    os.chown(folder, user.uid, user.gid)
    return Layout(folder / "data", folder / "run", folder / "config", folder / "cache")


@contextlib.contextmanager
def guest(pid: int, fd: int) -> Generator[int]:
    """Borrow the TAP from the process that plays QEMU."""
    pidfd = os.pidfd_open(pid)
    try:
        tap = syscalls.pidfd_getfd(pidfd, fd)
    finally:
        os.close(pidfd)
    try:
        yield tap
    finally:
        os.close(tap)


def asks(tap: int, mac: str, ip: str, target: str, *, timeout_s: float = 3.0) -> str | None:
    """Ask by ARP, as (mac, ip), who has `target`; return the MAC that answers. Source: RFC 826."""
    own = bytes.fromhex(mac.replace(":", ""))
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + own + socket.inet_aton(ip) + bytes(6) + socket.inet_aton(target)
    os.write(tap, _HEADER + _EVERYBODY + own + b"\x08\x06" + body)
    deadline = time.monotonic() + timeout_s
    while select.select([tap], [], [], max(0.0, deadline - time.monotonic()))[0]:
        frame = os.read(tap, 65536)[len(_HEADER) :]
        is_answer = frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2"
        if is_answer and frame[28:32] == socket.inet_aton(target):
            return frame[22:28].hex(":")
    return None


def test_vm_reaches_the_gateway_and_a_container(world: World) -> None:
    network = world.ensure()
    one, pid, fd = world.vm("one")
    two, two_pid = world.machine("two")
    with guest(pid, fd) as tap:
        assert asks(tap, one.mac, one.ip, network.gateway) is not None
        assert asks(tap, one.mac, one.ip, two.ip) == two.mac
    assert world.resolve(two_pid, network.gateway, "one.berth") == one.ip


def test_vm_can_use_no_address_but_its_own(world: World) -> None:
    network = world.ensure()
    one, pid, fd = world.vm("one")
    two, other_pid, _fd = world.vm("two")
    with guest(pid, fd) as tap:
        assert asks(tap, one.mac, two.ip, network.gateway, timeout_s=1) is None
        assert asks(tap, two.mac, one.ip, network.gateway, timeout_s=1) is None
        assert asks(tap, two.mac, two.ip, network.gateway, timeout_s=1) is None
        assert asks(tap, one.mac, one.ip, network.gateway) is not None
    world.stop("two", other_pid)


def test_tap_goes_with_its_vm_and_comes_again(world: World) -> None:
    one, pid, _fd = world.vm("one")
    assert one.interface in ports(world)
    world.stop("one", pid)
    until(lambda: one.interface not in ports(world))
    again, pid, fd = world.vm("one")
    assert again == one
    with guest(pid, fd) as tap:
        assert asks(tap, one.mac, one.ip, one.gateway) is not None


def test_what_a_predecessor_left_is_removed(world: World) -> None:
    one, _pid, _fd = world.vm("one")
    _again, pid, fd = world.vm("one")  # the first one's process lives still
    with guest(pid, fd) as tap:
        assert asks(tap, one.mac, one.ip, one.gateway) is not None
    assert ports(world).count(one.interface) == 1


def test_lost_bridge_gets_its_vms_again(world: World) -> None:
    network = world.ensure()
    one, pid, fd = world.vm("one")
    holder = world.record.holder
    delete = ["ip", "link", "delete", "dev", network.bridge]
    if holder is None:
        world.run(*delete)
    else:
        world.inside(holder.pid, *delete)
        world.layout.hub_record.unlink()  # an ordinary user's bridge is looked for only then
    world.ensure()
    with guest(pid, fd) as tap:
        assert asks(tap, one.mac, one.ip, one.gateway) is not None


def test_killed_hub_is_found_again_by_a_vm(scratch: Path, ordinary_user: Ordinary) -> None:
    with make_world(scratch, _owned(scratch, ordinary_user), ordinary_user) as world:
        network = world.ensure()
        one, pid, fd = world.vm("one")
        two, _two_pid = world.machine("two")
        namespace = network_namespace(network.holder_pid)
        found = world.record
        for process in (found.holder, found.dnsmasq, found.pasta):
            kill(process)
        again = world.ensure()
        assert network_namespace(again.holder_pid) == namespace  # with the bridge and every cable in it
        with guest(pid, fd) as tap:
            assert asks(tap, one.mac, one.ip, one.gateway) is not None
            assert asks(tap, one.mac, one.ip, two.ip) == two.mac


def test_no_tun_is_told_apart(scratch: Path, ordinary_user: Ordinary) -> None:
    with make_world(scratch, _owned(scratch, ordinary_user), ordinary_user, tun=False) as world:
        with pytest.raises(RuntimeError, match="/dev/net/tun can't be opened: Permission denied"):
            world.do("start_vm", name="one")
        assert ports(world) == []


def test_passt_answers_a_vm_that_has_no_tap_and_ends_with_it(scratch: Path, ordinary_user: Ordinary) -> None:
    layout = _owned(scratch, ordinary_user)
    with make_world(scratch, layout, ordinary_user, tun=False) as world:
        one, pid, fd = world.vm("one", alone=True)
        pid_file = str(layout.runtime / "passt.pid")  # it has gone; passt was told it, and is known by that
        with guest(pid, fd) as stream:
            # As QEMU does: each frame after its length, in four bytes.
            own = bytes.fromhex(one.mac.replace(":", ""))
            ask = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + own + socket.inet_aton(one.ip) + bytes(6)
            frame = _EVERYBODY + own + b"\x08\x06" + ask + socket.inet_aton(one.gateway)
            os.write(stream, struct.pack("!I", len(frame)) + frame)
            (size,) = struct.unpack("!I", _read(stream, 4))
            assert socket.inet_aton(one.gateway) in _read(stream, size)
            assert len(find_programs("passt", pid_file)) == 1
            os.kill(pid, signal.SIGKILL)
        until(lambda: find_programs("passt", pid_file) == [])
        assert not Path(pid_file).exists()


def _read(stream: int, size: int) -> bytes:
    """Read so many bytes, which may come in parts."""
    data = b""
    while len(data) < size:
        assert select.select([stream], [], [], 5)[0]
        data += os.read(stream, size - len(data))
    return data


def ports(world: World) -> list[str]:
    """List what hangs on the bridge."""
    holder = world.record.holder
    argv = ["ip", "-br", "link", "show", "master", world.ensure().bridge]
    said = world.run(*argv) if holder is None else world.inside(holder.pid, *argv)
    return [line.split()[0].partition("@")[0] for line in said.splitlines()]
