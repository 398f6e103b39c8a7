"""What ip, nft, dnsmasq and pasta are told, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from berth.net import plan
from berth.net.addresses import plan_address
from berth.net.plan import Upstream
from berth.net.subnet import Subnet

SUBNET = Subnet.parse("10.209.0.0/22")
ADDRESS = plan_address("10.209.0.2", SUBNET, 0)
RESOLV_CONF = Path("/etc/resolv.conf")
RESOLVED = "# by systemd-resolved\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch example.org\n"


def test_bridge() -> None:
    rest = "address replace 10.209.0.1/22 brd + dev berth0\nlink set dev berth0 up\n"
    make = "link add name berth0 address 02:be:0a:d1:00:01 type bridge forward_delay 0\n"
    assert plan.bridge_batch("berth0", SUBNET, exists=False) == make + rest
    assert plan.bridge_batch("berth0", SUBNET, exists=True) == rest


def test_cable() -> None:
    assert plan.port_batch("berth0", ADDRESS, 4711) == (
        "link add name bth02b440-002 type veth peer name eth0 address 02:be:0a:d1:00:02 netns 4711\n"
        "link set dev bth02b440-002 master berth0 up\n"
    )
    assert plan.guest_batch(ADDRESS) == (
        "link set dev lo up\n"
        "address add 10.209.0.2/22 brd + dev eth0\n"
        "link set dev eth0 up\n"
        "route add default via 10.209.0.1 dev eth0\n"
    )


@pytest.mark.parametrize(
    ("hub", "line"), [(False, ""), (True, '\t\tiifname "uplink" ct state invalid drop\n')], ids=["root", "hub"]
)
def test_nat_rules(hub: bool, line: str) -> None:
    assert plan.nat_rules("berth0", "berth", SUBNET, hub=hub) == (
        """\
table inet berth
delete table inet berth
table inet berth {
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "berth0" ip saddr != 10.209.0.0/22 drop
		iifname "berth0" oifname "berth0" accept
		iifname "berth0" ct state invalid drop
		iifname "berth0" tcp flags syn tcp option maxseg size set rt mtu
		iifname "berth0" accept
		oifname "berth0" ct state established,related accept
		oifname "berth0" ct status dnat accept
		oifname "berth0" drop
	}
	chain input {
		type filter hook input priority filter; policy accept;
"""
        + line
        + """\
		iifname "berth0" ip saddr != 10.209.0.0/22 drop
		iifname != { "lo", "berth0" } ip daddr 10.209.0.0/22 drop
	}
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 10.209.0.0/22 oifname != "berth0" masquerade
	}
}
"""
    )


def test_guard_rules() -> None:
    text = plan.guard_rules("berth", SUBNET)
    assert '\n\t\t\t"bth02b440-002" . 02:be:0a:d1:00:02 . 10.209.0.2,\n' in text
    assert text.count(" . 02:be:") == len([*SUBNET.machines()])
    assert text.endswith(
        """
		}
	}
	chain guard_arp {
		iifname . arp saddr ether . arp saddr ip @ports accept
	}
	chain guard {
		ether type ip iifname . ether saddr . ip saddr @ports accept
		ether type arp iifname . ether saddr . arp saddr ip @ports jump guard_arp
		drop
	}
	chain prerouting {
		type filter hook prerouting priority dstnat; policy accept;
		iifname "bth02b440-*" jump guard
	}
}
"""
    )


def test_tables_are_named_after_the_bridge() -> None:
    assert plan.table_name("berth0") == "berth"
    assert plan.table_name("berth-12345678") == "berth-12345678"
    assert plan.delete_rules("berth") == (
        "table inet berth\ndelete table inet berth\ntable bridge berth\ndelete table bridge berth\n"
    )


@pytest.mark.parametrize(
    ("upstream", "words"),
    [
        (Upstream(file=RESOLV_CONF), ["--resolv-file=/etc/resolv.conf"]),
        (Upstream(server="169.254.1.1"), ["--no-resolv", "--server=169.254.1.1"]),
    ],
)
def test_dnsmasq(upstream: Upstream, words: list[str]) -> None:
    run = Path("/run/berth/hub")
    argv = plan.dnsmasq_command(
        "berth0", hosts=Path("/run/berth-hosts"), pid_file=run / "dnsmasq.pid", log=run / "dnsmasq.log",
        user="dnsmasq", upstream=upstream,
    )  # fmt: skip
    assert argv == [
        "dnsmasq", "--conf-file=/dev/null", "--no-hosts", "--hostsdir=/run/berth-hosts", "--bind-interfaces",
        "--interface=berth0", "--except-interface=lo", "--port=53", "--local=/berth/", "--domain-needed", *words,
        "--cache-size=1000", "--user=dnsmasq", "--pid-file=/run/berth/hub/dnsmasq.pid",
        "--log-facility=/run/berth/hub/dnsmasq.log",
    ]  # fmt: skip


@pytest.mark.parametrize(("forward_dns", "words"), [(True, ["--dns-forward", "169.254.1.1"]), (False, [])])
def test_pasta_lets_nothing_of_the_host_in(forward_dns: bool, words: list[str]) -> None:
    argv = plan.pasta_command(42, forward_dns=forward_dns, pid_file=Path("/r/pasta.pid"), log=Path("/r/pasta.log"))
    assert argv == [
        "pasta", "--config-net", "--ipv4-only", "--ns-ifname", "uplink",
        "--userns", "/proc/42/ns/user", "--netns", "/proc/42/ns/net",
        "--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none",
        "--no-map-gw", *words, "--pid", "/r/pasta.pid", "--log-file", "/r/pasta.log",
    ]  # fmt: skip


def test_uplink() -> None:
    assert plan.uplink_batch() == "link set dev uplink txqueuelen 20000\n"


def test_upstream() -> None:
    by_file = Upstream(file=RESOLV_CONF)
    assert plan.plan_upstream(RESOLVED, user=False, path=RESOLV_CONF) == by_file
    assert plan.plan_upstream(RESOLVED, user=True, path=RESOLV_CONF) == Upstream(server="169.254.1.1")
    assert plan.plan_upstream("nameserver 192.0.2.53\n", user=True, path=RESOLV_CONF) == by_file
    assert plan.plan_upstream("", user=True, path=RESOLV_CONF) == by_file


@pytest.mark.parametrize(
    ("host", "search"),
    [
        ("", "berth"),
        (RESOLVED, "berth example.org"),
        ("search a.example b.example\n", "berth a.example b.example"),
        ("domain old.example\nsearch new.example\n", "berth new.example"),
        ("search . berth\n", "berth"),
        ("; search no.example\n#search no.example\nsearch\n", "berth"),
    ],
)
def test_resolv_conf_of_machines(host: str, search: str) -> None:
    text = plan.machine_resolv_conf(host, ["10.209.0.1"])
    assert text == f"search {search}\nnameserver 10.209.0.1\n"


def test_nameservers() -> None:
    text = (
        "nameserver 192.0.2.1\nnameserver\t192.0.2.2 # two\n nameserver 192.0.2.3\nnameserver\n#nameserver 192.0.2.4\n"
    )
    assert plan.parse_nameservers(text) == ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
