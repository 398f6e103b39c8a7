"""Texts and argument vectors of the network: what `ip`, `nft`, `dnsmasq` and `pasta` are told.

Pure: same inputs, same text, nothing is started. Layer 3, used by `net` only; docs/network.md explains the rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from berth.net.addresses import GUEST_INTERFACE, Address, plan_interface, plan_mac, port_prefix
from berth.net.subnet import Subnet, format_ip

# Where pasta answers DNS for the hub: link-local, so that no network of anyone's is hidden by it.
FORWARDED_DNS = "169.254.1.1"
UPLINK = "uplink"
# Packets that may wait for pasta. A TAP drops what is beyond, and pasta offers windows larger than the kernel's 1000
# packets: without this, uploads lose whole bursts of segments.
_UPLINK_QUEUE = 20000
DOMAIN = "berth"


@dataclasses.dataclass(frozen=True, slots=True)
class Upstream:
    """Whom dnsmasq asks. file: a resolv.conf that it follows as it changes; server: one address, when there is none."""

    file: Path | None = None
    server: str | None = None


def bridge_batch(bridge: str, subnet: Subnet, *, exists: bool) -> str:
    """Say what ``ip -batch -`` does to make the bridge, or to put an existing one right."""
    # A fixed MAC: without one the bridge takes the lowest of its ports, and the machines' ARP caches go stale.
    make = f"link add name {bridge} address {plan_mac(subnet.gateway)} type bridge forward_delay 0\n"
    return (
        ("" if exists else make)
        + f"address replace {subnet.gateway}/{subnet.prefix} brd + dev {bridge}\n"
        + f"link set dev {bridge} up\n"
    )


def port_batch(bridge: str, address: Address, pid: int) -> str:
    """Say what makes a machine's cable: one end on the bridge, the other, eth0, in the namespace of `pid`."""
    port = address.interface
    return (
        f"link add name {port} type veth peer name {GUEST_INTERFACE} address {address.mac} netns {pid}\n"
        f"link set dev {port} master {bridge} up\n"
    )


def tap_batch(bridge: str, address: Address) -> str:
    """Say what hangs a VM's cable, which is there already, on the bridge."""
    return f"link set dev {address.interface} master {bridge} up\n"


def guest_batch(address: Address) -> str:
    """Say what configures a machine's end, from within its namespace."""
    return (
        "link set dev lo up\n"
        f"address add {address.ip}/{address.prefix} brd + dev {GUEST_INTERFACE}\n"
        f"link set dev {GUEST_INTERFACE} up\n"
        f"route add default via {address.gateway} dev {GUEST_INTERFACE}\n"
    )


def table_name(bridge: str) -> str:
    """Name our nft tables: ``berth`` for the bridge ``berth0``, else as the bridge."""
    return "berth" if bridge == "berth0" else bridge


def nat_rules(bridge: str, table: str, subnet: Subnet, *, hub: bool) -> str:
    """Say the nft rules of routing: out by masquerade, in only as an answer, or where somebody forwards a port.

    The gateway's own address, where dnsmasq answers, is for machines and the host alone.
    hub: it is a user's, with pasta as the way out. Applying them replaces those of before, in one transaction.
    """
    # pasta of early 2023 (Debian 12) announces its window in segments without ACK. Those are invalid to the kernel's
    # connection tracking, go untranslated to the hub itself, and its answer, a reset, would end the connection.
    invalid = f'\t\tiifname "{UPLINK}" ct state invalid drop\n' if hub else ""
    return f"""\
table inet {table}
delete table inet {table}
table inet {table} {{
	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname "{bridge}" ip saddr != {subnet} drop
		iifname "{bridge}" oifname "{bridge}" accept
		iifname "{bridge}" ct state invalid drop
		iifname "{bridge}" tcp flags syn tcp option maxseg size set rt mtu
		iifname "{bridge}" accept
		oifname "{bridge}" ct state established,related accept
		oifname "{bridge}" ct status dnat accept
		oifname "{bridge}" drop
	}}
	chain input {{
		type filter hook input priority filter; policy accept;
{invalid}		iifname "{bridge}" ip saddr != {subnet} drop
		iifname != {{ "lo", "{bridge}" }} ip daddr {subnet} drop
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr {subnet} oifname != "{bridge}" masquerade
	}}
}}
"""


def guard_rules(table: str, subnet: Subnet) -> str:
    """Say the nft rules that keep a machine, whose root owns its eth0, from using another's addresses.

    Each port of the bridge may send IPv4 and ARP from its own MAC and address, and nothing else: no IPv6 either, so no
    machine can play the router of its neighbours or of the host. All of the subnet is listed at once (7 ms), so that
    starting a machine needs no call of nft.
    """
    ports = (f'"{plan_interface(ip)}" . {plan_mac(ip)} . {ip}' for ip in subnet.machines())
    elements = ",\n\t\t\t".join(ports)
    return f"""\
table bridge {table}
delete table bridge {table}
table bridge {table} {{
	set ports {{
		type ifname . ether_addr . ipv4_addr
		elements = {{
			{elements}
		}}
	}}
	chain guard_arp {{
		iifname . arp saddr ether . arp saddr ip @ports accept
	}}
	chain guard {{
		ether type ip iifname . ether saddr . ip saddr @ports accept
		ether type arp iifname . ether saddr . arp saddr ip @ports jump guard_arp
		drop
	}}
	chain prerouting {{
		type filter hook prerouting priority dstnat; policy accept;
		iifname "{port_prefix(subnet.base)}*" jump guard
	}}
}}
"""


