"""The cable of one VM: a TAP on the bridge, whose open descriptor QEMU gets. Layer 3; a container's is in `attach`.

The launcher calls `open_tap`. The TAP is not persistent: it goes when the last descriptor of it is closed, which is
QEMU's. Its name is the address's, so the guard of `plan.guard_rules` holds for it as for any port.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct

from berth import userns
from berth.errors import BerthError, UnsupportedError
from berth.net.addresses import Address
from berth.net.attach import detach, hang
from berth.net.network import Network

_TUN = "/dev/net/tun"
_ATTEMPTS = 3
# Source: linux/if_tun.h. VNET_HDR lets guest and host leave checksums and segmentation to each other.
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def open_tap(network: Network, address: Address) -> int:
    """Make the TAP of a VM, up and on the bridge; return its descriptor (close-on-exec), which the caller owns.

    What an earlier VM of this address left is removed first. On failure nothing is left.
    Raises UnsupportedError when this user can have no TAP (no /dev/net/tun, no iproute2): `passt` is the next best;
    BerthError for anything else.
    """
    if network.holder_pid is None:
        return _open(network.bridge, address)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = {"bridge": network.bridge, "address": address.to_json(), "channel": theirs.fileno()}
        missing = userns.call(
            "berth.net.tap:open_inside", arguments, holder=network.holder_pid, pass_fds=[theirs.fileno()], timeout_s=30
        )
        if missing is not None:
            raise UnsupportedError(str(missing), hint=f"sudo chmod 666 {_TUN}")
        return _receive(ours)


def open_inside(bridge: str, address: dict[str, object], channel: int) -> str | None:
    """Do so inside the hub, for `userns.call`, and send the descriptor over the socket `channel`.

    Returns why there can be no TAP: an error would arrive without its kind.
    """
    try:
        tap = _open(bridge, Address.from_json(address, where="open_inside"))
    except UnsupportedError as error:
        return error.message
    with socket.socket(fileno=os.dup(channel)) as sock:
        sock.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [tap]))])
    os.close(tap)
    return None


def _open(bridge: str, address: Address) -> int:
    tap = _make(address)
    try:
        hang(bridge, address)
    except BaseException:
        os.close(tap)
        raise
    return tap


def _make(address: Address) -> int:
    request = struct.pack("16sH22x", address.interface.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
    for attempt in range(1, _ATTEMPTS + 1):
        detach(address)
        tap = _open_device()
        try:
            fcntl.ioctl(tap, _TUNSETIFF, request)
            return tap
        except OSError as error:
            os.close(tap)
            # What has just ended is taken down in the kernel's own time: it was in our way.
            if error.errno not in (errno.EBUSY, errno.EEXIST, errno.EINVAL) or attempt == _ATTEMPTS:
                raise BerthError(f"the TAP {address.interface} can't be made: {error.strerror}") from error
    raise AssertionError("the last attempt returns or raises")


def _open_device() -> int:
    try:
        return os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UnsupportedError(f"{_TUN} is not there", hint="sudo modprobe tun") from error
    except OSError as error:
        raise UnsupportedError(f"{_TUN} can't be opened: {error.strerror}", hint=f"sudo chmod 666 {_TUN}") from error


def _receive(sock: socket.socket) -> int:
    fds = array.array("i")
    _data, ancillary, _flags, _sender = sock.recvmsg(
        1, socket.CMSG_SPACE(fds.itemsize), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: fds.itemsize])
    if not fds:
        raise BerthError("the hub has sent no TAP")
    return fds[0]
