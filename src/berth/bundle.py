"""One machine's directory on disk: typed load and save, creation and deletion as transactions.

Owns the names of the files in a bundle (nobody else knows them), the edit lock, and the file that names the default
machine. Layer 2: lifecycle and the engines call it. Nothing that is true only while a machine runs is kept here.

    machines/NAME/config.json        who it is (MachineConfig), written once
    machines/NAME/boot-config.json   how it boots (BootConfig), what `set` changes
    machines/NAME/edit.lock          held for milliseconds by whoever writes the bundle
    machines/NAME/run.lock           held while the machine is started, stopped or removed
    machines/NAME/container/upper    its own files (overlayfs upper), container/work belongs to overlayfs
    machines/NAME/container/plain    directories that need a plain file system: /var/lib/docker, …
    machines/NAME/container/private  what the machine has in place of hidden credentials
    machines/NAME/vm/disk.qcow2      a VM's own root disk, on top of its image's template
    machines/NAME/vm/private         what a VM has in place of hidden credentials
    machines/NAME/logs/console.log   what the console printed
    machines/NAME.partial-XXXX       a bundle that is being made; left over after a crash, swept by the next create
    machines/.adapt-XXXX             the throw-away machine that an image is adapted in (`berth.adapt`); in no list
    machines/.trash-NAME-XXXX        a deleted bundle whose content waits for removal
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Generator, Iterable
from pathlib import Path

from berth import files, locks
from berth.config import BootConfig, MachineConfig
from berth.errors import BerthError, ExistsError, NotFoundError, StateFormatError
from berth.layout import Layout
from berth.log import log
from berth.names import HIDDEN, MachineName, parse_machine_name

SCHEMA = 1  # of config.json and of boot-config.json

_PARTIAL = ".partial-"
_TRASH = ".trash-"
_LOCKS = ("edit.lock", "run.lock")  # made with the bundle: on a full disk it must be possible to remove it
_LOCK_S = 30.0  # edits take milliseconds: who waits longer meets something stuck


@dataclasses.dataclass(frozen=True, slots=True)
class EditLock:
    """Proof that this process alone may write the bundle at `directory`; only `Bundle.edit` and `create` make one."""

    directory: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """One bundle as `list_bundles` found it: both documents, or the problem that kept one from being read."""

    name: MachineName
    bundle: Bundle
    config: MachineConfig | None
    boot: BootConfig | None
    problem: BerthError | None


@dataclasses.dataclass(frozen=True, slots=True)
class Bundle:
    """The directory of one machine, there or not."""

    layout: Layout
    name: MachineName

    @property
    def path(self) -> Path:
        return self.layout.bundle(self.name)

    @property
    def container(self) -> Path:
        return self.path / "container"

    @property
    def upper(self) -> Path:
        return self.container / "upper"

    @property
    def work(self) -> Path:
        return self.container / "work"

    @property
    def plain(self) -> Path:
        return self.container / "plain"

    @property
    def private(self) -> Path:
        return self.container / "private"

    @property
    def vm(self) -> Path:
        return self.path / "vm"

    @property
    def vm_disk(self) -> Path:
        return self.vm / "disk.qcow2"

    @property
    def vm_private(self) -> Path:
        return self.vm / "private"

    @property
    def run_lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def console_log(self) -> Path:
        return self.logs / "console.log"

    def exists(self) -> bool:
        return self.path.is_dir() and not self.path.is_symlink()

    def load(self) -> MachineConfig:
        """Read who the machine is. Raises NotFoundError, StateFormatError (damaged, of a newer berth, not its own)."""
        path = self.path / "config.json"
        config = MachineConfig.from_json(self._load(path), where=str(path))
        if config.name != self.name:
            raise StateFormatError(f"{path} is damaged: it belongs to machine '{config.name}'")
        return config

    def load_boot(self) -> BootConfig:
        """Read how the machine boots. Raises NotFoundError, StateFormatError."""
        path = self.path / "boot-config.json"
        return BootConfig.from_json(self._load(path), where=str(path))

    def _load(self, path: Path) -> dict[str, object]:
        try:
            return files.load_json(path, schema=SCHEMA)
        except FileNotFoundError:
            if not self.exists():
                raise machine_not_found(self.name) from None
            raise StateFormatError(
                f"machine '{self.name}' is damaged: {path} is missing", hint=f"berth rm --force {self.name}"
            ) from None
        except OSError as error:
            raise StateFormatError(f"{path} can't be read: {error.strerror}") from error
        except RecursionError:  # thousands of brackets
            raise StateFormatError(f"{path} is damaged: it is nested too deep") from None

    @contextlib.contextmanager
    def edit(self) -> Generator[EditLock]:
        """Hold the bundle's edit lock: for milliseconds, never across a boot or a pull.

        Raises NotFoundError when there is no such machine, BusyError when the lock is held too long.
        """
        try:
            with locks.hold(self.path / "edit.lock", timeout_s=_LOCK_S, what=f"machine '{self.name}'"):
                yield EditLock(self.path)
        except (FileNotFoundError, NotADirectoryError):
            if self.exists():
                raise
            raise machine_not_found(self.name) from None

    def save_boot(self, lock: EditLock, boot: BootConfig) -> None:
        """Replace the boot configuration; a reader finds the old one or the new. `lock`: of this bundle."""
        assert lock.directory == self.path, "the lock is another bundle's"
        files.save_json(self.path / "boot-config.json", boot.to_json(), schema=SCHEMA)

    def __str__(self) -> str:
        return self.name


def machine_not_found(name: str) -> NotFoundError:
    return NotFoundError(f"machine '{name}' not found", hint="berth ls shows your machines, berth create makes one")


# The machines as a whole ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def machines_lock(layout: Layout) -> Generator[None]:
    """Hold the lock that creating, renaming and deleting bundles needs. Taken before any machine's own lock."""
    files.make_private_directory(layout.data)
    files.make_private_directory(layout.machines)
    with locks.hold(layout.machines_lock, timeout_s=_LOCK_S, what=str(layout.machines)):
        yield


