"""The VM engine: machines with a Linux kernel of their own, each under a QEMU.

Implements `engine.base.Engine`. What is true while a machine runs stands in the runtime directory (`vm.json`: QEMU and
the folder servers by process id *and* start time) and is checked against /proc each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from berth import files
from berth.agent import connect
from berth.config import BootConfig
from berth.engine.base import STOPPED, Liveness, Machine
from berth.engine.qemu import disks, sizes, templates
from berth.engine.qemu.monitor import Monitor
from berth.engine.running import (
    Process,
    answers,
    await_agent,
    boot_error,
    end_keeper,
    keeper_pid,
    listening,
    text,
    texts,
)
from berth.engine.unpacking import Ahead, Layers
from berth.errors import (
    BerthError,
    BootError,
    BusyError,
    DeadlineError,
    InvalidStateError,
    StateFormatError,
    UnsupportedError,
)
from berth.layout import Layout
from berth.log import log
from berth.names import MachineName
from berth.net.network import publish, withdraw
from berth.progress import Progress, Silent
from berth.units import utc_now

if TYPE_CHECKING:
    from berth.engine.qemu.accel import Accelerator
    from berth.kernels.model import Kernel

_READY_S = {"kvm": 20.0, "tcg": 120.0}  # emulation on a busy machine is slow, and no sign of trouble
_KILL_S = 10.0
_MONITOR_S = 2.0
_FREEZE_S = 10.0
_SCHEMA = 1
# What is in a machine's runtime directory only while it runs.
_TRANSIENT = (
    "vm.json", "agent.sock", "channel.sock", "console.sock", "serial.sock", "monitor.sock", "keeper-monitor.sock",
    "ports.json", "paused.json", "qemu.log",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Record:
    """vm.json: the running VM as it was when it started. servers: of the folders, by their place in the machine."""

    process: Process
    started: str
    kernel: str
    servers: tuple[tuple[str, Process], ...]
    limits: tuple[str, ...]
    offline: str | None = None


class VmEngine:
    """See `engine.base.Engine` for what each method promises."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def settle(self, boot: BootConfig) -> BootConfig:
        return dataclasses.replace(
            boot,
            cpus=boot.cpus or sizes.default_cpus(),
            memory=boot.memory or sizes.default_memory(),
            disk=sizes.disk_size(boot.disk),
        )

    # Templates ----------------------------------------------------------------------------------------------------

    def has_template(self, machine: Machine) -> bool:
        # A disk that is there stands on the template that it was made on; how large it is to become is no matter.
        made = disks.find_disk(machine.bundle) is not None
        return made or disks.has_template(self._layout, machine.config.image_digest, machine.boot.disk)

    def make_template(self, machine: Machine, layers: Layers, progress: Progress, ahead: Ahead | None = None) -> None:
        disks.make_template(self._layout, machine.config.image_digest, layers, machine.boot.disk, progress, ahead)

    def sweep_templates(self) -> None:
        templates.sweep_templates(self._layout)

    # One machine's life -------------------------------------------------------------------------------------------

    def start(self, machine: Machine, progress: Progress) -> None:
        arch = machine.config.platform.split("/")[1]
        accelerator = self._accelerator(machine, arch)
        kernel = self._kernel(machine, arch, progress)
        for attempt in (1, 2):
            self.kill(machine)  # what a start left that was killed halfway
            self.clean(machine)
            try:
                self._boot(machine, kernel, accelerator, progress)
                return
            except DeadlineError as error:
                # An emulated timer is now and then calibrated wrongly, and the kernel waits for ever.
                if attempt == 2:
                    raise boot_error(machine, "its agent did not answer in time") from error
                log.debug("machine '%s' did not boot in time: once more", machine.config.name)

    # What only a start needs is imported where it is: `ls` and `create --no-boot` take a quarter less without it.

    def _accelerator(self, machine: Machine, arch: str) -> Accelerator:
        from berth.engine.qemu.accel import probe, require_qemu

        require_qemu(arch)
        accelerator = probe(self._layout, arch)
        if machine.boot.virtualization and not accelerator.nested:
            raise UnsupportedError(
                f"this host can't give its virtualization to a machine: {accelerator.nested_reason}",
                hint=f"berth set -n {machine.config.name} virtualization=false",
            )
        return accelerator

    def _kernel(self, machine: Machine, arch: str, progress: Progress) -> Kernel:
        from berth.kernels.store import Kernels

        kernels = Kernels(self._layout)
        if machine.boot.kernel is None:
            return kernels.ensure(arch, progress)
        kernel = kernels.custom(Path(machine.boot.kernel))
        if kernel.arch != arch:
            raise UnsupportedError(
                f"the kernel {machine.boot.kernel} is for {kernel.arch}, machine '{machine.config.name}' for {arch}",
                hint=f"berth set -n {machine.config.name} kernel=",
            )
        return kernel

    def _boot(self, machine: Machine, kernel: Kernel, accelerator: Accelerator, progress: Progress) -> None:
        from berth.engine.qemu.launch import launch

        live = self._layout.live(machine.config.name)
        for folder in (self._layout.runtime, live.parent, live):
            files.make_private_directory(folder)
        try:
            disks.ensure_disk(machine.bundle, machine.config.image_digest, machine.boot.disk)
            settled = dataclasses.replace(machine, boot=self.settle(machine.boot))
            launched = launch(settled, kernel, accelerator, self._layout)
            record = {
                **launched.process.to_json(), "started": utc_now(), "kernel": kernel.version,
                "servers": [{"target": target, **server.to_json()} for target, server in launched.servers],
                "limits": list(launched.notes), "offline": launched.offline,
            }  # fmt: skip
            files.save_json(live / "vm.json", record, schema=_SCHEMA)
            if launched.bridged:
                publish(self._layout, machine.config.name, machine.address, launched.process.pid, tap=True)
            await_agent(machine, progress, _READY_S[accelerator.kind])
        except BaseException as error:
            said = _tail(live / "qemu.log")
            self.kill(machine)
            self.clean(machine)
            if isinstance(error, BootError) and said:
                raise boot_error(machine, f"QEMU ended: {said}") from error
            raise

    def write_changes(
        self,
        machine: Machine,
        out: IO[bytes],
        *,
        exclude: Collection[str],
        live: bool,  # noqa: ARG002 (what would be torn are the tables of the disk itself)
        progress: Progress,
    ) -> None:
        # Here, because a boot need not wait for them.
        from berth.engine.qemu.accel import probe, require_qemu
        from berth.engine.qemu.changes import Setting, write_changes
        from berth.engine.qemu.freezing import frozen
        from berth.oci.hostile import check_layer

        name, excluded = machine.config.name, [*exclude, "lost+found"]
        is_running = self.find(machine) != STOPPED
        reason = self._why_paused(machine)
        if reason is not None and is_running:  # nothing in it can answer
            raise InvalidStateError(f"machine '{name}' is paused: {reason}")
        arch = machine.config.platform.split("/")[1]
        require_qemu(arch)
        setting = Setting(machine, self._kernel(machine, arch, progress), probe(self._layout, arch), self._layout)
        progress.step(f"reading {name}")
        path = self._layout.agent_socket(name)
        still = frozen(lambda: connect(path, timeout_s=_FREEZE_S), name) if is_running else contextlib.nullcontext()
        found = write_changes(setting, out, exclude=excluded, still=still)
        paths = [os.fsencode(path) for path in excluded]
        check_layer(out.fileno(), start=found.start, size=found.size, exclude=paths, where="the new layer")
        out.seek(found.start)

    # Looking ------------------------------------------------------------------------------------------------------

    def find(self, machine: Machine) -> Liveness:
        record = self._load_record(machine.config.name)
        if record is None or not record.process.is_alive():
            return STOPPED
        keeper = keeper_pid(self._layout, machine)
        # Without a keeper nobody carries clients; the machine itself runs, and the next command starts a new one.
        well = keeper is None or answers(self._layout.agent_socket(machine.config.name))
        return Liveness(
            "running" if well else "broken",
            vmm_pid=record.process.pid, keeper_pid=keeper, kernel=record.kernel, started=record.started,
            limits=record.limits, offline=record.offline, problems=self._problems(machine, record),
        )  # fmt: skip

    def _problems(self, machine: Machine, record: _Record) -> tuple[str, ...]:
        """Say what is wrong with a VM though it runs: a killed folder server, a full disk of the host's."""
        found = [
            f"the server of the folder {target} has died: berth restart {machine.config.name}"
            for target, server in record.servers
            if not server.is_alive()
        ]
        reason = self._why_paused(machine)
        return tuple(found) if reason is None else (*found, f"it is paused: {reason}")

    def _why_paused(self, machine: Machine) -> str | None:
        with contextlib.suppress(FileNotFoundError, StateFormatError):
            paused = files.load_json(self._layout.live(machine.config.name) / "paused.json", schema=_SCHEMA)
            return str(paused.get("reason"))[:200]
        return None

    def _load_record(self, name: MachineName) -> _Record | None:
        path = self._layout.live(name) / "vm.json"
        try:
            document = files.load_json(path, schema=_SCHEMA)
        except (FileNotFoundError, NotADirectoryError):
            return None
        process = Process.from_json(document)
        if process is None:
            raise StateFormatError(f"{path} is damaged: it has no process")
        servers = document.get("servers")
        entries = cast("list[dict[str, object]]", servers) if isinstance(servers, list) else []
        found = ((str(entry.get("target")), Process.from_json(entry)) for entry in entries)
        return _Record(
            process,
            str(document.get("started")),
            str(document.get("kernel")),
            tuple((target, server) for target, server in found if server is not None),
            texts(document.get("limits")),
            text(document.get("offline")),
        )

    def repair(self, machine: Machine) -> None:
        """Start a new keeper: QEMU and the guest live without one, and the guest restarts its agent by itself."""
        record = self._load_record(machine.config.name)
        if record is None or not record.process.is_alive() or keeper_pid(self._layout, machine) is not None:
            return
        from berth.engine.qemu.launch import start_keeper

        log.debug("the keeper of machine '%s' is gone: starting a new one", machine.config.name)
        with listening(self._layout.agent_socket(machine.config.name), keep=True) as agent_socket:
            start_keeper(machine, self._layout, agent_socket, boot=False)
        await_agent(machine, Silent(), _READY_S["kvm"])

    # Ending -------------------------------------------------------------------------------------------------------

    def wait_stopped(self, machine: Machine, timeout_s: float) -> bool:
        record = self._load_record(machine.config.name)
        if record is not None and not record.process.wait_gone(timeout_s):
            return False
        disks.mark_clean(machine.bundle)
        return True

    def press_power(self, machine: Machine) -> None:
        try:
            with Monitor(self._layout.live(machine.config.name) / "monitor.sock", timeout_s=_MONITOR_S) as monitor:
                monitor.command("system_powerdown")
        except (OSError, BerthError) as error:
            log.debug("machine '%s' has no power button: %s", machine.config.name, error)

    def kill(self, machine: Machine) -> None:
        self._kill(machine.config.name)
        if not disks.was_clean(machine.bundle):
            # A launcher may have been killed after QEMU's start and before the record of it.
            for process in _find_orphans(machine.config.id):
                process.kill(_KILL_S)

    def _kill(self, name: MachineName) -> None:
        record = self._load_record(name)
        if record is None:
            return
        for process in (record.process, *(server for _, server in record.servers)):
            if not process.kill(_KILL_S):
                raise DeadlineError(f"machine '{name}' can't be killed (process {process.pid})")

    def end_stray(self, name: MachineName) -> None:
        with contextlib.suppress(StateFormatError):
            self._kill(name)
        withdraw(self._layout, name)

    def clean(self, machine: Machine) -> None:
        name = machine.config.name
        record = self._load_record(name)
        if record is not None and record.process.is_alive():
            raise BusyError(f"machine '{name}' still runs")
        end_keeper(self._layout, machine)
        withdraw(self._layout, name)
        for entry in _TRANSIENT:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (self._layout.live(name) / entry).unlink()


def _find_orphans(identity: str) -> Iterator[Process]:
    """Find the QEMU of a machine by the name that it was given."""
    name = f"berth-{identity[:12]},".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"-sandbox" in words and any(word.startswith(name) for word in words):
                process = Process.of(int(entry.name))
                if process is not None:
                    yield process


def _tail(path: Path) -> str:
    """Return the last words of a program's log, in one line."""
    try:
        text = path.read_bytes()[-1000:].decode(errors="replace")
    except OSError:
        return ""
    return "; ".join(line.strip() for line in text.splitlines()[-3:] if line.strip())
