"""The address of each machine, for its whole life. Owns Layout.addresses (schema 1); layer 3.

`lifecycle` allocates at create and releases at delete; the engines are handed an `Address`.
Changes are made under addresses.lock; a reader needs no lock, the file is whole at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import zlib
from collections.abc import Generator
from typing import cast

from berth import files, locks
from berth.errors import BerthError, ExistsError, InvalidArgumentError, NotFoundError, StateFormatError
from berth.layout import Layout
from berth.names import MachineName
from berth.net.subnet import PREFIX, Subnet, choose_subnet, format_ip, parse_ip, parse_routes

SCHEMA = 1
GUEST_INTERFACE = "eth0"
HOST_BITS = 32 - PREFIX


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Where one machine is found.

    ip, prefix, gateway: on the bridge (`prefix` in bits). mac: of the machine's eth0. interface: the bridge's port,
    a host-side veth or a TAP, at most 15 characters. loopback: what an ordinary user connects to on the host, within
    127.64.0.0/10. All but ip and prefix derive from those two and the uid.
    """

    ip: str
    prefix: int
    gateway: str
    mac: str
    interface: str
    loopback: str

    @classmethod
    def from_json(cls, document: object, *, where: str) -> Address:
        """Check `document`, the parsed JSON found at `where`. Raises StateFormatError."""
        match document:
            case {
                "ip": str(ip), "prefix": int(prefix), "gateway": str(gateway), "mac": str(mac),
                "interface": str(interface), "loopback": str(loopback),
            }:  # fmt: skip
                return cls(ip, prefix, gateway, mac, interface, loopback)
            case _:
                raise StateFormatError(f"{where} is damaged: no address: {document!r:.80}")

    def to_json(self) -> dict[str, object]:
        """The members as `from_json` reads them."""
        return dataclasses.asdict(self)


def plan_address(ip: str, subnet: Subnet, uid: int) -> Address:
    """Derive all that belongs to the address `ip` of `subnet` for the user `uid`."""
    value = parse_ip(ip)
    return Address(
        ip=ip,
        prefix=subnet.prefix,
        gateway=subnet.gateway,
        mac=plan_mac(ip),
        interface=plan_interface(ip),
        loopback=f"127.{64 + uid % 128}.{value >> 8 & 0xFF}.{value & 0xFF}",
    )


def plan_mac(ip: str) -> str:
    """Derive a MAC from an address: ``02:be:`` (locally administered, unicast), then its four octets."""
    return ":".join(f"{octet:02x}" for octet in b"\x02\xbe" + parse_ip(ip).to_bytes(4, "big"))


def plan_interface(ip: str) -> str:
    """Derive the name of the bridge's port: ``bth02b440-002``, unique in a namespace as the address is."""
    value = parse_ip(ip)
    return f"{port_prefix(value)}{value & (1 << HOST_BITS) - 1:03x}"


def port_prefix(address: int) -> str:
    """Begin the name of every port of the subnet that `address` lies in, and of no other's: ``bth02b440-``."""
    return f"bth{address >> HOST_BITS:06x}-"


def allocate(layout: Layout, name: MachineName) -> Address:
    """Give a machine its address; the one it has when it has one. The first use chooses the subnet."""
    with _edit(layout) as book:
        if name not in book.machines:
            if not book.machines:
                # Nobody depends on the old plan: choose by the routes of today.
                book.subnet = _choose_subnet(layout)
            used = set(book.machines.values())
            free = next((ip for ip in book.subnet.machines() if ip not in used), None)
            if free is None:
                raise BerthError(f"all addresses of {book.subnet} are in use", hint="berth rm machines you don't need")
            book.machines[name] = free
        return plan_address(book.machines[name], book.subnet, os.getuid())


def lookup(layout: Layout, name: MachineName) -> Address:
    """Find a machine's address. Raises NotFoundError."""
    book = _load(layout)
    if name not in book.machines:
        raise NotFoundError(f"machine '{name}' has no address")
    return plan_address(book.machines[name], book.subnet, os.getuid())


def release(layout: Layout, name: MachineName) -> None:
    """Take a machine's address back; idempotent."""
    with _edit(layout) as book:
        book.machines.pop(name, None)


