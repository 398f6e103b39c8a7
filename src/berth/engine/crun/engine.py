"""The container engine: machines that share the host's kernel, each in a user namespace of its own, run by crun.

Implements `engine.base.Engine`. What is true while a machine runs stands in the runtime directory (`container.json`:
process id *and* start time, so that a process id used again fools nobody) and is checked against /proc each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import IO, cast

from berth import files, locks, trees, userns
from berth.agent import AgentClient, connect
from berth.agentbinary import find_agent
from berth.config import BootConfig
from berth.engine.base import STOPPED, Liveness, Machine
from berth.engine.crun import cgroups, storage
from berth.engine.crun.plan import container_id, plan_launch
from berth.engine.running import (
    Process,
    answers,
    await_agent,
    boot_document,
    end_keeper,
    keeper_pid,
    listening,
    make_covers,
    start_keeper,
    text,
    texts,
)  # fmt: skip
from berth.engine.unpacking import Ahead, Layers, find_unpacked, unpack
from berth.errors import BerthError, BusyError, DeadlineError, StateFormatError
from berth.layout import Layout
from berth.log import log
from berth.names import MachineName
from berth.net.network import Network, ensure, publish, withdraw
from berth.proc import require_program
from berth.progress import Progress
from berth.units import utc_now

_READY_S = 60.0
_KILL_S = 10.0
_SCHEMA = 1
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
    """container.json: the running container as it was when it started. process: its init."""

    process: Process
    started: str
    cgroups: tuple[str, ...]
    limits: tuple[str, ...]
    offline: str | None = None


class ContainerEngine:
    """See `engine.base.Engine` for what each method promises."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._root = os.geteuid() == 0

    def settle(self, boot: BootConfig) -> BootConfig:
        return boot

    # Templates ----------------------------------------------------------------------------------------------------

    def has_template(self, machine: Machine) -> bool:
        return find_unpacked(self._layout, machine.config.image_digest) is not None

    def make_template(self, machine: Machine, layers: Layers, progress: Progress, ahead: Ahead | None = None) -> None:
        digest = machine.config.image_digest
        template = self._layout.template(digest)
        files.make_private_directory(self._layout.data)
        files.make_private_directory(self._layout.templates)
        with locks.hold(self._layout.templates / "templates.lock", timeout_s=3600, what="the image"):
            self._sweep_templates()
            if self.has_template(machine):
                return
            partial = template.with_name(f"{template.name}.partial")
            try:
                unpack(partial, digest, layers, progress, ahead)
                # The folder above stays closed to the host's other users: what is setuid inside must not be reachable.
                partial.chmod(0o711)
                files.save_json(partial / "template.json", {"digest": digest}, schema=_SCHEMA)
                partial.rename(template)
            except BaseException:
                trees.delete(partial)
                raise
            files.sync_directory(self._layout.templates)

    def sweep_templates(self) -> None:
        lock = self._layout.templates / "templates.lock"
        if lock.exists():
            with contextlib.suppress(BusyError), locks.hold(lock, timeout_s=0):
                self._sweep_templates()

    def _sweep_templates(self) -> None:
        """The same, for who holds the lock."""
        for path in self._layout.templates.glob("*.partial"):
            trees.delete(path)

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
        with self._listener(machine) as listener, listening(live / "console.sock") as console:
            publish(self._layout, machine.config.name, machine.address)
            start_keeper(machine, agent, ["--console-fd", str(console.fileno())], pass_fds=[console.fileno()])
            try:
                self._launch(machine, agent, idmap, placement, network, listener)
                await_agent(machine, progress, _READY_S)
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
        with listening(self._layout.agent_socket(machine.config.name), keep=True) as sock:
            yield sock

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
        init = () if _NO_SERVICES in placement.missing else machine.config.init
        document = boot_document(machine, nameserver_text=network.resolv_conf, init=init)
        plan = plan_launch(
            machine, agent=agent, holder=network.holder_pid, idmap=idmap, placement=placement,
            boot_document=json.dumps(document), bounding_set=_bounding_set(),
        )  # fmt: skip
        covers = {Path(bind["source"]): bind["directory"] for bind in plan["binds"]}
        make_covers({path: kind for path, kind in covers.items() if path.parent == machine.bundle.private})
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
                    "cgroups": list(texts(made)), "limits": [*placement.missing, *network.notes],
                    "offline": network.offline,
                }  # fmt: skip
                files.save_json(self._record_path(machine), record, schema=_SCHEMA)
                publish(self._layout, machine.config.name, machine.address, pid)
            case _:
                raise BerthError(f"unexpected answer from the launcher: {answer!r:.200}")

    # Looking ------------------------------------------------------------------------------------------------------

    def find(self, machine: Machine) -> Liveness:
        record = self._load_record(machine)
        if record is None or not record.process.is_alive():
            return STOPPED
        well = answers(self._layout.agent_socket(machine.config.name))
        return Liveness(
            "running" if well else "broken",
            init_pid=record.process.pid,
            keeper_pid=keeper_pid(self._layout, machine),
            started=record.started,
            limits=record.limits,
            offline=record.offline,
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
                made, limits, offline = document.get("cgroups"), document.get("limits"), document.get("offline")
                return _Record(Process(pid, ticks), started, texts(made), texts(limits), text(offline))
            case _:
                raise StateFormatError(f"{path} is damaged: it has no process")

    def repair(self, machine: Machine) -> None:
        record = self._load_record(machine)
        if record is None or not record.process.is_alive():
            return
        name = machine.config.name
        if not answers(self._layout.agent_socket(name)):
            log.debug("the agent of machine '%s' is gone: starting a new one", name)
            self._restart_agent(machine, record)
        if not locks.is_held(self._layout.live(name) / "keeper.lock"):
            log.debug("the keeper of machine '%s' is gone: starting a new one", name)
            ensure(self._layout)
            start_keeper(machine, find_agent(self._layout), ["--pid", str(record.process.pid)])

    def _restart_agent(self, machine: Machine, record: _Record) -> None:
        """Start `agent serve` in the living container, from our own copy of the binary, with a new socket."""
        with self._listener(machine) as listener:
            userns.call(
                "berth.engine.crun.repair:restart_agent",
                {"pid": record.process.pid, "listener": listener.fileno(), "agent": str(find_agent(self._layout))},
                pass_fds=[listener.fileno()],
            )
            path = self._layout.agent_socket(machine.config.name)
            with AgentClient(connect(path, timeout_s=_KILL_S), timeout_s=_KILL_S) as client:
                client.status()

    def write_changes(
        self, machine: Machine, out: IO[bytes], *, exclude: Collection[str], live: bool, progress: Progress
    ) -> None:
        from berth.engine.crun import changes  # what a boot need not wait for

        still = contextlib.nullcontext() if live or self.find(machine) == STOPPED else changes.frozen(machine.config)
        with still:
            progress.step(f"reading {machine.config.name}")
            changes.write_changes(machine, out, exclude=exclude)
        out.seek(0)

    # Ending -------------------------------------------------------------------------------------------------------

    def wait_stopped(self, machine: Machine, timeout_s: float) -> bool:
        record = self._load_record(machine)
        return record is None or record.process.wait_gone(timeout_s)

    def press_power(self, machine: Machine) -> None:
        """Do nothing: a container has no button, its init is asked by the agent."""

    def kill(self, machine: Machine) -> None:
        # Our record, and crun's own: a launcher may have been killed between the two.
        for record in (self._load_record(machine), self._orphan(machine)):
            # The owner of the namespace may signal its processes; killing process 1 ends all of them.
            if record is not None and not record.process.kill(_KILL_S):
                name, pid = machine.config.name, record.process.pid
                raise DeadlineError(f"machine '{name}' can't be killed (process {pid})")
        # The second wall: whatever still runs in a cgroup of the machine's.
        cgroups.kill_all(cgroups.find_leftovers(machine.config.id))

    def end_stray(self, name: MachineName) -> None:
        """End what runs under the name of a machine whose bundle can't be read any more."""
        record = self._read_record(self._layout.live(name) / "container.json")
        if record is not None:
            record.process.kill(_KILL_S)
            _sweep(str(self._state_of(record.process) or ""), record.cgroups)
        withdraw(self._layout, name)

    def _state_of(self, process: Process) -> Path | None:
        """Find crun's notes of a container by its process: their name is made of an id that can't be read any more."""
        for state in self._layout.crun.iterdir() if self._layout.crun.is_dir() else ():
            if self._read_state(state) == process:
                return state
        return None

    def _orphan(self, machine: Machine) -> _Record | None:
        state = self._layout.crun / container_id(machine)
        process = self._read_state(state) if state.exists() else None
        return None if process is None else _Record(process, "", (), ())

    def _read_state(self, state: Path) -> Process | None:
        found = trees.inside(
            "berth.engine.crun.storage:read_container", storage.read_container, {"state": str(state)}
        )  # fmt: skip
        return Process.from_json(found)

    def clean(self, machine: Machine) -> None:
        name = machine.config.name
        record = self._load_record(machine)
        if record is not None and record.process.is_alive():
            raise BusyError(f"machine '{name}' still runs")
        end_keeper(self._layout, machine)
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

    def _sweep(self, machine: Machine, directories: list[str]) -> None:
        """Remove the cgroups and crun's state of a container that has ended."""
        state = self._layout.crun / container_id(machine)
        if state.exists() or any(Path(directory).exists() for directory in directories):
            _sweep(str(state), directories)


def _sweep(state: str, directories: Sequence[str]) -> None:
    trees.inside(
        "berth.engine.crun.storage:sweep", storage.sweep, {"state": state, "directories": list(directories)}
    )  # fmt: skip


def _allow_many_inits() -> None:
    """Raise the host's limit of inotify instances where it is the kernel's low default; until the next reboot."""
    with contextlib.suppress(OSError, ValueError):
        if int(_INOTIFY.read_text()) < _INOTIFY_ENOUGH:
            _INOTIFY.write_text(str(_INOTIFY_ENOUGH))


def _bounding_set() -> int:
    """Read which capabilities anything we start can have. Source: proc(5), CapBnd."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            return int(line.split()[1], 16)
    return 0
