"""The cable of one machine: a veth pair from the bridge to its eth0, or a VM's TAP (made by `tap`). Layer 3.

The launcher of a machine calls `attach` where it already is in the right namespaces: root in the host's, a user's
as root of the hub (`berth.userns.call` with the hub's holder). Nothing is recorded here: `network.publish` does that.
"""

from __future__ import annotations

import contextlib
import socket

from berth.errors import BerthError, CommandError
from berth.net import plan
from berth.net.addresses import Address
from berth.proc import run

_DEADLINE_S = 10.0
_ATTEMPTS = 3


def attach(bridge: str, address: Address, pid: int) -> None:
    """Hang the network namespace of `pid` on `bridge`: eth0 with its MAC, address, default route, up; lo up.

    Idempotent: what an earlier cable of this address left is removed first. On failure nothing is left.
    Raises CommandError.
    """
    try:
        _connect(bridge, address, pid)
        # As root of the machine's owner namespace or of one above it: setns needs no more.
        run(["nsenter", "-t", str(pid), "-n", "--", "ip", "-batch", "-"],
            input=plan.guest_batch(address).encode(), timeout_s=_DEADLINE_S)  # fmt: skip
    except BaseException:
        detach(address)
        raise


def detach(address: Address) -> None:
    """Remove a machine's cable, both ends; idempotent. A machine's end takes it along by itself, a little later."""
    if _exists(address.interface):
        with contextlib.suppress(BerthError):
            run(["ip", "link", "delete", "dev", address.interface], timeout_s=_DEADLINE_S)


def attach_inside(bridge: str, address: dict[str, object], pid: int) -> None:
    """`attach` with arguments as JSON has them, for `userns.call`."""
    attach(bridge, Address.from_json(address, where="attach_inside"), pid)


def hang(bridge: str, address: Address) -> None:
    """Hang a VM's TAP, which is there, on the bridge; idempotent. Raises CommandError."""
    run(["ip", "-batch", "-"], input=plan.tap_batch(bridge, address).encode(), timeout_s=_DEADLINE_S)


def hang_inside(bridge: str, address: dict[str, object]) -> None:
    """`hang` with arguments as JSON has them, for `userns.call`."""
    hang(bridge, Address.from_json(address, where="hang_inside"))


def _connect(bridge: str, address: Address, pid: int) -> None:
    batch = plan.port_batch(bridge, address, pid).encode()
    for attempt in range(1, _ATTEMPTS + 1):
        detach(address)
        try:
            run(["ip", "-batch", "-"], input=batch, timeout_s=_DEADLINE_S)
            return
        except CommandError:
            # The kernel removes the cable of a machine that has just ended in its own time: it was in our way.
            if attempt == _ATTEMPTS:
                raise


def _exists(interface: str) -> bool:
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True
