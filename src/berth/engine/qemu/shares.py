"""The folders of the host that a VM sees: what is shared and what is hidden in it (a plan), and starting its servers.

One virtiofsd for each folder. It belongs to the VM: it ends when QEMU's connection to it does. The launcher calls
`plan_shares`, `start_shares`, and hands the sockets to QEMU (vhost-user).

As an ordinary user it runs as root of a keep-id user namespace: the guest's uid N is the host's uid N for the user's
own, the guest's root is the first subordinate id. As root ids pass 1:1: host root's files are the machine root's.
9p, the older way, is not offered: QEMU itself would open the files, outside of the namespace that hides credentials.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from berth import userns
from berth.engine.base import Machine
from berth.engine.common import Shared, cover_path, plan_covers, plan_shared
from berth.engine.qemu.sharing import SHARED, CoverPlan, SharePlan
from berth.engine.qemu.virtiofsd import Virtiofsd, require_virtiofsd, virtiofsd_command
from berth.engine.running import Process, make_covers
from berth.errors import BerthError, DeadlineError

_ANSWER_S = 10.0
_KILL_S = 2.0
_LOG_SIZE = 16384  # bytes that a server may ever say: a guest may make it complain without end
# Source: QEMU, docs/interop/vhost-user.rst: request 1 is VHOST_USER_GET_FEATURES; flags: version 1, bit 2 a reply;
# then the payload's size. In host byte order.
_GET_FEATURES = struct.pack("=III", 1, 1, 0)
_FEATURES = struct.Struct("=IIIQ")  # the answer: a header and 64 bits
# Linux 3.17: fcntl.h has these, Python 3.11 has not all.
_F_ADD_SEALS = 1033
_F_SEAL_SHRINK, _F_SEAL_GROW = 2, 4


@dataclasses.dataclass(frozen=True, slots=True)
class Cover:
    """What the machine finds at `path` of a share (relative, without links) in place of what the host has there."""

    path: str
    source: str
    directory: bool
    read_only: bool


@dataclasses.dataclass(frozen=True, slots=True)
class ShareSpec:
    """One folder of the host in a VM. tag: its name on the virtio bus. file: the one file of it, when it is no folder.

    covers: in mounting order; the first of them may be other folders that the machine mounts further inside.
    """

    tag: str
    source: str
    target: str
    read_only: bool
    file: str | None = None
    covers: tuple[Cover, ...] = ()

    def to_document(self) -> dict[str, object]:
        """Say it as the boot document does. Source: docs/protocol.md, `mounts`."""
        return {
            "tag": self.tag, "target": self.target, "type": "virtiofs", "readOnly": self.read_only, "file": self.file,
        }  # fmt: skip

    def to_plan(self) -> SharePlan:
        """Say it as `sharing` reads it."""
        covers = [CoverPlan(**dataclasses.asdict(cover)) for cover in self.covers]  # type: ignore[typeddict-item]
        return SharePlan(source=self.source, file=self.file, read_only=self.read_only, covers=covers)


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """A running folder server. socket: connected, for QEMU's chardev; who closes every copy of it ends the server."""

    spec: ShareSpec
    socket: socket.socket
    process: Process


def plan_shares(machine: Machine) -> tuple[ShareSpec, ...]:
    """Say what the machine sees of the host: its home, then every mount, outer before inner.

    Reads the host's file system (what exists, where links lead), changes nothing.
    """
    shared = plan_shared(machine)
    hidden = [_hidden(machine, one) for one in shared]
    return tuple(
        ShareSpec(
            tag=f"share{index}",
            source=one.source,
            target=one.target,
            read_only=one.read_only,
            file=None if one.directory else os.path.basename(one.target),
            covers=(*_inner_mounts(one, shared), *hidden[index], *_inner_covers(one, shared, hidden)),
        )
        for index, one in enumerate(shared)
    )


def _hidden(machine: Machine, shared: Shared) -> tuple[Cover, ...]:
    """Cover what is hidden in one folder, for itself: a guest's root can unmount what is mounted over it in there."""
    return tuple(
        Cover(
            path=os.path.relpath(hidden.path, shared.target),
            source=str(cover_path(machine.bundle.vm_private, hidden)),
            directory=hidden.directory,
            read_only=not hidden.directory,
        )
        for hidden in plan_covers(machine, [shared])
    )


def _inner_mounts(outer: Shared, shared: Sequence[Shared]) -> list[Cover]:
    """Show what the machine mounts inside `outer` on the host's side as well: else it could look below it there.

    What is not there on the host is the guest's to make; nothing is below it.
    """
    return [
        Cover(place, inner.source, directory=inner.directory, read_only=inner.read_only)
        for inner in shared
        if (place := _place(outer, inner)) is not None
    ]


