"""Routing and firewalls: nft's tables of ours, and how to live with docker's and others' rules. Layer 3.

Used by `network` only. What can't be had becomes a note, in words for people; it never keeps a machine from starting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from berth.errors import BerthError
from berth.log import log
from berth.net import plan
from berth.net.subnet import Subnet
from berth.proc import find_program, install_command, run

Inside = Callable[[Sequence[str]], list[str]]
_DEADLINE_S = 10.0
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def apply_rules(bridge: str, table: str, subnet: Subnet, inside: Inside, *, hub: bool) -> dict[str, str]:
    """Load our nft tables, replacing those of before; return notes by part: ``nat``, ``guard``.

    inside: turns an argv into one that runs in the bridge's namespace. hub: that is a user's own.
    """
    if find_program("nft") is None:
        missing = f"nft is not installed ({install_command('nftables')})"
        return {
            "nat": f"no internet in machines: {missing}",
            "guard": f"machines are not kept from using each other's addresses: {missing}",
        }
    nat = plan.nat_rules(bridge, table, subnet, hub=hub)
    guard = plan.guard_rules(table, subnet)
    try:
        _nft(nat + guard, inside)
        return {}
    except BerthError as error:
        log.debug("nft refused all of the rules, trying them apart: %s", error)
    notes: dict[str, str] = {}
    for part, text, lost in (
        ("nat", nat, "no internet in machines"),
        ("guard", guard, "machines are not kept from using each other's addresses"),
    ):
        try:
            _nft(text, inside)
        except BerthError as error:
            notes[part] = f"{lost}: the kernel refuses the nftables rules: {error}"
    return notes


def rules_present(table: str, inside: Inside) -> bool:
    """Say whether our tables are there still: a restart of the host's own firewall flushes everyone's."""
    try:
        return run(inside(["nft", "-t", "list", "table", "inet", table]), timeout_s=_DEADLINE_S).status == 0
    except BerthError:
        return False


def remove_rules(table: str, inside: Inside) -> None:
    """Delete our nft tables; idempotent."""
    with contextlib.suppress(BerthError):
        _nft(plan.delete_rules(table), inside)


def enable_forwarding_here() -> str | None:
    """Let the kernel route between interfaces of this network namespace; return a note when it can't be."""
    try:
        if _FORWARD.read_text().strip() != "1":
            _FORWARD.write_text("1\n")
    except OSError as error:
        return f"no internet in machines: routing can't be enabled: {error} (sudo sysctl -w net.ipv4.ip_forward=1)"
    return None


def enable_forwarding(inside: Inside) -> str | None:
    """Let the hub's kernel route; return a note when it can't be."""
    try:
        # /proc/sys/net shows the namespace of whoever looks, so a program inside has to write it.
        run(inside(["tee", str(_FORWARD)]), input=b"1\n", timeout_s=_DEADLINE_S)
    except BerthError as error:
        return f"no internet in machines: routing can't be enabled in the hub: {error}"
    return None


def disable_ipv6(bridge: str) -> None:
    """Keep the host's end of the bridge off IPv6: a machine could announce itself as the host's router there."""
    with contextlib.suppress(OSError):
        Path(f"/proc/sys/net/ipv6/conf/{bridge}/disable_ipv6").write_text("1\n")


def admit_in_iptables(bridge: str) -> dict[str, str]:
    """Make other firewalls let our machines through where they offer a place for it, else say what to do; root only.

    In netfilter a drop is final whoever says it, so our own accepting rules help nothing against theirs.
    Returns notes by part: ``forward``, ``input``.
    """
    notes: dict[str, str] = {}
    for iptables in _iptables_in_use():
        said = _iptables(iptables, "-S").splitlines()
        if "-N DOCKER-USER" in said:
            for rule in plan.docker_rules(bridge):
                if not _succeeds(iptables, "-C", "DOCKER-USER", *rule):
                    _succeeds(iptables, "-I", "DOCKER-USER", *rule)
        elif "-P FORWARD DROP" in said:
            notes["forward"] = (
                "the host's firewall drops what machines send out "
                f"(sudo ufw route allow in on {bridge}; or sudo {iptables} -I FORWARD -i {bridge} -j ACCEPT)"
            )
        if "-P INPUT DROP" in said:
            notes["input"] = (
                "the host's firewall may keep machines from asking for names "
                f"(sudo ufw allow in on {bridge} to any port 53; "
                f"or sudo {iptables} -I INPUT -i {bridge} -p udp --dport 53 -j ACCEPT)"
            )
    return notes


def dismiss_from_iptables(bridge: str) -> None:
    """Remove what `admit_in_iptables` added; idempotent."""
    for iptables in _iptables_in_use():
        for rule in plan.docker_rules(bridge):
            if _succeeds(iptables, "-C", "DOCKER-USER", *rule):
                _succeeds(iptables, "-D", "DOCKER-USER", *rule)


def _nft(text: str, inside: Inside) -> None:
    run(inside(["nft", "-f", "-"]), input=text.encode(), timeout_s=_DEADLINE_S)


def _iptables_in_use() -> Iterator[str]:
    """List the iptables programs whose tables hold something; asking the others would make tables."""
    tables = ""
    with contextlib.suppress(BerthError):
        tables = run(["nft", "list", "tables"], timeout_s=_DEADLINE_S).stdout.decode()
    if "table ip filter\n" in tables and find_program("iptables-nft"):
        yield "iptables-nft"
    legacy = ""
    with contextlib.suppress(OSError):
        legacy = Path("/proc/net/ip_tables_names").read_text()
    if "filter" in legacy.split() and find_program("iptables-legacy"):
        yield "iptables-legacy"


def _iptables(program: str, *arguments: str) -> str:
    try:
        return run([program, "-w", "5", *arguments], timeout_s=_DEADLINE_S).stdout.decode()
    except BerthError as error:
        log.debug("%s could not be asked: %s", program, error)
        return ""


def _succeeds(program: str, *arguments: str) -> bool:
    try:
        run([program, "-w", "5", *arguments], timeout_s=_DEADLINE_S)
        return True
    except BerthError:
        return False
