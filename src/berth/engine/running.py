"""What both engines do alike with a machine that boots, runs and ends: its agent's socket, its keeper, its processes.

Layer 3; called by the engines only. Nothing here knows how a machine is isolated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import select
import signal
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import cast

from berth import locks
from berth.agent import AgentClient, connect
from berth.config import HostUser
from berth.engine.base import Machine
from berth.errors import BerthError, BootError, DeadlineError
from berth.layout import Layout
from berth.proc import spawn, start_time
from berth.progress import Progress

_KEEPER_S = 2.0
_LAST_LINES = 3
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\n]")  # nothing of a guest's reaches a terminal as it is


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """One process for good: a process id is used again, together with the start time it is not.

    start_time: clock ticks since boot (/proc/PID/stat, field 22).
    """

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Name the process that has this id now; None when there is none."""
        ticks = start_time(pid)
        return None if ticks is None else cls(pid, ticks)

    @classmethod
    def from_json(cls, document: object) -> Process | None:
        """Read what `to_json` made; None for anything else."""
        match document:
            case {"pid": int(pid), "startTime": int(ticks)}:
                return cls(pid, ticks)
            case _:
                return None

    def to_json(self) -> dict[str, int]:
        return {"pid": self.pid, "startTime": self.start_time}

    def is_alive(self) -> bool:
        return start_time(self.pid) == self.start_time

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait for its end; say whether it came."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            # Only now is the descriptor known to be of our process and not of a later one with its id.
            if not self.is_alive():
                return True
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            deadline = time.monotonic() + timeout_s
            return bool(poller.poll(max(0, deadline - time.monotonic()) * 1000)) or not self.is_alive()
        finally:
            os.close(pidfd)

    def kill(self, timeout_s: float) -> bool:
        """End it at once; say whether it has gone. Idempotent."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return self.wait_gone(timeout_s)


@contextlib.contextmanager
def listening(path: Path, *, keep: bool = False) -> Generator[socket.socket]:
    """Listen on a fresh unix socket at `path` (0600); removed at the end unless `keep`.

    Whoever gets the descriptor finds the connects queued that came before it, so nobody has to poll.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.bind(str(path))
        except OSError as error:  # it does not say what can't be made: a full disk, a read-only one
            raise type(error)(error.errno, error.strerror, str(path)) from error
        try:
            path.chmod(0o600)
            sock.listen(128)
            yield sock
        finally:
            if not keep:
                path.unlink(missing_ok=True)


def answers(path: Path) -> bool:
    """Say whether somebody listens at a unix socket."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(2)
            sock.connect(str(path))
    except OSError:
        return False
    return True


def await_agent(machine: Machine, progress: Progress, timeout_s: float) -> None:
    """Wait until the machine's agent answers.

    Raises DeadlineError when it takes too long, BootError with the console's last words when the machine ended.
    """
    progress.step(f"booting {machine.config.name}")
    path = machine.bundle.layout.agent_socket(machine.config.name)
    try:
        with AgentClient(connect(path, timeout_s=timeout_s), timeout_s=timeout_s) as client:
            client.status()
    except DeadlineError:
        raise
    except (OSError, BerthError) as error:
        raise boot_error(machine, str(error)) from error


def boot_error(machine: Machine, reason: str) -> BootError:
    """Make the error of a boot that failed: the console's last words, or else the reason."""
    return BootError(
        f"machine '{machine.config.name}' did not boot: {last_words(machine) or reason}",
        hint=f"berth logs --boot {machine.config.name}",
    )


def last_words(machine: Machine) -> str:
    """Return the last lines of the console, in one: where an init says why it gave up."""
    try:
        text = machine.bundle.console_log.read_bytes()[-4096:].decode(errors="replace")
    except OSError:
        return ""
    this_boot = ESCAPES.sub("", text.rpartition("-- boot ")[2].partition("\n")[2])
    return "; ".join([line.strip()[:200] for line in this_boot.splitlines() if line.strip()][-_LAST_LINES:])


def make_covers(sources: Mapping[Path, bool]) -> None:
    """Make what stands in the machine where a credential is hidden (path → is it a folder), as the user's own."""
    for source, directory in sources.items():
        if directory:
            source.mkdir(mode=0o700, exist_ok=True)
        else:
            source.touch(mode=0o600)


def start_keeper(machine: Machine, agent: Path, words: Sequence[str], *, pass_fds: Sequence[int] = ()) -> None:
    """Start the machine's keeper, which outlives us. words: what of its command line is the engine's own."""
    bundle, loopback = machine.bundle, machine.address.loopback
    bundle.logs.mkdir(mode=0o700, exist_ok=True)
    live = bundle.layout.live(bundle.name)
    argv = [str(agent), "keeper", "--dir", str(live), "--log", str(bundle.console_log), *words]
    if os.geteuid() != 0 and loopback:
        argv += ["--forward", loopback]
    keeper = spawn(argv, pass_fds=pass_fds, new_session=True)
    keeper.returncode = 0  # not ours to wait for


def keeper_pid(layout: Layout, machine: Machine) -> int | None:
    """Return the process id of the machine's keeper, None when there is none."""
    path = layout.live(machine.config.name) / "keeper.lock"
    if not locks.is_held(path):
        return None
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def end_keeper(layout: Layout, machine: Machine) -> None:
    """Wait for the keeper to write the console's last lines and go; one that stays is of a start that failed."""
    pid = keeper_pid(layout, machine)
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            for number in (None, signal.SIGTERM, signal.SIGKILL):
                if keeper_pid(layout, machine) != pid:  # the descriptor may be of a later process
                    return
                if number is not None:
                    signal.pidfd_send_signal(pidfd, number)
                if select.select([pidfd], [], [], _KEEPER_S)[0]:
                    return
        finally:
            os.close(pidfd)


def boot_document(machine: Machine, *, nameserver_text: str, init: Sequence[str]) -> dict[str, object]:
    """Say what the guest agent needs to know before the init runs. Source: docs/protocol.md, "The boot document".

    init: the argv of the image's init; none makes the agent the init.
    """
    config, boot = machine.config, machine.boot
    user: HostUser = config.user
    twin = {
        "name": user.name, "uid": user.uid, "gid": user.gid, "group": user.group, "home": user.home,
        "shell": user.shell, "homeIsOwn": boot.home_mount == "none",
    }  # fmt: skip
    return {
        "schema": 1,
        "instance": config.id,
        "hostname": config.name,
        "hosts": _hosts(config.name, machine.address.ip),
        "resolv": nameserver_text,
        "twin": twin if machine.has_twin else None,
        "sshAgent": boot.ssh_agent,
        "env": list(boot.env),
        "init": list(init),
    }


def text(value: object) -> str | None:
    """Read a text from a document; None for anything else."""
    return value if isinstance(value, str) else None


def texts(value: object) -> tuple[str, ...]:
    """Read a list of texts from a document; nothing for anything else."""
    return tuple(str(item) for item in cast("list[object]", value)) if isinstance(value, list) else ()


def _hosts(name: str, ip: str) -> str:
    return (
        "127.0.0.1 localhost\n"
        f"{ip} {name}\n"
        "::1 localhost ip6-localhost ip6-loopback\n"
        "ff02::1 ip6-allnodes\n"
        "ff02::2 ip6-allrouters\n"
    )
