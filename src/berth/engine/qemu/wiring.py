"""The network interface of one VM: the best that this host and user can have. Called by `launch` only.

A TAP on the bridge that all machines share; where there can be none, passt; where that is missing, QEMU's own network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator
from pathlib import Path

from berth.engine.base import Machine
from berth.engine.qemu.plan import Nic, UserNetwork
from berth.errors import UnsupportedError
from berth.net import addresses
from berth.net.network import ensure, publish
from berth.net.passt import open_uplink
from berth.net.tap import open_tap

_TUN = "/dev/net/tun"


@dataclasses.dataclass(frozen=True, slots=True)
class Wire:
    """How a VM hangs on the network. resolv_conf: the machine's. notes, offline: as `Network` has them."""

    nic: Nic
    resolv_conf: str
    notes: tuple[str, ...]
    offline: str | None = None


@contextlib.contextmanager
def wired(machine: Machine, folder: Path) -> Generator[Wire]:
    """Have the interface's descriptor open for a block, in which QEMU is started.

    folder: the machine's runtime directory. Raises BerthError when the bridge, which could be, can't be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            wire = _bridged(machine, stack)
        except UnsupportedError as error:
            wire = _alone(machine, folder, error.message, stack)
        yield wire


def _bridged(machine: Machine, stack: contextlib.ExitStack) -> Wire:
    if not os.access(_TUN, os.R_OK | os.W_OK):
        # Before the hub is made for nothing.
        raise UnsupportedError(f"{_TUN} can't be opened")
    layout, address = machine.bundle.layout, machine.address
    network = ensure(layout)
    tap = open_tap(network, address)
    stack.callback(os.close, tap)
    publish(layout, machine.config.name, address)
    return Wire(Nic(address.mac, "tap", tap), network.resolv_conf, network.notes, network.offline)


def _alone(machine: Machine, folder: Path, why: str, stack: contextlib.ExitStack) -> Wire:
    address = machine.address
    uplink = open_uplink(address, folder, why)
    if uplink.socket is not None:
        stack.callback(uplink.socket.close)
        nic = Nic(address.mac, "stream", uplink.socket.fileno())
    else:
        subnet = str(addresses.subnet(machine.bundle.layout))
        user = UserNetwork(subnet, address.gateway, uplink.dns or address.gateway)
        nic = Nic(address.mac, "user", None, user)
    return Wire(nic, uplink.resolv_conf, uplink.notes)
