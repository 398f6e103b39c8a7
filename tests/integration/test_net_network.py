"""The network of machines, for root and for an ordinary user, on a host of the tests' own (tests/networld.py)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Generator
from pathlib import Path

import pytest

from berth import proc
from berth.layout import Layout
from berth.net import hub
from berth.net.processes import network_namespace
from networld import ANSWER, OUTSIDE, OUTSIDE_PORT, WAN, World, kill, make_world, serve_dns, serve_tcp, socket_in, until
from ordinary import Ordinary

pytestmark = [pytest.mark.root, pytest.mark.net]
_PORT = 9000


@pytest.fixture
def root_world(scratch: Path, layout: Layout) -> Generator[World]:
    """A world in which root runs berth."""
    with make_world(scratch, layout, None) as world:
        yield world


@pytest.fixture
def user_layout(scratch: Path, ordinary_user: Ordinary) -> Layout:
    """Berth's roots below a folder of the user's own."""
    folder = scratch / "user"
    folder.mkdir(mode=0o700)
    os.chown(folder, ordinary_user.uid, ordinary_user.gid)
    return Layout(folder / "data", folder / "run", folder / "config", folder / "cache")


@pytest.fixture
def user_world(scratch: Path, user_layout: Layout, ordinary_user: Ordinary) -> Generator[World]:
    """A world in which an ordinary user runs berth."""
    with make_world(scratch, user_layout, ordinary_user) as world:
        yield world


@pytest.fixture(params=["root", "user"])
def world(request: pytest.FixtureRequest) -> World:
    """Both, one after the other."""
    found = request.getfixturevalue(f"{request.param}_world")
    assert isinstance(found, World)
    return found


def test_machines_reach_each_other_the_outside_and_names(world: World) -> None:
    network = world.ensure()
    assert network.notes == ()
    assert network.resolv_conf == f"search berth example.org\nnameserver {network.gateway}\n"
    one, one_pid = world.machine("one")
    two, two_pid = world.machine("two")
    with serve_tcp(two_pid, "", _PORT):
        assert world.reach(one_pid, two.ip, _PORT) == one.ip
    with serve_tcp(one_pid, "", _PORT):
        assert world.reach(two_pid, one.ip, _PORT) == two.ip
    # The outside has no route back: it must be the host that seems to call.
    assert world.reach(one_pid, OUTSIDE, OUTSIDE_PORT) == WAN
    for name, expected in (("two", two.ip), ("two.berth", two.ip), ("one", one.ip), ("www.example.org", ANSWER)):
        assert world.resolve(one_pid, network.gateway, name) == expected
    for name in ("three", "three.berth"):
        assert world.resolve(one_pid, network.gateway, name) is None


def test_much_goes_out_and_comes_in(world: World) -> None:
    _one, one_pid = world.machine("one")
    two, two_pid = world.machine("two")
    size = 1024 * 1024  # more may make the pasta of Debian 12 stall (docs/network.md, "Known limits")
    assert world.exchange(one_pid, OUTSIDE, OUTSIDE_PORT, size) == size
    with serve_tcp(two_pid, "", _PORT):
        assert world.exchange(one_pid, two.ip, _PORT, 8 * size) == 8 * size


def test_machine_has_its_own_mac_and_address(world: World) -> None:
    address, pid = world.machine("one")
    shown = world.inside(pid, "ip", "address", "show", "dev", "eth0")
    assert address.mac in shown
    assert f"inet {address.ip}/22" in shown
    assert "LOWER_UP" in world.inside(pid, "ip", "link", "show", "dev", "lo")


def test_name_goes_with_the_machine(world: World) -> None:
    gateway = world.ensure().gateway
    _one, one_pid = world.machine("one")
    two, two_pid = world.machine("two")
    assert world.resolve(one_pid, gateway, "two.berth") == two.ip
    world.stop("two", two_pid)
    until(lambda: world.resolve(one_pid, gateway, "two.berth") is None)


def test_address_of_another_cannot_be_used(world: World) -> None:
    one, one_pid = world.machine("one")
    two, two_pid = world.machine("two")
    _three, three_pid = world.machine("three")
    with serve_tcp(three_pid, "", _PORT):
        three = _three.ip
        # Two leaves; one's root takes the address, even the MAC.
        world.inside(two_pid, "ip", "link", "set", "eth0", "down")
        world.inside(one_pid, "ip", "address", "add", f"{two.ip}/22", "dev", "eth0")
        assert world.reach(one_pid, three, _PORT, bind=two.ip, timeout_s=1.5) is None
        assert world.reach(one_pid, three, _PORT, bind=one.ip) == one.ip
        world.inside(one_pid, "ip", "link", "set", "eth0", "address", two.mac)
        assert world.reach(one_pid, three, _PORT, bind=one.ip, timeout_s=1.5) is None


def test_attach_again_after_a_restart(world: World) -> None:
    address, pid = world.machine("one")
    world.stop("one", pid)
    again, again_pid = world.machine("one")
    assert again == address
    assert world.reach(again_pid, OUTSIDE, OUTSIDE_PORT) == WAN


def test_failed_attach_leaves_nothing(world: World) -> None:
    network = world.ensure()
    with pytest.raises(RuntimeError, match=r"ip |nsenter "):
        world.do("start", name="ghost", pid=2**22 - 1)
    ports = _ports(world, network.bridge)
    assert ports == []


def test_twenty_at_once_make_one_network(world: World) -> None:
    networks = world.ensure_many(20)
    assert len(set(networks)) == 1
    assert networks[0].notes == ()
    found = world.record
    marks = _command_lines(str(world.layout.runtime))
    assert len([line for line in marks if line.startswith("dnsmasq ")]) == 1
    assert len([line for line in marks if line.startswith("pasta ")]) == (0 if world.user is None else 1)
    assert found.dnsmasq is not None
    assert found.dnsmasq.alive()


def test_teardown_leaves_nothing(world: World) -> None:
    network = world.ensure()
    holder_namespace = network_namespace(network.holder_pid) if network.holder_pid else None
    _address, pid = world.machine("one")
    with pytest.raises(RuntimeError, match="machine 'one' is running"):
        world.do("teardown")
    world.stop("one", pid)
    world.do("teardown")
    assert _command_lines(str(world.layout.runtime)) == []
    if holder_namespace is not None:
        assert hub.members(holder_namespace) == []
    links = world.run("ip", "-br", "link")
    assert [line.split("@")[0].split()[0] for line in links.splitlines()] == ["lo", "wan0"]
    assert world.run("nft", "list", "tables") == ""
    assert not world.layout.hub.exists()
    assert not world.layout.hub_lock.exists()
    assert not world.layout.runtime.with_name("run-hosts").exists()
    world.do("teardown")  # once more is fine


def test_teardown_then_ensure_gives_the_same_addresses(world: World) -> None:
    address, pid = world.machine("one")
    world.stop("one", pid)
    world.do("teardown")
    again, _pid = world.machine("one")
    assert again == address


def test_lost_record_is_found_again(world: World) -> None:
    _address, pid = world.machine("one")
    before = world.record
    world.layout.hub_record.unlink()
    world.ensure()
    after = world.record
    assert after.holder == before.holder
    assert len([line for line in _command_lines(str(world.layout.runtime)) if line.startswith("dnsmasq ")]) == 1
    assert world.reach(pid, OUTSIDE, OUTSIDE_PORT) == WAN


def test_garbage_in_the_record_is_no_obstacle(world: World) -> None:
    world.ensure()
    world.layout.hub_record.write_text('{"schema": 1, "holder": "me"')
    assert world.ensure().notes == ()


def test_killed_dnsmasq_comes_back(world: World) -> None:
    gateway = world.ensure().gateway
    one, pid = world.machine("one")
    kill(world.record.dnsmasq)
    assert world.ensure().notes == ()
    assert world.resolve(pid, gateway, "one") == one.ip


# Root -----------------------------------------------------------------------------------------------------------------


def test_root_host_reaches_machines(root_world: World) -> None:
    network = root_world.ensure()
    one, pid = root_world.machine("one")
    with serve_tcp(pid, "", _PORT):
        assert root_world.reach(root_world.host, one.ip, _PORT) == network.gateway
    # And the other way round: as with docker, what listens on the host's every address can be reached.
    with serve_tcp(root_world.host, "", _PORT):
        assert root_world.reach(pid, network.gateway, _PORT) == one.ip


def test_root_strangers_cannot_come_in(root_world: World) -> None:
    one, pid = root_world.machine("one")
    root_world.ensure()
    _route(root_world.outside, f"{one.ip}/32")
    with serve_tcp(pid, "", _PORT):
        assert root_world.reach(root_world.outside, one.ip, _PORT, timeout_s=1) is None


def test_root_dnsmasq_is_not_root(root_world: World) -> None:
    root_world.ensure()
    process = root_world.record.dnsmasq
    assert process is not None
    assert os.stat(f"/proc/{process.pid}").st_uid != 0


def test_root_lost_bridge_is_made_again(root_world: World) -> None:
    network = root_world.ensure()
    one, one_pid = root_world.machine("one")
    two, two_pid = root_world.machine("two")
    root_world.run("ip", "link", "delete", "dev", network.bridge)
    assert root_world.ensure() == network
    with serve_tcp(two_pid, "", _PORT):
        assert root_world.reach(one_pid, two.ip, _PORT) == one.ip
    assert root_world.resolve(one_pid, network.gateway, "two") == two.ip


def test_root_flushed_rules_and_routing_come_back(root_world: World) -> None:
    _one, pid = root_world.machine("one")
    root_world.run("nft", "flush", "ruleset")
    root_world.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    assert root_world.reach(pid, OUTSIDE, OUTSIDE_PORT, timeout_s=1) is None
    root_world.ensure()
    assert root_world.reach(pid, OUTSIDE, OUTSIDE_PORT) == WAN


def test_root_with_docker_in_the_way(root_world: World) -> None:
    iptables = "iptables-nft" if proc.find_program("iptables-nft") else None
    if iptables is None:
        pytest.skip("needs iptables-nft")
    root_world.run(iptables, "-P", "FORWARD", "DROP")
    network = root_world.ensure()
    assert [note for note in network.notes if "firewall drops" in note]
    _one, pid = root_world.machine("one")
    assert root_world.reach(pid, OUTSIDE, OUTSIDE_PORT, timeout_s=1) is None
    root_world.run(iptables, "-N", "DOCKER-USER")
    root_world.run(iptables, "-I", "FORWARD", "-j", "DOCKER-USER")
    root_world.run("ip", "link", "add", "docker0", "type", "bridge")
    assert root_world.ensure().notes == ()
    assert root_world.reach(pid, OUTSIDE, OUTSIDE_PORT) == WAN
    root_world.stop("one", pid)
    root_world.do("teardown")
    assert network.bridge not in root_world.run(iptables, "-S")
    root_world.run("ip", "link", "delete", "docker0")


def test_root_ensure_is_quick_when_all_is_there(root_world: World) -> None:
    # 4 ms on an idle machine; the promise is 10.
    median = root_world.do("speed")
    assert isinstance(median, float)
    assert median < 0.05


# An ordinary user ---------------------------------------------------------------------------------------------------


def test_user_killed_holder_and_pasta_come_back(user_world: World) -> None:
    network = user_world.ensure()
    _one, pid = user_world.machine("one")
    namespace = network_namespace(network.holder_pid)
    kill(user_world.record.holder)
    again = user_world.ensure()
    assert again.holder_pid != network.holder_pid
    assert network_namespace(again.holder_pid) == namespace  # the same hub, bridge and cables and all
    assert user_world.reach(pid, OUTSIDE, OUTSIDE_PORT) == WAN
    kill(user_world.record.pasta)
    assert user_world.reach(pid, OUTSIDE, OUTSIDE_PORT, timeout_s=1) is None
    user_world.ensure()
    assert user_world.reach(pid, OUTSIDE, OUTSIDE_PORT) == WAN


def test_user_everything_killed_machines_are_connected_again(user_world: World) -> None:
    gateway = user_world.ensure().gateway
    one, one_pid = user_world.machine("one")
    two, two_pid = user_world.machine("two")
    found = user_world.record
    for process in (found.holder, found.dnsmasq, found.pasta):
        kill(process)
    until(lambda: "eth0" not in user_world.inside(one_pid, "ip", "-br", "link"))
    assert user_world.ensure().notes == ()
    with serve_tcp(two_pid, "", _PORT):
        assert user_world.reach(one_pid, two.ip, _PORT) == one.ip
    assert user_world.reach(one_pid, OUTSIDE, OUTSIDE_PORT) == WAN
    assert user_world.resolve(one_pid, gateway, "two") == two.ip
    # New machines and old ones meet in the new hub.
    three, three_pid = user_world.machine("three")
    with serve_tcp(two_pid, "", _PORT):
        assert user_world.reach(three_pid, two.ip, _PORT) == three.ip


def test_user_everything_killed_without_machines_starts_afresh(user_world: World) -> None:
    before = user_world.ensure()
    found = user_world.record
    for process in (found.holder, found.dnsmasq, found.pasta):
        kill(process)
    after = user_world.ensure()
    assert after.holder_pid != before.holder_pid
    assert after.notes == ()


def test_user_lost_runtime_directory_leaves_no_second_hub(user_world: World) -> None:
    before = user_world.ensure()
    proc.run(["rm", "-r", str(user_world.layout.hub)])
    after = user_world.ensure()
    assert after.holder_pid == before.holder_pid
    assert len(hub.members(network_namespace(after.holder_pid))) == 2  # holder, dnsmasq


def test_user_loopback_of_the_host_stays_out_of_reach(user_world: World) -> None:
    network = user_world.ensure()
    _one, pid = user_world.machine("one")
    with serve_tcp(user_world.host, "127.0.0.1", _PORT):
        for ip in ("127.0.0.1", network.gateway, OUTSIDE, WAN, "169.254.1.1"):
            assert user_world.reach(pid, ip, _PORT, timeout_s=1) is None


def test_user_resolver_on_the_loopback_of_the_host(user_world: World) -> None:
    (user_world.folder / "resolv.conf").write_text("nameserver 127.0.0.53\noptions edns0\n")
    with serve_dns(user_world.host, "127.0.0.53", "203.0.113.77"):
        network = user_world.ensure()
        _one, pid = user_world.machine("one")
        assert user_world.resolve(pid, network.gateway, "www.example.org") == "203.0.113.77"
        assert network.resolv_conf == f"search berth\nnameserver {network.gateway}\n"


def test_user_follows_a_change_of_resolvers(user_world: World) -> None:
    gateway = user_world.ensure().gateway
    _one, pid = user_world.machine("one")
    assert user_world.resolve(pid, gateway, "a.example.org") == ANSWER
    (user_world.folder / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    with serve_dns(user_world.host, "127.0.0.53", "203.0.113.77"):
        user_world.ensure()
        assert user_world.resolve(pid, gateway, "b.example.org") == "203.0.113.77"


def test_user_without_tun_has_all_but_the_outside(scratch: Path, user_layout: Layout, ordinary_user: Ordinary) -> None:
    with make_world(scratch, user_layout, ordinary_user, tun=False) as world:
        network = world.ensure()
        assert network.notes == ("no internet in machines: /dev/net/tun can't be opened (sudo chmod 666 /dev/net/tun)",)
        one, one_pid = world.machine("one")
        two, two_pid = world.machine("two")
        with serve_tcp(two_pid, "", _PORT):
            assert world.reach(one_pid, two.ip, _PORT) == one.ip
        assert world.resolve(one_pid, network.gateway, "two") == two.ip
        world.run("chmod", "666", "/dev/net/tun")
        assert world.ensure().notes == ()
        assert world.reach(one_pid, OUTSIDE, OUTSIDE_PORT) == WAN


def _command_lines(mark: str) -> list[str]:
    """The command lines of all living processes that mention `mark`."""
    found: list[str] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if mark in line:
                found.append(line)
    return found


def _ports(world: World, bridge: str) -> list[str]:
    argv = ["ip", "-br", "link", "show", "master", bridge]
    holder = world.record.holder
    said = world.run(*argv) if holder is None else world.inside(holder.pid, *argv)
    return said.splitlines()


def _route(pid: int, destination: str) -> None:
    argv = ["nsenter", "-t", str(pid), "-n", "--", "ip", "route", "add", destination, "via", WAN]
    proc.run(argv, timeout_s=10)


def test_socket_in_is_where_it_says(root_world: World) -> None:
    """The tests' own tool: a socket bound in the world is not on the real host."""
    with socket_in(root_world.outside, socket.SOCK_STREAM) as sock, pytest.raises(OSError, match="Cannot assign"):
        sock.bind((WAN, 0))
