"""The address plan: which subnet the machines of one user live in. Pure; layer 3, used by `net` only.

A /22 (1015 machines) that no route of the host overlaps; chosen once and then kept, so that a machine's address is
stable for life. Addresses are handled as integers: `ipaddress` costs more to import than all of this.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

from berth.errors import InvalidArgumentError

PREFIX = 22
# Where subnets are looked for: pools of one /16 each, the least used by others first. 198.18.0.0/15 is for
# benchmarks (RFC 2544), never routed, and thus the last resort of a host with a VPN over all private ranges.
POOLS = ("10.209.0.0/16", "172.29.0.0/16", "192.168.0.0/16", "198.18.0.0/16")
_CANDIDATES = 64  # of the size of ours in one pool


class Subnet(NamedTuple):
    """An IPv4 network. base: its first address as an integer; prefix: bits of the network part."""

    base: int
    prefix: int

    @classmethod
    def parse(cls, text: str) -> Subnet:
        """Read ``10.209.0.0/22`` (or an address, which is a /32). Raises InvalidArgumentError."""
        address, slash, bits = text.partition("/")
        prefix = int(bits) if bits.isdecimal() else 32
        if (slash and not bits.isdecimal()) or prefix > 32:
            raise InvalidArgumentError(f"invalid subnet '{text}'")
        return cls(parse_ip(address) & _mask(prefix), prefix)

    def __str__(self) -> str:
        return f"{format_ip(self.base)}/{self.prefix}"

    @property
    def gateway(self) -> str:
        """The bridge's own address: the first."""
        return format_ip(self.base + 1)

    def overlaps(self, other: Subnet) -> bool:
        """Say whether the two share an address."""
        mask = _mask(min(self.prefix, other.prefix))
        return self.base & mask == other.base & mask

    def contains(self, ip: str) -> bool:
        """Say whether an address lies in it."""
        return parse_ip(ip) & _mask(self.prefix) == self.base

    def machines(self) -> Iterator[str]:
        """List the addresses for machines, lowest first: no gateway, and none that ends in .0 or .255.

        Those two are valid inside a /22, yet enough software takes them for a network's or a broadcast address.
        """
        for address in range(self.base + 2, self.base + 2 ** (32 - self.prefix)):
            if address & 0xFF not in (0, 255):
                yield format_ip(address)


def choose_subnet(owner: str, taken: Iterable[Subnet]) -> Subnet:
    """Choose a subnet that overlaps none of `taken`.

    owner: whose subnet it is to be; nobody's ("") is the first candidate. Each begins elsewhere, so that two seldom
    share one: while no machine of the other runs, no route tells of it. (And users' loopback addresses carry its last
    two octets.)
    If everything is taken (a VPN that routes all private ranges) the first choice it is: the longer prefix wins.
    """
    taken = list(taken)
    first = 1 + zlib.crc32(owner.encode(errors="surrogateescape")) % (_CANDIDATES - 1) if owner else 0
    candidates = [
        Subnet(Subnet.parse(pool).base + (((first + step) % _CANDIDATES) << (32 - PREFIX)), PREFIX)
        for pool in POOLS
        for step in range(_CANDIDATES)
    ]
    return next((one for one in candidates if not any(one.overlaps(other) for other in taken)), candidates[0])


def parse_routes(text: bytes, *, ours: str) -> list[Subnet]:
    """Read the subnets that ``ip -4 -j route show table all`` prints; no default routes, no loopback, none of `ours`.

    ours: the name of our own bridge. Whatever isn't understood is left out.
    """
    document: object = json.loads(text or b"[]")
    routes = cast("list[object]", document) if isinstance(document, list) else []
    found: list[Subnet] = []
    for route in routes:
        match route:
            case {"dst": "default"} | {"dev": "lo"}:
                continue
            case {"dev": str(device)} if device == ours:
                continue
            case {"dst": str(destination)}:
                subnet = Subnet.parse(destination)
                if subnet.prefix and subnet.base >> 24 != 127:
                    found.append(subnet)
            case _:
                continue
    return found


def parse_ip(text: str) -> int:
    """Read a dotted IPv4 address. Raises InvalidArgumentError."""
    octets = text.split(".")
    if len(octets) != 4 or not all(o.isascii() and o.isdecimal() and len(o) <= 3 and int(o) < 256 for o in octets):
        raise InvalidArgumentError(f"invalid IPv4 address '{text}'")
    return int.from_bytes(bytes(int(octet) for octet in octets), "big")


def format_ip(address: int) -> str:
    """Print an address: ``10.209.0.2``."""
    return ".".join(str(octet) for octet in address.to_bytes(4, "big"))


def _mask(prefix: int) -> int:
    return 0xFFFF_FFFF << (32 - prefix) & 0xFFFF_FFFF
