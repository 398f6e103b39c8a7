"""The network namespace of an ordinary user's machines, and the process that holds it. Layer 3, used by `network` only.

A namespace lives as long as a process is in it. The holder is one; dnsmasq is another, through which the namespace is
found again when the holder was killed. When both are gone, running machines still stand in user namespaces below the
hub's: a new network namespace is then made *there*, because only its root may connect them again. A VM's TAP, which
its QEMU holds, keeps the namespace alive without any process in it; through that it is found again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Sequence

from berth import userns
from berth.agentbinary import find_agent
from berth.errors import BerthError, DeadlineError
from berth.layout import Layout
from berth.net.processes import Process, every_process, find_programs, identify, network_namespace
from berth.proc import spawn

# Source: ioctl_ns(2).
_NS_GET_USERNS = 0xB701
_NS_GET_PARENT = 0xB702
# Source: linux/sockios.h; a TAP answers with the network namespace that it was made in.
_SIOCGSKNS = 0x894C
_START_S = 5.0


def holder_command(layout: Layout) -> list[str]:
    """Say what holds the hub: the smallest part of the agent, which does nothing. Raises UnsupportedError.

    It does not read its argument: that is for `find_holders`, and for whoever looks at `ps`.
    """
    return [str(find_agent(layout)), "pause", str(layout.hub)]


def find_holders(layout: Layout) -> list[Process]:
    """Find living holders, also those that the record has lost."""
    return find_programs("berth-agent", str(layout.hub))


def start_new(command: Sequence[str], relatives: Sequence[Process]) -> Process:
    """Start a holder in a new network namespace: in the user namespace that `relatives` (machines) stand below, if any.

    Raises UnsupportedError when the user has no subordinate ids, BerthError when it does not come up.
    """
    ours = network_namespace()
    for relative in relatives:
        fd = _ancestor_namespace(relative.pid)
        if fd is not None:
            try:
                enter = ["nsenter", f"--user=/proc/self/fd/{fd}", "-S", "0", "-G", "0", "--", "unshare", "--net", "--"]
                return _start([*enter, *command], lambda found: found not in (None, ours), pass_fds=[fd])
            finally:
                os.close(fd)
    pid = userns.start_in_new(command, userns.plan_idmap(os.getuid(), os.getgid()), net=True)
    return _identify(pid, command)


def start_beside(command: Sequence[str], member: Process) -> Process:
    """Start a holder in the namespaces of `member`. Raises BerthError."""
    namespace = network_namespace(member.pid)
    return _start(userns.enter_command(member.pid, command), lambda found: found == namespace)


def start_by_tap(command: Sequence[str], vmm: Process) -> Process | None:
    """Start a holder in the network namespace whose TAP the process `vmm` holds; None when it shows none to us.

    Where Yama restricts ptrace (Ubuntu), a process shows its descriptors to its ancestors only.
    """
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        tap = _borrow_tap(vmm)
        if tap is None:
            return None
        stack.callback(os.close, tap)
        network = fcntl.ioctl(tap, _SIOCGSKNS)
        stack.callback(os.close, network)
        user = fcntl.ioctl(network, _NS_GET_USERNS)
        stack.callback(os.close, user)
        wanted = os.fstat(network).st_ino
        enter = [
            "nsenter",
            f"--user=/proc/self/fd/{user}",
            f"--net=/proc/self/fd/{network}",
            "-S",
            "0",
            "-G",
            "0",
            "--",
        ]
        return _start([*enter, *command], lambda found: found == wanted, pass_fds=[user, network])
    return None


def _borrow_tap(vmm: Process) -> int | None:
    """Duplicate the descriptor of a TAP from another process of ours. Raises OSError when that is not allowed."""
    pidfd = os.pidfd_open(vmm.pid)
    try:
        for name in os.listdir(f"/proc/{vmm.pid}/fd"):
            if os.readlink(f"/proc/{vmm.pid}/fd/{name}") == "/dev/net/tun":
                from berth import syscalls  # it brings ctypes, which root's machines have no use for here

                return syscalls.pidfd_getfd(pidfd, int(name))
        return None
    finally:
        os.close(pidfd)


def members(namespace: int | None) -> list[int]:
    """List the processes in a network namespace (its inode)."""
    if namespace is None:
        return []
    return [pid for pid in every_process() if network_namespace(pid) == namespace]


def _start(argv: Sequence[str], arrived: Callable[[int | None], bool], *, pass_fds: Sequence[int] = ()) -> Process:
    """Start a program that outlives us and wait until it stands in the right network namespace."""
    process = spawn(argv, new_session=True, pass_fds=pass_fds)
    deadline = time.monotonic() + _START_S
    # setns and unshare tell nobody: this is the one place that has to look again and again, for some 3 ms.
    while not arrived(network_namespace(process.pid)):
        if process.poll() is not None:
            raise BerthError(f"{argv[0]} could not enter the hub's namespaces (status {process.returncode})")
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise DeadlineError(f"{argv[0]} did not enter the hub's namespaces within {_START_S:g} s")
        time.sleep(0.001)
    process.returncode = 0  # it is not ours to wait for
    return _identify(process.pid, argv)


def _identify(pid: int, argv: Sequence[str]) -> Process:
    process = identify(pid)
    if process is None:
        raise BerthError(f"{argv[0]} ended at once")
    return process


def _ancestor_namespace(pid: int) -> int | None:
    """Open the uppermost user namespace above that of `pid` that is still below ours; None when there is none."""
    try:
        ours = os.stat("/proc/self/ns/user").st_ino
        fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(fd).st_ino == ours:
        os.close(fd)
        return None
    while True:
        try:
            parent = fcntl.ioctl(fd, _NS_GET_PARENT)
        except OSError:
            return fd
        if os.fstat(parent).st_ino == ours:
            os.close(parent)
            return fd
        os.close(fd)
        fd = parent