def check_free(layout: Layout, name: MachineName) -> None:
    """Raise ExistsError when a machine (whole or broken) has this name already."""
    if os.path.lexists(layout.bundle(name)):
        raise ExistsError(f"machine '{name}' already exists", hint=f"choose another --name, or berth rm {name}")


@contextlib.contextmanager
def create(layout: Layout, config: MachineConfig, boot: BootConfig) -> Generator[Path]:
    """Make a bundle as a transaction: it is built aside, and has its name only when the block ended well.

    Yields the directory of the partial bundle, for the caller to fill (`container/upper` and the like exist already);
    paths below it change their prefix at the end. On an exception it is renamed to the trash and what this user can
    remove is removed. Raises ExistsError when the name is taken, at once or at the end.
    """
    with machines_lock(layout):
        check_free(layout, config.name)
        _sweep_partials(layout)
        partial = layout.machines / f"{config.name}{_PARTIAL}{os.urandom(4).hex()}"
        partial.mkdir(mode=0o700)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)  # alive: nobody sweeps it while this is held
    try:
        _fill(partial, config, boot)
        yield partial
        with machines_lock(layout):
            check_free(layout, config.name)
            files.sync_directory(partial)
            partial.rename(layout.bundle(config.name))
            files.sync_directory(layout.machines)
    except BaseException:
        _discard(layout, partial)
        raise
    finally:
        os.close(lock)


def _fill(partial: Path, config: MachineConfig, boot: BootConfig) -> None:
    for directory in ("container", "container/upper", "container/work", "container/plain", "container/private", "logs"):
        (partial / directory).mkdir(mode=0o700)
    (partial / "container/upper").chmod(0o755)  # the machine sees this mode on its /, whatever our umask is
    for name in _LOCKS:
        (partial / name).touch(mode=0o600)
    files.save_json(partial / "config.json", config.to_json(), schema=SCHEMA)
    files.save_json(partial / "boot-config.json", boot.to_json(), schema=SCHEMA)


def delete(layout: Layout, name: MachineName) -> Path:
    """Take a bundle's name away and forget it as the default; return the trash directory, whose content remains.

    The caller removes that (`trash` finds it again after a crash): files of the machine's own users need a user
    namespace. Raises NotFoundError.
    """
    with machines_lock(layout):
        source = layout.bundle(name)
        trash = _trash_path(layout, name)
        was_default = find_default(layout) == name
        try:
            source.rename(trash)
        except FileNotFoundError:
            raise machine_not_found(name) from None
        files.sync_directory(layout.machines)
        if was_default:
            layout.default_machine.unlink(missing_ok=True)
    return trash