def delete_rules(table: str) -> str:
    """Say how to remove both tables, whether or not they are there."""
    return "".join(f"table {family} {table}\ndelete table {family} {table}\n" for family in ("inet", "bridge"))


def docker_rules(bridge: str) -> tuple[tuple[str, ...], ...]:
    """The rules for docker's chain DOCKER-USER, without which its policy to drop what is forwarded meets us too."""
    return (
        ("-i", bridge, "-j", "ACCEPT"),
        ("-o", bridge, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"),
    )


def dnsmasq_command(bridge: str, *, hosts: Path, pid_file: Path, log: Path, user: str, upstream: Upstream) -> list[str]:
    """Say how to start the name server: it answers on the bridge only, and serves no addresses."""
    ask = [f"--resolv-file={upstream.file}"] if upstream.file else ["--no-resolv", f"--server={upstream.server}"]
    return [
        "dnsmasq",
        "--conf-file=/dev/null",
        "--no-hosts", f"--hostsdir={hosts}",
        "--bind-interfaces", f"--interface={bridge}", "--except-interface=lo", "--port=53",
        # What we call machines is ours to answer; plain names nobody else could know.
        f"--local=/{DOMAIN}/", "--domain-needed",
        *ask,
        "--cache-size=1000",
        f"--user={user}", f"--pid-file={pid_file}", f"--log-facility={log}",
    ]  # fmt: skip


def pasta_command(holder: int, *, forward_dns: bool, pid_file: Path, log: Path) -> list[str]:
    """Say how to start the hub's uplink, for all machines of a user.

    forward_dns: answer on FORWARDED_DNS by asking the host's resolver. Not where that can be reached without: of early
    2023 (Debian 12), pasta then lets *all* of the resolver's answers come from that address, asked for or not.
    No port is forwarded either way and the gateway's address is not the host's loopback: a service that the user bound
    to 127.0.0.1 stays out of the machines' reach.
    """
    return [
        "pasta",
        "--config-net", "--ipv4-only", "--ns-ifname", UPLINK,
        "--userns", f"/proc/{holder}/ns/user", "--netns", f"/proc/{holder}/ns/net",
        "--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none",
        "--no-map-gw", *(["--dns-forward", FORWARDED_DNS] if forward_dns else []),
        "--pid", str(pid_file), "--log-file", str(log),
    ]  # fmt: skip


def passt_command(address: Address, *, fd: int, pid_file: Path | None, forward_dns: bool) -> list[str]:
    """Say how to start the uplink of one VM. fd: a connected socket, whose other end is QEMU's.

    The guest's address is static, so nothing is handed out. As with pasta, no port is forwarded either way, the
    gateway's address is not the host's loopback, and DNS is forwarded only where nothing else reaches the resolver.
    """
    return [
        "passt",
        "--quiet", "--fd", str(fd), *(["--pid", str(pid_file)] if pid_file else []), "--ipv4-only",
        "--address", address.ip, "--netmask", _netmask(address.prefix), "--gateway", address.gateway,
        "--mac-addr", plan_mac(address.gateway),
        "--no-map-gw", *(["--dns-forward", FORWARDED_DNS] if forward_dns else []),
        "--no-dhcp", "--no-ndp", "--no-dhcpv6", "--no-ra",
        "--tcp-ports", "none", "--udp-ports", "none",
    ]  # fmt: skip


def _netmask(prefix: int) -> str:
    return format_ip(0xFFFFFFFF << 32 - prefix & 0xFFFFFFFF)


def uplink_batch() -> str:
    """Say what ``ip -batch -`` does in the hub once pasta has made its interface."""
    return f"link set dev {UPLINK} txqueuelen {_UPLINK_QUEUE}\n"


def plan_upstream(resolv_conf: str, *, user: bool, path: Path) -> Upstream:
    """Choose whom dnsmasq asks, by the host's resolv.conf (its text and `path`).

    In the host's namespace any resolver of the host's will do, and dnsmasq follows the file as networks come and go.
    In the hub that holds for resolvers elsewhere; one on the host's loopback (systemd-resolved) is reached by pasta.
    """
    if user and any(server.startswith("127.") for server in parse_nameservers(resolv_conf)):
        return Upstream(server=FORWARDED_DNS)
    return Upstream(file=path)


def machine_resolv_conf(resolv_conf: str, servers: Iterable[str]) -> str:
    """Write a machine's resolv.conf: our domain first, then the host's search list, then `servers`."""
    search = [DOMAIN]
    for line in resolv_conf.splitlines():
        match line.split():
            case ["search" | "domain", *domains]:
                # Source: resolv.conf(5): the last of these lines counts. "." (the root) adds nothing to a name.
                search = [DOMAIN, *(one for one in domains if one not in (DOMAIN, "."))]
            case _:
                continue
    return f"search {' '.join(search)}\n" + "".join(f"nameserver {server}\n" for server in servers)


def parse_nameservers(resolv_conf: str) -> list[str]:
    """List the name servers of a resolv.conf."""
    words = (line.split() for line in resolv_conf.splitlines())
    return [word[1] for word in words if len(word) > 1 and word[0] == "nameserver"]
