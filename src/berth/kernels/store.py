"""The kernels of this user: list, find, choose, fetch, remove. Owns the layout's kernels directory:

    VERSION-ARCH/kernel.json       its record: version, source, sizes and digests (schema 1); written last
    VERSION-ARCH/image             bzImage (amd64) or uncompressed Image (arm64)
    VERSION-ARCH/vmlinux           amd64: uncompressed, with a PVH entry point
    VERSION-ARCH/lib/modules/…     the modules, as depmod indexed them; modules.ext4: the same as a disk
    VERSION-ARCH/e2fsck            a static e2fsck for the guest
    custom-KEY/…                   the like of a `--kernel PATH`, made anew when that file changes
    chosen.json                    what `use` chose, by architecture (schema 1)
    kernels.lock                   held while something is made or removed
    *.partial, *.trash             being made or removed; what a killed command left is swept by the next

Readers need no lock: a directory gets its name when it is whole, and keeps its content. The directory itself is private
(0700), what is in it is readable by all: an unprivileged QEMU opens the descriptors that it inherits anew.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from berth import files, locks
from berth.errors import BerthError, BusyError, InvalidArgumentError, NotFoundError, StateFormatError, UnsupportedError
from berth.kernels import record
from berth.kernels.model import ARCHITECTURES, VERSION, Kernel, version_key
from berth.layout import Layout
from berth.log import log
from berth.progress import Progress, Silent

if TYPE_CHECKING:
    from berth.kernels.gather import Gathered

_PARTIAL = ".partial"
_TRASH = ".trash"
_CUSTOM = "custom-"
_CUSTOM_KEPT = 4
_CHOSEN = "chosen.json"


@dataclasses.dataclass(frozen=True, slots=True)
class StoreLock:
    """Proof that this process alone changes the kernels; only `Kernels` makes one."""

    directory: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A kernel that can't be used, and why; version and arch are what its directory is called."""

    version: str
    arch: str
    path: Path
    error: BerthError