def trash(layout: Layout) -> list[Path]:
    """List what is to be removed: deleted bundles, failed creates, and creates whose process died.

    A default that is no machine any more, which everybody ignores, is forgotten: its deletion was killed halfway.
    """
    with machines_lock(layout):
        _sweep_partials(layout)
        if find_default(layout) is None:
            layout.default_machine.unlink(missing_ok=True)
        return sorted(path for path in layout.machines.iterdir() if path.name.startswith(_TRASH))


def _trash_path(layout: Layout, name: str) -> Path:
    return layout.machines / f"{_TRASH}{name}-{os.urandom(4).hex()}"


def _sweep_partials(layout: Layout) -> None:
    """Move bundles whose maker died to the trash; the machines lock is held."""
    for path in layout.machines.iterdir():
        if _PARTIAL in path.name and not path.name.startswith(".") and not _is_alive(path):
            log.debug("sweeping %s", path)
            _discard(layout, path)


def _is_alive(partial: Path) -> bool:
    try:
        fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _discard(layout: Layout, partial: Path) -> None:
    """Rename a partial bundle to the trash and remove it where that takes no user namespace (nothing in it yet)."""
    doomed = _trash_path(layout, partial.name.partition(_PARTIAL)[0])
    with contextlib.suppress(OSError):
        partial.rename(doomed)
        _remove_small(doomed)


def _remove_small(directory: Path) -> None:
    """Remove what `_fill` made. Anything a caller added stays, with its parents: `trash` lists it."""
    for folder in ("container/upper", "container/work", "container/plain", "container/private"):
        (directory / folder).rmdir()
    for name in ("config.json", "boot-config.json", *_LOCKS):
        (directory / name).unlink(missing_ok=True)
    for folder in ("container", "logs", "."):
        (directory / folder).rmdir()


def list_bundles(layout: Layout) -> list[Listed]:
    """Read every bundle, by name. What can't be read is listed with its problem, never skipped, never raised."""
    try:
        entries = sorted(entry.name for entry in os.scandir(layout.machines))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BerthError(f"{layout.machines} can't be read: {error.strerror}") from error
    found = (_read(layout, name) for name in _names(entries))
    return [listed for listed in found if listed is not None]


def list_hidden(layout: Layout) -> list[Listed]:
    """Read the bundles of throw-away machines, which are no machines to anybody else."""
    try:
        entries = sorted(entry.name for entry in os.scandir(layout.machines) if entry.name.startswith(HIDDEN))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (_read(layout, MachineName(name)) for name in entries)
    return [listed for listed in found if listed is not None]


def _names(entries: Iterable[str]) -> Generator[MachineName]:
    for entry in entries:
        with contextlib.suppress(BerthError):
            yield parse_machine_name(entry)


def _read(layout: Layout, name: MachineName) -> Listed | None:
    bundle = Bundle(layout, name)
    config: MachineConfig | None = None
    boot: BootConfig | None = None
    problem: BerthError | None = None
    try:
        config = bundle.load()
    except NotFoundError:
        if not os.path.lexists(bundle.path):
            return None  # deleted since we read the directory
        problem = StateFormatError(f"{bundle.path} is damaged: it is no directory", hint=f"rm {bundle.path}")
    except BerthError as error:
        problem = error
    try:
        boot = bundle.load_boot()
    except BerthError as error:
        problem = problem or error
    return Listed(name, bundle, config, boot, problem)


def find_default(layout: Layout) -> MachineName | None:
    """Return the default machine's name; None when there is none, or when the file or the machine is no good."""
    try:
        name = parse_machine_name(layout.default_machine.read_text("ascii").strip())
    except (OSError, ValueError, BerthError):
        return None
    return name if os.path.lexists(layout.bundle(name)) else None


def set_default(layout: Layout, name: MachineName) -> None:
    """Make `name` the default machine. Raises NotFoundError."""
    with machines_lock(layout):
        if not Bundle(layout, name).exists():
            raise machine_not_found(name)
        files.write_atomic(layout.default_machine, f"{name}\n".encode())


def set_default_if_none(layout: Layout, name: MachineName) -> None:
    """Make `name` the default machine when there is none: the first machine."""
    with machines_lock(layout):
        if find_default(layout) is None:
            files.write_atomic(layout.default_machine, f"{name}\n".encode())
