"""A network for one VM alone, where its user can have no TAP: by passt, else by QEMU itself. Layer 3; docs/network.md.

The guest has the same address, gateway and MAC as on the bridge, and no other machine there. What listens in the
machine is reached as always: the keeper forwards it through the agent.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from pathlib import Path

from berth.errors import BerthError
from berth.net import plan
from berth.net.addresses import Address
from berth.net.assembly import RESOLV_CONF, read_text
from berth.net.processes import Process, identify
from berth.net.subnet import format_ip, parse_ip
from berth.proc import find_program, install_command, run

_START_S = 10.0
# From this one on (Debian 13) passt drops what a guest sends to 127.0.0.0/8 and 0.0.0.0; that of early 2023 (Debian 12)
# connects it to the host's own loopback, whatever --no-map-gw says. Both were tried.
_DROPS_LOOPBACK = 2025_05_03
_ALONE = "the machine has a network of its own: other machines can't be reached"
_EXPOSED = "root in the machine can reach what listens on the host's loopback address"


@dataclasses.dataclass(frozen=True, slots=True)
class Uplink:
    """A VM's own way out. socket: for QEMU's ``-netdev stream``, the caller's to close; None where QEMU is the way.

    resolv_conf: the text for the machine. dns: QEMU's own resolver for the guest, where QEMU is the way (its -netdev
    user wants to be told). notes: what this network lacks, in words. process: passt, which ends with QEMU;
    None where it is not known (root's).
    """

    socket: socket.socket | None
    resolv_conf: str
    dns: str | None
    notes: tuple[str, ...]
    process: Process | None


def open_uplink(address: Address, folder: Path, why: str) -> Uplink:
    """Give a VM the best network that needs no TAP; never fails for what is missing.

    folder: the machine's runtime directory. why: why there is no TAP, for the notes (``/dev/net/tun can't be opened``).
    """
    passt = find_program("passt")
    if passt is None:
        return _qemu(address, f"{why}, and passt is not installed ({install_command('passt')})")
    try:
        return start_passt(address, folder, why)
    except BerthError as error:
        return _qemu(address, f"{why}, and {error.message}")


def start_passt(address: Address, folder: Path, why: str) -> Uplink:
    """Start passt for one VM; return when it stands. It ends when the socket is closed, by QEMU and by us.

    Raises UnsupportedError when it is not installed, CommandError when it does not start.
    """
    resolv_conf = read_text(RESOLV_CONF)
    upstream = plan.plan_upstream(resolv_conf, user=True, path=RESOLV_CONF)
    # Root's passt becomes nobody, who may not write here.
    pid_file = folder / "passt.pid" if os.geteuid() != 0 else None
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            argv = plan.passt_command(
                address, fd=theirs.fileno(), pid_file=pid_file, forward_dns=upstream.server is not None
            )
            run(argv, timeout_s=_START_S, pass_fds=[theirs.fileno()])  # it goes on in the background
        text = read_text(pid_file).strip() if pid_file else ""
        process = identify(int(text)) if text.isdecimal() else None
    except BaseException:
        ours.close()
        raise
    finally:
        if pid_file:
            pid_file.unlink(missing_ok=True)
    servers = [upstream.server] if upstream.server else plan.parse_nameservers(resolv_conf)
    exposed = () if drops_loopback(_version()) else (f"{_EXPOSED}: this passt is too old to prevent it",)
    notes = (f"{why}: {_ALONE}", *exposed)
    return Uplink(ours, plan.machine_resolv_conf(resolv_conf, servers), None, notes, process)


def drops_loopback(version: str) -> bool:
    """Say whether a passt of this version keeps guests from the host's loopback: ``passt 0.0~git20250503.587980c``."""
    match = re.search(r"(20\d\d)_?([01]\d)_?([0-3]\d)", version)
    return match is not None and int("".join(match.groups())) >= _DROPS_LOOPBACK


def _version() -> str:
    return run(["passt", "--version"], timeout_s=_START_S, success=range(256)).stdout.decode(errors="replace")


def _qemu(address: Address, why: str) -> Uplink:
    dns = resolver_address(address)
    text = plan.machine_resolv_conf(read_text(RESOLV_CONF), [dns])
    notes = (f"{why}: {_ALONE}, by QEMU and slow", f"{_EXPOSED}, and at {address.gateway}")
    return Uplink(None, text, dns, notes, None)


def resolver_address(address: Address) -> str:
    """Say where QEMU's own network answers DNS: x.y.z.255, which no machine of the subnet has."""
    first = parse_ip(address.ip) & -1 << 32 - address.prefix & 0xFFFFFFFF
    return format_ip(first | 0xFF)