def sweep(layout: Layout) -> None:
    """Take back the addresses of machines that are gone, or never came to be: their command was killed."""
    with _edit(layout) as book:
        for name in [name for name in book.machines if not _is_there(layout, name)]:
            del book.machines[name]


def _is_there(layout: Layout, name: str) -> bool:
    # In this order: a machine that is being made may get its name between the two looks.
    partials = glob.glob(f"{glob.escape(str(layout.machines / name))}.partial-*")
    return bool(partials) or os.path.lexists(layout.machines / name)


def rename(layout: Layout, old: MachineName, new: MachineName) -> Address:
    """Let the machine keep its address under a new name. Raises NotFoundError, ExistsError."""
    with _edit(layout) as book:
        if old not in book.machines:
            raise NotFoundError(f"machine '{old}' has no address")
        if new in book.machines and new != old:
            raise ExistsError(f"machine '{new}' already has an address")
        book.machines[new] = book.machines.pop(old)
        return plan_address(book.machines[new], book.subnet, os.getuid())


def subnet(layout: Layout) -> Subnet:
    """The subnet in use; chosen (and stored) now when there is none yet."""
    if layout.addresses.exists():
        return _load(layout).subnet
    with _edit(layout) as book:
        return book.subnet


def _choose_subnet(layout: Layout) -> Subnet:
    owner = "" if _is_roots(layout) else f"{os.getuid()} {layout.data}"
    return choose_subnet(owner, host_routes(bridge_name(layout)))


def bridge_name(layout: Layout) -> str:
    """Name the bridge: ``berth0``; of root with a data directory elsewhere (tests) ``berth-`` and a hash of it.

    A user's bridge has a network namespace of its own, so nothing can collide there.
    """
    if os.geteuid() != 0 or _is_roots(layout):
        return "berth0"
    return f"berth-{zlib.crc32(os.fsencode(layout.data)):08x}"


def _is_roots(layout: Layout) -> bool:
    """Say whether these are the machines that root has where nothing else is set."""
    return os.geteuid() == 0 and str(layout.data) == "/var/lib/berth"


def host_routes(bridge: str) -> list[Subnet]:
    """List the subnets that the host routes, without those of our own `bridge`."""
    from berth.proc import require_program, run

    ip = require_program("ip", package="iproute2")
    # Every table: VPNs like to keep theirs apart.
    return parse_routes(run([str(ip), "-4", "-j", "route", "show", "table", "all"], timeout_s=10).stdout, ours=bridge)


@dataclasses.dataclass(slots=True)
class _Book:
    """Layout.addresses in memory. machines: name → address."""

    subnet: Subnet
    machines: dict[str, str]


def _load(layout: Layout) -> _Book:
    try:
        document = files.load_json(layout.addresses, schema=SCHEMA)
    except FileNotFoundError:
        return _Book(_choose_subnet(layout), {})
    where = str(layout.addresses)
    match document:
        case {"subnet": str(text), "machines": dict()}:
            return _parse_book(text, cast("dict[str, object]", document["machines"]), where)
        case _:
            raise StateFormatError(f"{where} is damaged: no subnet or no machines")


def _parse_book(text: str, entries: dict[str, object], where: str) -> _Book:
    try:
        found = Subnet.parse(text)
        machines = {name: format_ip(parse_ip(str(ip))) for name, ip in entries.items()}
    except InvalidArgumentError as error:
        raise StateFormatError(f"{where} is damaged: {error.message}") from error
    if found.prefix != PREFIX:
        raise StateFormatError(f"{where} is damaged: {found} is no /{PREFIX}")
    if not all(found.contains(ip) for ip in machines.values()) or len(set(machines.values())) != len(machines):
        raise StateFormatError(f"{where} is damaged: addresses outside of {found} or twice")
    return _Book(found, machines)


@contextlib.contextmanager
def _edit(layout: Layout) -> Generator[_Book]:
    """Hold the lock, load, hand out, and save when the block changed something."""
    files.make_private_directory(layout.data)
    with locks.hold(layout.addresses_lock, timeout_s=60, what="the address book"):
        book = _load(layout)
        before = (book.subnet, dict(book.machines))
        yield book
        if before != (book.subnet, book.machines) or not layout.addresses.exists():
            document: dict[str, object] = {"subnet": str(book.subnet), "machines": book.machines}
            files.save_json(layout.addresses, document, schema=SCHEMA)
