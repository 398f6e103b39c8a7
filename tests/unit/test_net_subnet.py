"""The address plan: which subnet, which addresses."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import InvalidArgumentError
from berth.net.subnet import POOLS, PREFIX, Subnet, choose_subnet, format_ip, parse_ip, parse_routes

IPS = st.integers(0, 2**32 - 1)
SUBNETS = st.builds(lambda ip, prefix: Subnet.parse(f"{format_ip(ip)}/{prefix}"), IPS, st.integers(0, 32))


@given(IPS)
def test_addresses_read_as_they_print(ip: int) -> None:
    assert parse_ip(format_ip(ip)) == ip


@given(SUBNETS)
def test_subnets_read_as_they_print(subnet: Subnet) -> None:
    assert Subnet.parse(str(subnet)) == subnet


@pytest.mark.parametrize(
    "text", ["", "1.2.3", "1.2.3.4.5", "1.2.3.256", "a.b.c.d", "1.2.3.-4", "1.2.3.٣", "1.2.3.0004", " 1.2.3.4"]
)
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="invalid IPv4 address"):
        parse_ip(text)


@pytest.mark.parametrize("text", ["10.0.0.0/33", "10.0.0.0/", "10.0.0.0/x", "10.0.0.0/-1"])
def test_bad_subnets_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="invalid subnet"):
        Subnet.parse(text)


@given(SUBNETS, SUBNETS)
def test_overlap_is_mutual_and_means_that_one_holds_the_other(one: Subnet, other: Subnet) -> None:
    wide, narrow = sorted((one, other), key=lambda subnet: subnet.prefix)
    assert one.overlaps(other) == other.overlaps(one) == wide.contains(format_ip(narrow.base))


def test_machines_of_a_subnet() -> None:
    subnet = Subnet.parse("10.209.4.0/22")
    machines = list(subnet.machines())
    assert subnet.gateway == "10.209.4.1"
    assert machines[:2] == ["10.209.4.2", "10.209.4.3"]
    assert machines[-1] == "10.209.7.254"
    assert len(machines) == len(set(machines)) == 4 * 254 - 1
    assert not [ip for ip in machines if ip.endswith((".0", ".255"))]
    assert all(subnet.contains(ip) for ip in machines)


def test_root_gets_the_first_subnet_and_users_others() -> None:
    assert str(choose_subnet("", [])) == "10.209.0.0/22"
    chosen = Counter(choose_subnet(f"{uid} /home/user{uid}/.local/share/berth", []) for uid in range(1000, 1064))
    assert choose_subnet("", []) not in chosen
    assert max(chosen.values()) <= 5
    assert choose_subnet("0 /tmp/one", []) != choose_subnet("0 /tmp/two", [])
    assert choose_subnet("0 /caf\udce9", [])


@given(st.text(max_size=20), st.lists(SUBNETS.filter(lambda subnet: subnet.prefix > 10), max_size=8))
def test_chosen_subnet_collides_with_nothing(owner: str, taken: list[Subnet]) -> None:
    chosen = choose_subnet(owner, taken)
    assert chosen.prefix == PREFIX
    assert not any(chosen.overlaps(other) for other in taken)
    assert any(Subnet.parse(pool).overlaps(chosen) for pool in POOLS)


def test_vpn_over_a_private_range_sends_us_to_another() -> None:
    assert str(choose_subnet("", [Subnet.parse("10.0.0.0/8")])) == "172.29.0.0/22"
    private = [Subnet.parse(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
    assert str(choose_subnet("", private)) == "198.18.0.0/22"


def test_everything_taken_gives_the_first_choice() -> None:
    assert str(choose_subnet("", [Subnet.parse("0.0.0.0/1"), Subnet.parse("128.0.0.0/1")])) == "10.209.0.0/22"


def test_routes_of_the_host() -> None:
    routes = [
        {"dst": "default", "gateway": "192.0.2.1", "dev": "eth0"},
        {"dst": "192.0.2.0/24", "dev": "eth0", "protocol": "kernel"},
        {"type": "local", "dst": "192.0.2.2", "dev": "eth0", "table": "local"},
        {"type": "local", "dst": "127.0.0.0/8", "dev": "lo", "table": "local"},
        {"type": "blackhole", "dst": "10.1.0.0/16"},
        {"dst": "10.209.0.0/22", "dev": "berth0"},
        {"dst": "0.0.0.0/0", "dev": "wg0"},
        "what is this",
    ]
    found = parse_routes(json.dumps(routes).encode(), ours="berth0")
    assert [str(subnet) for subnet in found] == ["192.0.2.0/24", "192.0.2.2/32", "10.1.0.0/16"]


def test_host_without_routes() -> None:
    assert parse_routes(b"", ours="berth0") == []
    assert parse_routes(b"{}", ours="berth0") == []
