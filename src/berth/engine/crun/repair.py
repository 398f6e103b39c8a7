"""Start a new guest agent in a container whose agent was killed. Runs through `berth.inside` only."""

from __future__ import annotations

import errno
import fcntl
import os
import time

from berth import inside, syscalls
from berth.engine.crun.spec import AGENT_FD
from berth.errors import BerthError

# The user namespace first: it gives the right to enter the others.
_SPACES = ("user", "mnt", "net", "uts", "ipc", "cgroup", "pid")
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def restart_agent(pid: int, listener: int, agent: str) -> None:
    """Enter the container of `pid` as its root and leave `agent serve` there with `listener` as descriptor 3.

    What is run is a copy of the host's binary in memory: nothing of the guest's files is trusted or followed, and
    nothing of the host's can be reached, or written to, by a link like /proc/PID/exe in there (CVE-2019-5736).
    Raises BerthError when it can't be executed in there.
    """
    program = _high(_sealed(agent))
    socket = _high(listener)
    for name, fd in [(name, os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)) for name in _SPACES]:
        syscalls.setns(fd, 0)
        os.close(fd)
        if name == "user":
            inside.become_root()
            syscalls.leave_session_keyring()  # crun has done so for all that it started
    told, low = os.pipe()
    tell = _high(low)
    os.close(low)
    if os.fork() == 0:  # the first that is in the process namespace; its child becomes the init's, as the first agent
        if os.fork() == 0:
            _become_agent(program, socket, tell)
        os._exit(0)
    os.wait()
    os.close(tell)
    failure = os.read(told, 1000)  # the end of it: the exec has closed the other side
    if failure:
        raise BerthError(f"a new guest agent can't be started: {failure.decode(errors='replace')}")


def _sealed(path: str) -> int:
    """Copy a program into memory that can't be changed any more; return its descriptor. Source: memfd_create(2)."""
    copy = os.memfd_create("berth-agent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(path, "rb") as file:
        while os.sendfile(copy, file.fileno(), None, 1 << 30):
            pass
    os.fchmod(copy, 0o555)
    _seal(copy)
    return copy


def _seal(fd: int) -> None:
    # On a busy host the kernel may hold on to pages just written for a moment: EBUSY. Source: F_SEAL_WRITE in fcntl(2).
    for pause in (0.01, 0.1, 0.5, None):
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            if error.errno != errno.EBUSY or pause is None:
                raise
            time.sleep(pause)
        else:
            return


def _become_agent(program: int, socket: int, tell: int) -> None:
    try:
        os.setsid()
        os.chdir("/")
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.dup2(socket, AGENT_FD)
        os.execve(program, ["agent", "serve"], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})  # noqa: S606
    except OSError as error:
        os.write(tell, str(error).encode())
    finally:
        os._exit(1)


def _high(fd: int) -> int:
    """Move a descriptor out of the way of those that the agent gets."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)