class Kernels:
    """The kernels below one layout."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    # Asking ----------------------------------------------------------------------------------------------------------

    def list(self) -> builtins.list[Kernel]:
        """Return the whole ones, by architecture, the newest first."""
        kernels = [item for item in self._entries() if isinstance(item, Kernel)]
        kernels.sort(key=lambda kernel: version_key(kernel.version), reverse=True)
        return sorted(kernels, key=lambda kernel: kernel.arch)

    def problems(self) -> builtins.list[Problem]:
        """Return those that are damaged; `fetch` makes them whole, `remove` removes them."""
        return [item for item in self._entries() if isinstance(item, Problem)]

    def find(self, arch: str) -> Kernel | None:
        """Return the chosen kernel, else the newest stored; None when there is none."""
        kernels = [kernel for kernel in self.list() if kernel.arch == arch]
        chosen = self.chosen(arch)
        return next((kernel for kernel in kernels if kernel.version == chosen), kernels[0] if kernels else None)

    def chosen(self, arch: str) -> str | None:
        """Return the version that `use` chose; None: the newest. A choice that can't be read is none."""
        return self._choices().get(arch)

    def size(self, kernel: Kernel) -> int:
        """Count the bytes on disk of a stored kernel."""
        found = 0
        for folder, _, names in os.walk(kernel.image.parent):
            found += sum(os.lstat(os.path.join(folder, name)).st_blocks * 512 for name in names)
        return found

    # Changing --------------------------------------------------------------------------------------------------------

    def use(self, version: str | None, arch: str) -> None:
        """Choose the kernel for machines of `arch` from their next start on; None: always the newest.

        Raises NotFoundError when it is not stored.
        """
        if version is not None:
            self._require(version, arch)
        with self._lock(Silent()):
            choices = {key: value for key, value in self._choices().items() if key != arch}
            if version is not None:
                choices[arch] = version
            files.save_json(self._layout.kernels / _CHOSEN, {"chosen": choices}, schema=1)

    def remove(self, version: str, arch: str) -> None:
        """Remove a kernel, damaged or whole. What runs on it goes on. Raises NotFoundError."""
        if not _is_name(version) or not self._path(version, arch).is_dir():
            raise _not_stored(version, arch)
        with self._lock(Silent()) as lock:
            _discard(lock, self._path(version, arch))
        if self.chosen(arch) == version:
            self.use(None, arch)

    def ensure(self, arch: str, progress: Progress) -> Kernel:
        """Find a kernel, or fetch one. Raises what `fetch` does."""
        return self.find(arch) or self.fetch(arch, progress)

    def fetch(self, arch: str, progress: Progress) -> Kernel:
        """Bring the newest kernel of this host's distribution into the store, if it is not there and whole.

        Takes some seconds. Raises UnsupportedError when this host has no source of one, BerthError when it can't be
        had.
        """
        if arch not in ARCHITECTURES:
            raise UnsupportedError(f"there are no kernels for linux/{arch}", hint=f"one of {', '.join(ARCHITECTURES)}")
        from berth.kernels import apt, running  # here, not above: every start of a VM imports this module

        with self._lock(progress) as lock, _folder(lock, f"fetch{_PARTIAL}") as work:
            if not apt.is_there():
                content = _emptied(work / "kernel")
                return self._store(lock, content, running.gather(arch, content, progress), arch, progress)
            failed: BerthError | None = None
            for offer in apt.offers(arch, work, progress):
                stored = self._whole(arch, offer.source)
                if stored:
                    return stored
                content = _emptied(work / "kernel")
                try:
                    gathered = offer.gather(content, progress)
                except BerthError as error:
                    log.debug("%s can't be had: %s", offer.source, error.message)
                    failed = error
                else:
                    return self._store(lock, content, gathered, arch, progress)
            assert failed, "offers ends by an error when it has none"
            raise failed

    def custom(self, path: Path) -> Kernel:
        """Return a person's own kernel: a bzImage, a vmlinux or an Image with everything built in.

        It is copied (and unpacked) once, and again when the file changes. Raises InvalidArgumentError when it is none.
        """
        try:
            status = path.stat()
        except OSError as error:
            raise InvalidArgumentError(f"the kernel {path} can't be read: {error.strerror}") from error
        identity = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        target = self._layout.kernels / f"{_CUSTOM}{hashlib.sha256(repr(identity).encode()).hexdigest()[:24]}"
        with contextlib.suppress(FileNotFoundError, StateFormatError):
            kernel = record.load(target)
            os.utime(target)  # in use: the sweep takes the others first
            return kernel
        from berth.kernels import build

        with self._lock(Silent()) as lock, _folder(lock, f"{target.name}{_PARTIAL}") as work:
            build.copy_custom(path, work, str(path))
            _publish(lock, work, target)
            self._sweep_custom(lock)
        return record.load(target)

    # Within ----------------------------------------------------------------------------------------------------------

    def _path(self, version: str, arch: str) -> Path:
        return self._layout.kernels / f"{version}-{arch}"

    def _entries(self) -> Iterator[Kernel | Problem]:
        try:
            names = sorted(path.name for path in self._layout.kernels.iterdir() if path.is_dir())
        except FileNotFoundError:
            return
        for name in names:
            version, _, arch = name.rpartition("-")
            if name.startswith(_CUSTOM) or arch not in ARCHITECTURES:
                continue  # being made or removed, or nothing of ours
            path = self._layout.kernels / name
            try:
                kernel = record.load(path)
                if (kernel.version, kernel.arch) != (version, arch):
                    yield Problem(version, arch, path, StateFormatError(f"{path} holds another kernel"))
                else:
                    yield kernel
            except BerthError as error:
                yield Problem(version, arch, path, error)
            except OSError as error:
                yield Problem(version, arch, path, StateFormatError(f"{path} can't be read: {error.strerror}"))

    def _require(self, version: str, arch: str) -> Kernel:
        for kernel in self.list():
            if (kernel.version, kernel.arch) == (version, arch):
                return kernel
        raise _not_stored(version, arch)

    def _whole(self, arch: str, source: str) -> Kernel | None:
        """Return the stored kernel that came from `source`, with every byte checked."""
        for kernel in self.list():
            if (kernel.arch, kernel.source) == (arch, source):
                with contextlib.suppress(StateFormatError):
                    return record.load(kernel.image.parent, digests=True)
        return None

    def _store(self, lock: StoreLock, content: Path, gathered: Gathered, arch: str, progress: Progress) -> Kernel:
        from berth.kernels import build

        build.complete(content, gathered, arch, progress)
        target = self._path(gathered.version, arch)
        _publish(lock, content, target)
        return record.load(target)

    def _choices(self) -> dict[str, str]:
        try:
            document = files.load_json(self._layout.kernels / _CHOSEN, schema=1)
        except (FileNotFoundError, StateFormatError) as error:
            log.debug("no kernel is chosen: %s", error)
            return {}
        chosen = document.get("chosen")
        pairs = cast("dict[str, object]", chosen).items() if isinstance(chosen, dict) else ()
        return {key: value for key, value in pairs if isinstance(value, str)}

    @contextlib.contextmanager
    def _lock(self, progress: Progress) -> Generator[StoreLock]:
        """Be the only one who changes the store, and sweep what the dead left."""
        folder = self._layout.kernels
        files.make_private_directory(folder)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locks.hold(folder / "kernels.lock", timeout_s=0))
            except BusyError:
                progress.step("waiting for another berth command that changes the kernels")
                stack.enter_context(locks.hold(folder / "kernels.lock"))
            for left in [*folder.glob(f"*{_PARTIAL}"), *folder.glob(f"*{_TRASH}")]:
                _remove(left)
            yield StoreLock(folder)

    def _sweep_custom(self, lock: StoreLock) -> None:
        found = sorted(lock.directory.glob(f"{_CUSTOM}*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in found[_CUSTOM_KEPT:]:
            _discard(lock, path)


def _is_name(version: str) -> bool:
    return VERSION.fullmatch(version) is not None and not version.startswith(_CUSTOM)


def _not_stored(version: str, arch: str) -> NotFoundError:
    return NotFoundError(f"kernel '{version}' for linux/{arch} not found", hint="berth system kernel ls")


@contextlib.contextmanager
def _folder(lock: StoreLock, name: str) -> Generator[Path]:
    """Make a folder that is gone at the end of the block, unless it was renamed."""
    path = lock.directory / name
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        _remove(path)


def _emptied(path: Path) -> Path:
    _remove(path)
    path.mkdir(mode=0o700)
    return path


def _publish(lock: StoreLock, content: Path, target: Path) -> None:
    """Give a whole kernel its name, in the place of an older build of the same version."""
    if target.exists():
        target.rename(target.with_name(f"{target.name}{_TRASH}"))
    content.rename(target)
    files.sync_directory(lock.directory)
    _remove(target.with_name(f"{target.name}{_TRASH}"))


def _discard(lock: StoreLock, path: Path) -> None:
    """Take the name away, then the content: killed between the two, the rest is swept."""
    with contextlib.suppress(FileNotFoundError):
        trash = path.with_name(f"{path.name}{_TRASH}")
        path.rename(trash)
        files.sync_directory(lock.directory)
        _remove(trash)


def _remove(path: Path) -> None:
    """Remove a folder, or what is left of a file that was being written; absent is fine."""
    import shutil

    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