def _inner_covers(outer: Shared, shared: Sequence[Shared], hidden: Sequence[tuple[Cover, ...]]) -> list[Cover]:
    return [
        dataclasses.replace(cover, path=os.path.join(place, cover.path))
        for inner, covers in zip(shared, hidden, strict=True)
        if (place := _place(outer, inner)) is not None
        for cover in covers
    ]


def _place(outer: Shared, inner: Shared) -> str | None:
    """Say where below `outer` the machine mounts `inner`, as the host has that place; None when it does not."""
    if not outer.directory or not inner.target.startswith(outer.target.rstrip("/") + "/"):
        return None
    top = os.path.realpath(outer.source)
    real = os.path.realpath(os.path.join(top, os.path.relpath(inner.target, outer.target)))
    is_kind = os.path.isdir(real) if inner.directory else os.path.isfile(real)
    return os.path.relpath(real, top) if is_kind and real.startswith(top.rstrip("/") + "/") else None


def start_shares(specs: Sequence[ShareSpec], folder: Path, private: Path) -> list[Server]:
    """Start a server for each share; return when all of them answer. On failure none of them is left.

    folder: the machine's runtime directory, for a socket's name of some microseconds. private: the bundle's folder
    with what stands in place of the hidden; what is missing in it is made. Raises BerthError in words,
    UnsupportedError when virtiofsd is not installed or, for an ordinary user, when there are no subordinate ids.
    """
    if not specs:
        return []
    daemon = require_virtiofsd()
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    covers = {Path(cover.source): cover.directory for spec in specs for cover in spec.covers}
    make_covers({path: directory for path, directory in covers.items() if path.parent == private})
    idmap = None if os.geteuid() == 0 else userns.plan_idmap(os.getuid(), os.getgid())
    servers: list[Server] = []
    try:
        for spec in specs:
            servers.append(start_share(spec, daemon, folder, idmap))  # noqa: PERF401 (those made so far must be ended)
    except BaseException:
        for server in servers:
            server.socket.close()
            server.process.kill(_KILL_S)
        raise
    return servers


def start_share(spec: ShareSpec, daemon: Virtiofsd, folder: Path, idmap: userns.IdMap | None) -> Server:
    """Start the server of one share; return when it answers. It ends when the returned socket is closed everywhere."""
    listener, connection = _connected_pair(folder / f"{spec.tag}.sock")
    with listener, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(connection))
        log = _bounded_file(_LOG_SIZE)
        stack.callback(os.close, log)
        argv = virtiofsd_command(daemon, shared=SHARED, listener=listener.fileno(), read_only=spec.read_only)
        arguments: Mapping[str, object] = {"share": spec.to_plan(), "argv": argv}
        pid = userns.start_prepared(
            "berth.engine.qemu.sharing:prepare", arguments, idmap=idmap, pass_fds=[listener.fileno()], log_fd=log
        )
        process = Process.of(pid) or Process(pid, 0)  # one that has gone already does not answer
        _await_answer(connection, spec, process, log)
        return Server(spec, connection.dup(), process)


def _connected_pair(path: Path) -> tuple[socket.socket, socket.socket]:
    """Make a listening unix socket and the one connection that waits in its queue; nobody else can find it then."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        try:
            path.chmod(0o600)
            listener.listen(1)
            connection.connect(str(path))
        finally:
            path.unlink()
    except BaseException:
        listener.close()
        connection.close()
        raise
    return listener, connection


def _bounded_file(size: int) -> int:
    """Make a file in memory that can't grow: writing beyond it fails, and harms neither the writer nor the host."""
    fd = os.memfd_create("berth-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
    return fd


def _await_answer(connection: socket.socket, spec: ShareSpec, process: Process, log: int) -> None:
    """Ask the server for its features, as QEMU will: only an answer says that it serves. Raises BerthError."""
    connection.settimeout(_ANSWER_S)
    try:
        connection.sendall(_GET_FEATURES)
        answered = _receive(connection, _FEATURES.size)
    except TimeoutError:
        process.kill(_KILL_S)
        raise DeadlineError(f"virtiofsd did not answer for {spec.source} within {_ANSWER_S:g} s") from None
    except OSError:
        answered = False
    if not answered:
        process.wait_gone(_KILL_S)  # it has hung up: it is about to end, with its reasons said
        process.kill(_KILL_S)
        raise BerthError(f"{spec.source} can't be shared with the machine: {_said(log) or 'virtiofsd ended at once'}")
    connection.settimeout(None)


def _receive(connection: socket.socket, size: int) -> bool:
    """Receive and drop so many bytes, which may come in parts; say whether they came."""
    while size:
        data = connection.recv(size)
        if not data:
            return False
        size -= len(data)
    return True


def _said(log: int) -> str:
    """Return the last line that a server has said."""
    text = os.pread(log, _LOG_SIZE, 0).rstrip(b"\0").decode(errors="replace")
    lines = ["".join(letter for letter in line if letter.isprintable()) for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
