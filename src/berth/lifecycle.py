"""What can be done with machines: create, start, stop, run in, look at, delete. Layer 5.

The one code path behind the commands and the Python API: it joins bundles, images, addresses and engines, decides
names, defaults and locks, and prints nothing. Per machine `run.lock` is held while it is started, stopped or removed.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from berth import bundle as bundles
from berth import locks, trees
from berth.agent import AgentClient, connect
from berth.bundle import Bundle, Listed
from berth.config import BootConfig, Change, HostUser, MachineConfig, apply_assignments, check_fits
from berth.engine import unpacking
from berth.engine.base import STOPPED, Engine, Liveness, Machine, ensure_template
from berth.engine.select import all_engines, choose_isolation, engine_for
from berth.engine.unpacking import Ahead
from berth.errors import BerthError, BootError, DeadlineError, InvalidStateError, NotFoundError
from berth.files import load_json, sweep_partials
from berth.layout import Layout
from berth.log import log
from berth.machineinfo import MachineInfo, Status
from berth.names import MachineName, parse_machine_name, parse_reference
from berth.net import addresses
from berth.net.network import teardown
from berth.progress import Progress, Silent
from berth.units import utc_now

if TYPE_CHECKING:
    import _socket

    from berth.adapt import AdaptMode, Bootable
    from berth.images import Images, StoredImage

STOP_S = 10.0  # seconds that a guest's init gets to power off
_ASK_S = 5.0  # seconds that the agent gets to take a request
_LOCK_S = 300.0
_DOOMED = ".doomed"  # ends the names of templates that wait for their removal


class Machines:
    """The machines of one user (one data directory)."""

    def __init__(self, layout: Layout | None = None) -> None:
        self.layout = layout or Layout.from_environment()

    @functools.cached_property
    def images(self) -> Images:
        """The image store; loaded when it is needed, which a boot does not (20 ms)."""
        from berth.images import Images

        return Images(self.layout)

    # Names --------------------------------------------------------------------------------------------------------

    def resolve(self, name: str | None) -> MachineName:
        """Return the machine that `name` (None: the default) means. Raises NotFoundError."""
        if name is not None:
            checked = parse_machine_name(name)
            if not os.path.lexists(self.layout.bundle(checked)):
                raise bundles.machine_not_found(checked)
            return checked
        default = self.default()
        if default is None:
            others = bundles.list_bundles(self.layout)
            hint = f"berth set-default {others[0].name}" if others else "berth create debian:12 --name dev"
            raise NotFoundError("no default machine found", hint=hint)
        return default

    def default(self) -> MachineName | None:
        return bundles.find_default(self.layout)

    def set_default(self, name: str) -> None:
        bundles.set_default(self.layout, self.resolve(name))

    def _free_name(self, reference: str) -> MachineName:
        """Make a name from an image: ``debian-12``, ``debian-12-2`` …"""
        parsed = parse_reference(reference)
        last = parsed.path.rstrip("/").rpartition("/")[2].partition("?")[0]
        stem = last if parsed.transport != "docker" else f"{last}-{parsed.tag}" if parsed.tag else last
        words = "".join(char if char.isascii() and char.isalnum() else "-" for char in stem.lower())
        base = "-".join(word for word in words.split("-") if word)[:48].strip("-") or "machine"
        candidates = (base if number == 1 else f"{base}-{number}" for number in range(1, 10_000))
        return next(
            MachineName(name) for name in candidates if not os.path.lexists(self.layout.bundle(MachineName(name)))
        )

    # Create and remove --------------------------------------------------------------------------------------------

    def create(
        self,
        reference: str,
        *,
        name: str | None = None,
        boot_config: BootConfig | None = None,
        isolation: str = "auto",
        platform: str | None = None,
        boot: bool = True,
        set_default: bool = False,
        adapt: AdaptMode = "auto",
        progress: Progress | None = None,
    ) -> MachineName:
        """Make a machine from an image and boot it; a failure leaves nothing of it behind (the image stays).

        adapt: whether an image without an init is given one (docs/adapting.md).

        Raises ExistsError, InvalidArgumentError, UnsupportedError, RegistryError, ImageFormatError and what a boot
        raises.
        """
        progress = progress or Silent()
        checked = parse_machine_name(name) if name is not None else self._free_name(reference)
        bundles.check_free(self.layout, checked)
        self.sweep_unfinished()
        self.layout.agent_socket(checked)  # refuses a path too long before the work, not after
        boot_config = boot_config or BootConfig()
        if isolation == "auto" and (boot_config.kernel or boot_config.virtualization):
            isolation = "vm"  # nothing else can have these
        if isolation != "auto":  # else nobody knows before the image is here
            check_fits("vm" if isolation == "vm" else "container", boot_config)
        with Ahead(self.layout) as ahead:
            image = self.images.ensure(reference, platform=platform, progress=progress, arrivals=ahead)
            chosen, why = choose_isolation(isolation, image.platform, self.layout)
            if isolation == "auto":
                check_fits(chosen, boot_config)
            if why is not None:
                progress.note(f"{checked} is {why}")
            reference = image.reference or image.digest
            bootable = self._make_bootable(image, adapt, progress, ahead)
            image = bootable.image
            config = MachineConfig(
                name=checked, id=os.urandom(16).hex(), image_reference=reference, image_digest=image.digest,
                platform=image.platform, isolation=chosen, created=utc_now(), user=HostUser.current(),
                init=bootable.init,
            )  # fmt: skip
            # The bundle comes first: from then on the image and its template are in use, and no prune takes them.
            with self.images.keeping(image), bundles.create(self.layout, config, boot_config):
                addresses.allocate(self.layout, checked)
            try:
                self._ensure_template(self._load(checked), image, progress, ahead)
                ahead.close()  # nobody needs what is left of it, and a boot needs the processor
                if boot:
                    self.start(checked, progress=progress)
            except BaseException as error:
                self.remove(checked, force=True)
                if isinstance(error, BootError):  # its hint is about a machine that is gone now
                    error.hint = f"to look into it: create it with --no-boot, then berth start {checked}"
                raise
        if set_default:
            self.set_default(checked)
        else:
            bundles.set_default_if_none(self.layout, checked)
        return checked

    def _make_bootable(self, image: StoredImage, adapt: AdaptMode, progress: Progress, ahead: Ahead) -> Bootable:
        from berth.adapt import make_bootable

        try:
            return make_bootable(
                self.layout, self.images, image, mode=adapt, in_use=self.images_in_use, progress=progress, ahead=ahead
            )
        except BaseException:
            if not bundles.list_bundles(self.layout):
                self._end_network()
            raise

    def _ensure_template(
        self, machine: Machine, image: StoredImage, progress: Progress, ahead: Ahead | None = None
    ) -> None:
        ensure_template(self._engine(machine), machine, lambda: self.images.opened_layers(image), progress, ahead)

    def remove(self, name: str, *, force: bool = False) -> None:
        """Delete a machine with its storage. Raises InvalidStateError when it runs and `force` is not set."""
        checked = self.resolve(name)
        with self.exclusive(checked, "stopping"):
            machine = self._try_load(checked)
            if machine is not None:
                engine = self._engine(machine)
                if engine.find(machine).state != "stopped":
                    if not force:
                        raise InvalidStateError(f"machine '{checked}' is running", hint=f"berth rm --force {checked}")
                    engine.kill(machine)
                engine.kill(machine)  # also what a broken start left
                engine.clean(machine)
            else:
                for engine in all_engines(self.layout):
                    engine.end_stray(checked)
            if os.path.lexists(self.layout.live(checked)):  # of a start that was killed, or of a damaged bundle
                import shutil

                shutil.rmtree(self.layout.live(checked), ignore_errors=True)
            bundles.delete(self.layout, checked)
        self._empty_trash()  # first of all: the disk may be full, and then nothing else can be written
        with contextlib.suppress(OSError):  # the disk is still full: the machine has gone, its address goes later
            # By what is there, not by name: somebody may be making a machine of this name again.
            addresses.sweep(self.layout)
        if not bundles.list_bundles(self.layout):
            self._end_network()

    def _end_network(self) -> None:
        """Take the network down unless a machine runs: it would only take memory."""
        with contextlib.suppress(InvalidStateError):
            teardown(self.layout)

    def sweep_unfinished(self) -> None:
        """Remove what a killed berth left of unpacking an image ahead, and of adapting one."""
        unpacking.sweep(self.layout)
        if bundles.list_hidden(self.layout):
            from berth.adapt import workshop

            workshop.sweep(self.layout)

    def _empty_trash(self) -> None:
        self.sweep_unfinished()
        for path in bundles.trash(self.layout):
            trees.delete(path)

    # Start and stop -----------------------------------------------------------------------------------------------

    def start(self, name: str, *, progress: Progress | None = None) -> None:
        """Boot a machine until its agent answers; a running one is left as it is, a broken one repaired."""
        checked = self.resolve(name)
        with self.exclusive(checked, "starting"):
            self._ensure_running(self._load(checked), progress or Silent())

    def _ensure_running(self, machine: Machine, progress: Progress) -> None:
        engine = self._engine(machine)
        if engine.find(machine).state == "stopped":
            if not engine.has_template(machine):
                image = self._find_image(machine, progress)
                if image.digest != machine.config.image_digest:
                    raise BerthError(
                        f"the image of machine '{machine.config.name}' is gone: {machine.config.image_digest}"
                    )
                self._ensure_template(machine, image, progress)
            engine.start(machine, progress)
            for limit in engine.find(machine).limits:
                progress.note(limit)
        else:
            engine.repair(machine)

    def _find_image(self, machine: Machine, progress: Progress) -> StoredImage:
        """Find the image of a machine: by its digest, for an adapted one has another than its name says."""
        with contextlib.suppress(NotFoundError):
            return self.images.find(machine.config.image_digest)
        config = machine.config
        return self.images.ensure(config.image_reference, platform=config.platform, progress=progress)

    def stop(self, name: str, *, force: bool = False, timeout_s: float = STOP_S) -> None:
        """Power a machine off: ask its init, and after `timeout_s` end it. Idempotent."""
        checked = self.resolve(name)
        with self.exclusive(checked, "stopping"):
            machine = self._load(checked)
            engine = self._engine(machine)
            if engine.find(machine).state != "stopped":
                if not force and not self._ask_to_power_off(machine, timeout_s):
                    engine.press_power(machine)
                if force or not engine.wait_stopped(machine, timeout_s):
                    engine.kill(machine)
            engine.clean(machine)

    def _ask_to_power_off(self, machine: Machine, timeout_s: float) -> bool:
        try:
            with self._agent(machine.config.name, min(_ASK_S, timeout_s)) as client:
                client.power_off()
                return True
        except (OSError, BerthError) as error:
            log.debug("machine '%s' can't be asked to power off: %s", machine.config.name, error)
            return False

    def _agent(self, name: MachineName, timeout_s: float) -> AgentClient:
        """Connect to the agent of a running machine; every answer has `timeout_s`. Raises OSError, DeadlineError."""
        return AgentClient(connect(self.layout.agent_socket(name), timeout_s=timeout_s), timeout_s=timeout_s)

    def restart(
        self, name: str, *, force: bool = False, timeout_s: float = STOP_S, progress: Progress | None = None
    ) -> None:
        self.stop(name, force=force, timeout_s=timeout_s)
        self.start(name, progress=progress)

    def connect(self, name: str, *, progress: Progress | None = None) -> _socket.socket:
        """Return a connection to a machine's agent; a stopped machine is booted, a broken one repaired."""
        checked = self.resolve(name)
        if not self._is_well(checked):
            self.start(checked, progress=progress)
        return connect(self.layout.agent_socket(checked), timeout_s=_ASK_S)

    def _is_well(self, name: MachineName) -> bool:
        """Say whether the machine runs and nothing of it has to be repaired."""
        machine = self._load(name)
        alive = self._engine(machine).find(machine)
        return alive.state == "running" and alive.keeper_pid is not None

    # Looking ------------------------------------------------------------------------------------------------------

    def list(self) -> builtins.list[MachineInfo]:
        """Describe every machine, by name; a broken one with its problems."""
        default = self.default()
        return [self._describe(listed, default) for listed in bundles.list_bundles(self.layout)]

    def inspect(self, name: str) -> MachineInfo:
        """Describe one machine. Raises NotFoundError."""
        checked = self.resolve(name)
        for info in self.list():
            if info.name == checked:
                return info
        raise bundles.machine_not_found(checked)

    def _describe(self, listed: Listed, default: MachineName | None) -> MachineInfo:
        config, boot, name = listed.config, listed.boot, listed.name
        path, runtime = str(listed.bundle.path), str(self.layout.live(name))
        if config is None or boot is None:
            why = str(listed.problem or "it can't be read")
            return MachineInfo(
                name, "broken", default=name == default, problems=(why,), bundle_path=path, runtime_path=runtime
            )
        alive, address, problem = STOPPED, None, None
        try:
            machine = self._machine(listed.bundle, config, boot)
            address = machine.address
            alive = self._engine(machine).find(machine)
        except BerthError as error:
            problem = str(error)
        boot = self._settled(config, boot)
        status: Status = "broken" if problem else self._status(name, alive)
        if status == "broken" and problem is None:
            problem = "its guest agent does not answer: the next berth run or start repairs it"
        reachable = None if address is None else address.ip if os.geteuid() == 0 else address.loopback
        return MachineInfo(
            name=name, status=status, isolation=config.isolation, image_reference=config.image_reference,
            image_digest=config.image_digest, platform=config.platform, address=reachable,
            ports=self._ports(name), cpus=boot.cpus, memory=boot.memory, disk=boot.disk,
            home_mount=boot.home_mount, mounts=boot.mounts, expose=boot.expose, env=boot.env,
            kernel=self._kernel(config, boot, alive),
            virtualization=boot.virtualization, autostart=boot.autostart, ssh_agent=boot.ssh_agent,
            user=config.user, created=config.created, started=alive.started, default=name == default,
            console_path=str(listed.bundle.console_log),
            init_pid=alive.init_pid, vmm_pid=alive.vmm_pid, keeper_pid=alive.keeper_pid,
            problems=(*((problem,) if problem else ()), *alive.problems), limits=alive.limits,
            bundle_path=path, runtime_path=runtime,
        )  # fmt: skip

    def _settled(self, config: MachineConfig, boot: BootConfig) -> BootConfig:
        with contextlib.suppress(BerthError):
            return engine_for(config.isolation, self.layout).settle(boot)
        return boot

    def _kernel(self, config: MachineConfig, boot: BootConfig, alive: Liveness) -> str | None:
        if config.isolation == "vm":
            return alive.kernel or boot.kernel
        return os.uname().release if alive.state != "stopped" else None

    def _status(self, name: MachineName, alive: Liveness) -> Status:
        doing = self._doing(name)
        if doing == "starting" and alive.state != "running":
            return "starting"
        if doing == "stopping" and alive.state == "running":
            return "stopping"
        return alive.state

    def _ports(self, name: MachineName) -> tuple[int, ...]:
        with contextlib.suppress(OSError, BerthError):
            document = load_json(self.layout.live(name) / "ports.json", schema=1)
            entries = document.get("ports")
            if isinstance(entries, list):
                found = (_host_port(entry) for entry in cast("builtins.list[object]", entries))
                return tuple(port for port in found if port is not None)
        return ()

    # Settings -----------------------------------------------------------------------------------------------------

    def set(self, name: str, assignments: builtins.list[str]) -> builtins.list[Change]:
        """Change settings, all or nothing; say what changed and when it takes effect."""
        bundle = Bundle(self.layout, self.resolve(name))
        with bundle.edit() as lock:
            boot, changes = apply_assignments(bundle.load_boot(), assignments)
            check_fits(bundle.load().isolation, boot)
            bundle.save_boot(lock, boot)
        return changes

    # Output and waiting -------------------------------------------------------------------------------------------

    def logs(self, name: str, *, boot: bool = False, follow: bool = False, lines: int | None = None) -> Iterator[bytes]:
        """Give what the machine wrote, in chunks: its console (`boot`), else its journal where it runs one.

        A stopped machine's services are read from the console, where the journal is forwarded to.
        """
        from berth import consolelog  # with sessions and all: nothing else here needs them

        checked = self.resolve(name)
        bundle = Bundle(self.layout, checked)
        if not boot and self._has_journal(bundle):
            return self._journal(checked, follow=follow, lines=lines)
        return consolelog.read(
            bundle.console_log, lines=lines, follow=follow,
            alive=lambda: self._engine_state(bundle) != "stopped",
        )  # fmt: skip

    def _engine_state(self, bundle: Bundle) -> str:
        machine = self._load(bundle.name)
        return self._engine(machine).find(machine).state

    def _has_journal(self, bundle: Bundle) -> bool:
        try:
            if self._engine_state(bundle) != "running":
                return False
            with self._agent(bundle.name, _ASK_S) as client:
                return client.status().system == "systemd"
        except (OSError, BerthError):
            return False

    def _journal(self, name: MachineName, *, follow: bool, lines: int | None) -> Iterator[bytes]:
        from berth import consolelog

        argv = ["journalctl", "--no-pager", "--output=short", "--boot"]
        argv += ["--follow"] if follow else []
        argv += [] if lines is None else [f"--lines={lines}"]
        sock = connect(self.layout.agent_socket(name), timeout_s=_ASK_S)
        try:
            yield from consolelog.command_output(sock, argv)
        finally:
            sock.close()

    def wait(self, name: str, *, target: str = "agent", timeout_s: float | None = None) -> str:
        """Wait until a running machine's agent answers, or its init has settled; return the init's state.

        Raises DeadlineError; InvalidStateError when the machine does not run.
        """
        checked = self.resolve(name)
        deadline = time.monotonic() + (timeout_s if timeout_s is not None else 3600.0)
        machine = self._load(checked)
        if self._engine(machine).find(machine).state == "stopped" and self._doing(checked) != "starting":
            raise InvalidStateError(f"machine '{checked}' is stopped", hint=f"berth start {checked}")
        try:
            with self._agent(checked, max(0.01, deadline - time.monotonic())) as client:
                if target == "init":
                    return client.wait_init(timeout_s=max(0.01, deadline - time.monotonic()))
                return client.status().init
        except TimeoutError as error:
            raise DeadlineError(f"machine '{checked}' was not ready within {timeout_s:g} s") from error

    # The system ---------------------------------------------------------------------------------------------------

    def usage(self) -> builtins.list[tuple[str, int]]:
        """Count the bytes on disk: (what, bytes)."""
        places = [("images", self.layout.images), ("templates", self.layout.templates), ("disks", self.layout.disks)]
        places += [("kernels", self.layout.kernels), ("build cache", self.layout.build)]
        places += [(f"machine {item.name}", item.bundle.path) for item in bundles.list_bundles(self.layout)]
        return [(what, trees.usage(path)) for what, path in places]

    def images_in_use(self) -> dict[str, builtins.list[str]]:
        """Say which manifest digests machines were made from: digest → machine names."""
        used: dict[str, builtins.list[str]] = {}
        for listed in [*bundles.list_bundles(self.layout), *bundles.list_hidden(self.layout)]:
            if listed.config is not None:
                used.setdefault(listed.config.image_digest, []).append(listed.name)
        return used

    def prune(self, progress: Progress | None = None) -> None:
        """Remove what nothing needs: unused images, templates without a machine, what failed commands left."""
        progress = progress or Silent()
        progress.step("removing deleted machines")
        self._empty_trash()
        addresses.sweep(self.layout)
        places = [listed.bundle for listed in bundles.list_bundles(self.layout)]
        layout = self.layout
        for folder in (
            layout.data, layout.cache, layout.inspections, layout.hub, layout.hub_machines,
            *(bundle.path for bundle in places), *(bundle.vm for bundle in places),
        ):  # fmt: skip
            sweep_partials(folder)
        progress.step("removing unused images")
        self.images.prune(self.images_in_use)
        self.prune_templates()
        self._forget_builds(progress)
        self._end_network()

    def _forget_builds(self, progress: Progress) -> None:
        if self.layout.build.exists():
            from berth.build import forget

            progress.step("removing the build cache")
            forget(self.layout)

    def prune_templates(self) -> None:
        """Remove templates whose image is neither stored nor used by a machine, and those that are half-made."""
        for engine in all_engines(self.layout):
            engine.sweep_templates()
        with bundles.machines_lock(self.layout):
            kept = {digest.replace(":", "-") for digest in self.images_in_use()}
            kept |= {image.digest.replace(":", "-") for image in self.images.list()}
            folders = [*_directories(self.layout.templates), *_directories(self.layout.disks)]
            # Also what a killed prune has renamed. Each gets a name of its own: nothing can be in its way.
            doomed = [path for path in folders if _stem(path) not in kept or path.suffix == _DOOMED]
            renamed = [path.rename(path.with_name(f"{_stem(path)}.{os.urandom(4).hex()}{_DOOMED}")) for path in doomed]
        for path in renamed:
            trees.delete(path)

    def start_autostart(
        self, progress: Progress | None = None
    ) -> tuple[builtins.list[MachineName], builtins.list[BerthError]]:
        """Start the machines marked autostart; one that fails does not keep the others from it."""
        started: builtins.list[MachineName] = []
        failed: builtins.list[BerthError] = []
        for name in self._autostart_names():
            try:
                self.start(name, progress=progress)
                started.append(name)
            except BerthError as error:
                failed.append(error)
        return started, failed

    def stop_autostart(self) -> builtins.list[MachineName]:
        names = self._autostart_names()
        for name in names:
            self.stop(name)
        return names

    def autostart_status(self) -> builtins.list[MachineInfo]:
        return [info for info in self.list() if info.autostart]

    def _autostart_names(self) -> builtins.list[MachineName]:
        return [
            item.name for item in bundles.list_bundles(self.layout) if item.boot is not None and item.boot.autostart
        ]

    # Inside -------------------------------------------------------------------------------------------------------

    def _load(self, name: MachineName) -> Machine:
        bundle = Bundle(self.layout, name)
        return self._machine(bundle, bundle.load(), bundle.load_boot())

    def _try_load(self, name: MachineName) -> Machine | None:
        """Load what may be too broken to load: it can still be removed."""
        try:
            return self._load(name)
        except BerthError as error:
            log.debug("machine '%s' can't be read: %s", name, error)
            return None

    def _machine(self, bundle: Bundle, config: MachineConfig, boot: BootConfig) -> Machine:
        try:
            address = addresses.lookup(self.layout, bundle.name)  # writes nothing: `ls` works on a read-only disk
        except NotFoundError:
            # A lost address book costs the address, not the machine.
            address = addresses.allocate(self.layout, bundle.name)
        return Machine(bundle, config, boot, address)

    def _engine(self, machine: Machine) -> Engine:
        return engine_for(machine.config.isolation, self.layout)

    @contextlib.contextmanager
    def exclusive(self, name: MachineName, doing: str) -> Generator[None]:
        """Hold the machine's run.lock: one start, stop, commit or removal at a time; the file says which."""
        path = Bundle(self.layout, name).run_lock
        try:
            with locks.hold(path, timeout_s=_LOCK_S, what=f"machine '{name}'") as fd:
                with contextlib.suppress(OSError):  # on a full disk: it is a word for `ls`, and `rm` must go on
                    os.ftruncate(fd, 0)
                    os.write(fd, doing.encode())
                yield
        except FileNotFoundError:
            if os.path.lexists(self.layout.bundle(name)):
                raise
            raise bundles.machine_not_found(name) from None

    def _doing(self, name: MachineName) -> str | None:
        path = Bundle(self.layout, name).run_lock
        with contextlib.suppress(OSError):
            return path.read_text() if locks.is_held(path) else None
        return None


def _host_port(entry: object) -> int | None:
    match entry:
        case {"host": int(port)}:
            return port
        case _:
            return None


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _directories(path: Path) -> builtins.list[Path]:
    try:
        return [entry for entry in path.iterdir() if entry.is_dir()]
    except FileNotFoundError:
        return []
