"""The container engine: machines that share the host's kernel, each in a user namespace of its own, run by crun.

Implements `engine.base.Engine`. What is true while a machine runs stands in the runtime directory (`container.json`:
process id *and* start time, so that a process id used again fools nobody) and is checked against /proc each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import cast

from berth import files, locks, userns
from berth.agent import AgentClient, connect
from berth.agentbinary import find_agent
from berth.engine.base import STOPPED, Liveness, Machine
from berth.engine.crun import cgroups, storage
from berth.engine.crun.plan import boot_document, container_id, plan_launch
from berth.errors import BerthError, BootError, BusyError, DeadlineError, StateFormatError
from berth.layout import Layout
from berth.log import log
from berth.names import MachineName
from berth.net.network import Network, ensure, publish, withdraw
from berth.proc import require_program, spawn, start_time
from berth.progress import Progress
from berth.units import utc_now

_READY_S = 60.0
_KILL_S = 10.0
_KEEPER_S = 2.0
_SCHEMA = 1
_LAST_LINES = 3
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\n]")  # nothing of a guest's reaches a terminal as it is
_INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
_INOTIFY_ENOUGH = 1024  # an init with its services takes about ten; all machines of root count as root's
_NO_SERVICES = (
    "no services: systemd needs a cgroup that this user may write, and this host delegates none (berth system check)"
)
# What is in a machine's runtime directory only while it runs.
_TRANSIENT = (
    "container.json", "agent.sock", "console.sock", "ports.json", "bundle/config.json", "bundle/init.pid",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Record:
    """container.json: the running container as it was when it started."""

    pid: int
    start_time: int  # clock ticks since boot: /proc/PID/stat, field 22
    started: str
    cgroups: tuple[str, ...]
    limits: tuple[str, ...]

    def is_alive(self) -> bool:
        return start_time(self.pid) == self.start_time


class ContainerEngine:
    """See `engine.base.Engine` for what each method promises."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._root = os.geteuid() == 0

    # Templates ----------------------------------------------------------------------------------------------------

    def has_template(self, digest: str) -> bool:
        return (self._layout.template(digest) / "template.json").exists()

    def make_template(self, digest: str, layers: Sequence[tuple[int, str]], progress: Progress) -> None:
        """Unpack in a user namespace, as root too: whatever a layer holds, nothing of it can have the host's rights."""
        template = self._layout.template(digest)
        files.make_private_directory(self._layout.data)
        files.make_private_directory(self._layout.templates)
        with locks.hold(self._layout.templates / "templates.lock", timeout_s=3600, what="the image"):
            self._sweep_templates()
            if self.has_template(digest):
                return
            partial = template.with_name(f"{template.name}.partial")
            idmap = userns.plan_idmap(os.getuid(), os.getgid())
            try:
                self._unpack(partial, layers, idmap, progress)
                files.save_json(partial / "template.json", {"digest": digest}, schema=_SCHEMA)
                partial.rename(template)
            except BaseException:
                self.delete_tree(str(partial))
                raise
            files.sync_directory(self._layout.templates)

    def _unpack(
        self, partial: Path, layers: Sequence[tuple[int, str]], idmap: userns.IdMap, progress: Progress
    ) -> None:
        rootfs = partial / "rootfs"
        # The folder above stays closed to the host's other users: what is setuid inside must not be reachable.
        rootfs.mkdir(parents=True)
        partial.chmod(0o711)
        target = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if self._root:
                os.fchown(target, idmap.host_root(), idmap.host_root())
            report = userns.call(
                "berth.oci.unpack:unpack_inside",
                {"target_fd": target, "layers": [list(layer) for layer in layers], "devices": "skip"},
                idmap=idmap,
                pass_fds=[target, *(fd for fd, _ in layers)],
                progress=progress.advance,
            )
            log.debug("unpacked: %s", report)
        finally:
            os.close(target)

    def _sweep_templates(self) -> None:
        """Remove templates that were never finished; the lock is held, so nobody makes one now."""
        for path in self._layout.templates.glob("*.partial"):
            self.delete_tree(str(path))

    # One machine's life -------------------------------------------------------------------------------------------

    def start(self, machine: Machine, progress: Progress) -> None:
        require_program("crun", package="crun")
        idmap = userns.plan_idmap(os.getuid(), os.getgid())
        limits = cgroups.Limits(machine.boot.cpus, machine.boot.memory)
        placement = cgroups.find_placement(machine.config.id, limits)
        if placement.directory is None and self._runs_systemd(machine):
            placement = dataclasses.replace(placement, missing=(*placement.missing, _NO_SERVICES))
        if self._root:
            _allow_many_inits()
        self.kill(machine)  # what a start left that was killed halfway
        self.clean(machine)
        network = ensure(self._layout)
        for note in (*network.notes, *placement.missing):
            log.debug("%s: %s", machine.config.name, note)
        live = self._layout.live(machine.config.name)
        files.make_private_directory(self._layout.runtime)
        files.make_private_directory(live.parent)
        files.make_private_directory(live)
        for folder in ("rootfs", "bundle"):
            (live / folder).mkdir(exist_ok=True)
        agent = find_agent(self._layout)
        with self._listener(machine) as listener, _bound(live / "console.sock") as console:
            publish(self._layout, machine.config.name, machine.address)
            self._start_keeper(machine, agent, console=console.fileno())
            try:
                self._launch(machine, agent, idmap, placement, network, listener)
                self._await_agent(machine, progress)
            except BaseException:
                self.kill(machine)
                self.clean(machine)
                raise

    def _runs_systemd(self, machine: Machine) -> bool:
        """Look where the image's /sbin/init leads (the machine's own layer is its users' business)."""
        rootfs = self._layout.template(machine.config.image_digest) / "rootfs"
        for folder in ("sbin", "usr/sbin"):
            with contextlib.suppress(OSError):
                return "systemd" in os.readlink(rootfs / folder / "init")
        return False

    @contextlib.contextmanager
    def _listener(self, machine: Machine) -> Generator[socket.socket]:
        """Bind the agent's socket: connects queue in it until the agent answers, so nobody has to poll."""
        with _bound(self._layout.agent_socket(machine.config.name), keep=True) as sock:
            yield sock

    def _start_keeper(
        self, machine: Machine, agent: Path, *, console: int | None = None, pid: int | None = None
    ) -> None:
        live = self._layout.live(machine.config.name)
        machine.bundle.logs.mkdir(mode=0o700, exist_ok=True)
        argv = [str(agent), "keeper", "--dir", str(live), "--log", str(machine.bundle.console_log)]
        if console is not None:
            argv += ["--console-fd", str(console)]
        if pid is not None:
            argv += ["--pid", str(pid)]
        if not self._root and machine.address.loopback:
            argv += ["--forward", machine.address.loopback]
        keeper = spawn(argv, pass_fds=[] if console is None else [console], new_session=True)
        keeper.returncode = 0  # it outlives us; not ours to wait for

    def _launch(
        self,
        machine: Machine,
        agent: Path,
        idmap: userns.IdMap,
        placement: cgroups.Placement,
        network: Network,
        listener: socket.socket,
    ) -> None:
        # The agent itself is a small init where the image's own can't run.
        init = [] if _NO_SERVICES in placement.missing else ["/sbin/init"]
        document = boot_document(machine, nameserver_text=network.resolv_conf, init=init)
        plan = plan_launch(
            machine, agent=agent, holder=network.holder_pid, idmap=idmap, placement=placement,
            boot_document=json.dumps(document), bounding_set=_bounding_set(),
        )  # fmt: skip
        self._make_private(plan["binds"])
        files.make_private_directory(self._layout.crun)
        answer = userns.call(
            "berth.engine.crun.launch:launch",
            {
                "plan": plan, "listener": listener.fileno(),
                "bridge": network.bridge, "address": machine.address.to_json(),
            },
            prefix=placement.prefix,
            pass_fds=[listener.fileno()],
        )  # fmt: skip
        match answer:
            case {"pid": int(pid), "startTime": int(ticks)}:
                made = cast("dict[str, object]", answer)["cgroups"]
                record = {
                    "pid": pid, "startTime": ticks, "started": utc_now(),
                    "cgroups": list(_texts(made)), "limits": [*placement.missing, *network.notes],
                }  # fmt: skip
                files.save_json(self._record_path(machine), record, schema=_SCHEMA)
                publish(self._layout, machine.config.name, machine.address, pid)
            case _:
                raise BerthError(f"unexpected answer from the launcher: {answer!r:.200}")

    def _make_private(self, binds: Sequence[Mapping[str, object]]) -> None:
        """Make what stands in the machine where a credential is hidden, as the user whose it will be."""
        for bind in binds:
            source = Path(str(bind["source"]))
            if source.parent.name != "private":
                continue
            if bind["directory"]:
                source.mkdir(mode=0o700, exist_ok=True)
            else:
                source.touch(mode=0o600)

    def _await_agent(self, machine: Machine, progress: Progress) -> None:
        progress.step(f"booting {machine.config.name}")
        path = self._layout.agent_socket(machine.config.name)
        try:
            with AgentClient(connect(path, timeout_s=_READY_S), timeout_s=_READY_S) as client:
                client.status()
        except (OSError, BerthError) as error:
            raise BootError(
                f"machine '{machine.config.name}' did not boot: {self._last_words(machine) or error}",
                hint=f"berth logs --boot {machine.config.name}",
            ) from error

    def _last_words(self, machine: Machine) -> str:
        """Return the last lines of the console, in one: where an init says why it gave up."""
        try:
            text = machine.bundle.console_log.read_bytes()[-4096:].decode(errors="replace")
        except OSError:
            return ""
        this_boot = _ESCAPES.sub("", text.rpartition("-- boot ")[2].partition("\n")[2])
        return "; ".join([line.strip()[:200] for line in this_boot.splitlines() if line.strip()][-_LAST_LINES:])

    # Looking ------------------------------------------------------------------------------------------------------

    def find(self, machine: Machine) -> Liveness:
        record = self._load_record(machine)
        if record is None or not record.is_alive():
            return STOPPED
        answers = _answers(self._layout.agent_socket(machine.config.name))
        return Liveness(
            "running" if answers else "broken",
            init_pid=record.pid,
            keeper_pid=self._keeper_pid(machine),
            started=record.started,
            limits=record.limits,
        )

    def _record_path(self, machine: Machine) -> Path:
        return self._layout.live(machine.config.name) / "container.json"

    def _load_record(self, machine: Machine) -> _Record | None:
        return self._read_record(self._record_path(machine))

    def _read_record(self, path: Path) -> _Record | None:
        try:
            document = files.load_json(path, schema=_SCHEMA)
        except (FileNotFoundError, NotADirectoryError):
            return None
        match document:
            case {"pid": int(pid), "startTime": int(ticks), "started": str(started)}:
                made, limits = document.get("cgroups"), document.get("limits")
                return _Record(pid, ticks, started, _texts(made), _texts(limits))
            case _:
                raise StateFormatError(f"{path} is damaged: it has no process")

    def _keeper_pid(self, machine: Machine) -> int | None:
        path = self._layout.live(machine.config.name) / "keeper.lock"
        if not locks.is_held(path):
            return None
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text())
        return None

    def repair(self, machine: Machine) -> None:
        record = self._load_record(machine)
        if record is None or not record.is_alive():
            return
        name = machine.config.name
        if not _answers(self._layout.agent_socket(name)):
            log.debug("the agent of machine '%s' is gone: starting a new one", name)
            self._restart_agent(machine, record)
        if not locks.is_held(self._layout.live(name) / "keeper.lock"):
            log.debug("the keeper of machine '%s' is gone: starting a new one", name)
            ensure(self._layout)
            self._start_keeper(machine, find_agent(self._layout), pid=record.pid)

    def _restart_agent(self, machine: Machine, record: _Record) -> None:
        """Start `agent serve` in the living container, from our own copy of the binary, with a new socket."""
        with self._listener(machine) as listener:
            userns.call(
                "berth.engine.crun.repair:restart_agent",
                {"pid": record.pid, "listener": listener.fileno(), "agent": str(find_agent(self._layout))},
                pass_fds=[listener.fileno()],
            )
            path = self._layout.agent_socket(machine.config.name)
            with AgentClient(connect(path, timeout_s=_KILL_S), timeout_s=_KILL_S) as client:
                client.status()

    # Ending -------------------------------------------------------------------------------------------------------

    def wait_stopped(self, machine: Machine, timeout_s: float) -> bool:
        record = self._load_record(machine)
        return record is None or _wait_gone(record, timeout_s)

    def kill(self, machine: Machine) -> None:
        # Our record, and crun's own: a launcher may have been killed between the two.
        for record in (self._load_record(machine), self._orphan(machine)):
            if record is not None and record.is_alive():
                # The owner of the namespace may signal its processes; killing process 1 ends all of them.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record.pid, signal.SIGKILL)
                if not _wait_gone(record, _KILL_S):
                    raise DeadlineError(f"machine '{machine.config.name}' can't be killed (process {record.pid})")
        # The second wall: whatever still runs in a cgroup of the machine's.
        cgroups.kill_all(cgroups.find_leftovers(machine.config.id))

    def end_stray(self, name: MachineName) -> None:
        """End what runs under the name of a machine whose bundle can't be read any more."""
        record = self._read_record(self._layout.live(name) / "container.json")
        if record is not None and record.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGKILL)
            _wait_gone(record, _KILL_S)
        if record is not None and record.cgroups:
            self._inside("sweep", {"state": "", "directories": list(record.cgroups)})
        withdraw(self._layout, name)
        shutil.rmtree(self._layout.live(name), ignore_errors=True)

    def _orphan(self, machine: Machine) -> _Record | None:
        state = self._layout.crun / container_id(machine)
        if not state.exists():
            return None
        match self._inside("read_container", {"state": str(state)}):
            case {"pid": int(pid), "startTime": int(ticks)}:
                return _Record(pid, ticks, "", (), ())
            case _:
                return None

    def clean(self, machine: Machine) -> None:
        name = machine.config.name
        record = self._load_record(machine)
        if record is not None and record.is_alive():
            raise BusyError(f"machine '{name}' still runs")
        self._end_keeper(machine)
        live = self._layout.live(name)
        made = () if record is None else record.cgroups
        self._sweep(machine, [*made, *cgroups.find_leftovers(machine.config.id)])
        withdraw(self._layout, name)
        for entry in _TRANSIENT:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (live / entry).unlink()
        for folder in ("bundle", "rootfs"):
            with contextlib.suppress(OSError):
                (live / folder).rmdir()

    def _end_keeper(self, machine: Machine) -> None:
        """Wait for the keeper to write the console's last lines and go; one that stays is of a start that failed."""
        pid = self._keeper_pid(machine)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                for number in (None, signal.SIGTERM, signal.SIGKILL):
                    if self._keeper_pid(machine) != pid:  # the descriptor may be of a later process
                        return
                    if number is not None:
                        signal.pidfd_send_signal(pidfd, number)
                    if select.select([pidfd], [], [], _KEEPER_S)[0]:
                        return
            finally:
                os.close(pidfd)

    def _sweep(self, machine: Machine, directories: list[str]) -> None:
        """Remove the cgroups and crun's state of a container that has ended."""
        state = self._layout.crun / container_id(machine)
        if state.exists() or any(Path(directory).exists() for directory in directories):
            self._inside("sweep", {"state": str(state), "directories": directories})

    def delete_tree(self, path: str) -> None:
        if Path(path).exists():
            self._inside("remove_tree", {"path": path})

    def disk_usage(self, path: str) -> int:
        return int(str(self._inside("disk_usage", {"path": path})))

    def _inside(self, function: str, arguments: Mapping[str, object]) -> object:
        """Call a function of `storage` where the machine's files can be touched: here as root, else in a namespace."""
        if self._root:
            called: Callable[..., object] = getattr(storage, function)
            return called(**arguments)
        idmap = userns.plan_idmap(os.getuid(), os.getgid())
        return userns.call(f"berth.engine.crun.storage:{function}", arguments, idmap=idmap)


@contextlib.contextmanager
def _bound(path: Path, *, keep: bool = False) -> Generator[socket.socket]:
    """Listen on a fresh unix socket at `path` (0600); removed at the end unless `keep`."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        try:
            path.chmod(0o600)
            sock.listen(128)
            yield sock
        finally:
            if not keep:
                path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(2)
            sock.connect(str(path))
    except OSError:
        return False
    return True


def _wait_gone(record: _Record, timeout_s: float) -> bool:
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return True
    try:
        # Only now is the descriptor known to be of our process and not of a later one with its id.
        if not record.is_alive():
            return True
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        return bool(poller.poll(max(0, deadline - time.monotonic()) * 1000)) or not record.is_alive()
    finally:
        os.close(pidfd)


def _allow_many_inits() -> None:
    """Raise the host's limit of inotify instances where it is the kernel's low default; until the next reboot."""
    with contextlib.suppress(OSError, ValueError):
        if int(_INOTIFY.read_text()) < _INOTIFY_ENOUGH:
            _INOTIFY.write_text(str(_INOTIFY_ENOUGH))


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in cast("list[object]", value)) if isinstance(value, list) else ()


def _bounding_set() -> int:
    """Read which capabilities anything we start can have. Source: proc(5), CapBnd."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            return int(line.split()[1], 16)
    return 0
