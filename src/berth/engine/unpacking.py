"""An image's files in a directory, the beginning of every template: from all its layers, or ahead of the last. Layer 3.

The engines call `unpack`; `adapt` looks into what is unpacked. Ahead means while later layers still download:
`lifecycle.create` makes an `Ahead`, which the pull tells of each layer that is whole and verified, and which hands its
tree to the engine once the image is stored.
It changes when the work is done, and nothing else: where there is none, or it has given up, `unpack` does all of it.

    unpacking/ID/rootfs    a tree that is being made; nobody's template until an engine takes it
    unpacking/ID.lock      held by the berth that makes it. Without a holder the tree is left over, and swept
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from berth import locks, trees, userns
from berth.errors import BerthError, BusyError
from berth.files import make_private_directory
from berth.layout import Layout
from berth.log import log
from berth.progress import Progress

if TYPE_CHECKING:
    from berth.oci.digest import Digest
    from berth.oci.spec import Descriptor

Layers = Sequence[tuple[int, str]]  # open descriptor and media type of each, lowest first

_TICK_S = 0.1
_LAYERS_MAX = 256  # each that waits for its turn is an open descriptor; docker makes at most 127
# With less room than this many times the layers' size, nothing is done ahead: a download must not fail for it.
_ROOM = 8


def find_unpacked(layout: Layout, digest: str) -> Path | None:
    """Find the files of an image that the container engine has unpacked and keeps; ours to read only."""
    template = layout.template(digest)
    return template / "rootfs" if (template / "template.json").exists() else None


def unpack(place: Path, digest: str, layers: Layers, progress: Progress, ahead: Ahead | None = None) -> None:
    """Give the directory `place`, absent or empty, the image's files as `rootfs`.

    In a user namespace, as root too: whatever a layer holds, nothing of it can have the host's rights. After an error
    the directory is half-made and the caller's to remove. Raises what `unpack_layers` does.
    """
    if ahead is None or not ahead.take(digest, place, progress):
        with _new_root(place) as root:
            _apply(root, layers, progress.advance)


def give(fd: int, idmap: userns.IdMap) -> None:
    """Let the namespace's root write what we made; an ordinary user's own files it may write anyway."""
    if os.geteuid() == 0:
        os.fchown(fd, idmap.host_root(), idmap.host_root())


def sweep(layout: Layout) -> None:
    """Remove the trees whose maker was killed."""
    for lock in layout.unpacking.glob("*.lock"):
        with contextlib.suppress(BusyError), locks.hold(lock, timeout_s=0):
            log.debug("sweeping %s", lock)
            trees.delete(lock.with_suffix(""))
            lock.unlink()


class Ahead:
    """The files of one image, unpacked as its layers come, lowest first. What nobody takes is removed at the end.

    `expect` and `arrived` are `pull.Arrivals`. A thread waits for the layer whose turn it is, and has a process of its
    own unpack it with those above it that are there by then.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._digest: Digest | None = None  # of the image, once there is one
        self._place = Path()
        self._root = -1
        self._layers: Sequence[Descriptor] = ()
        self._changed = threading.Condition()  # and the lock of all that follows
        self._missing: set[int] = set()  # layers that have not arrived, by number from 0
        self._waiting: dict[int, int] = {}  # those that have, and wait: number -> descriptor
        self._finished = 0  # layers
        self._done = 0  # bytes
        self._end: Callable[[], None] = _nothing  # ends the process at work
        self._stopped = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and remove what nobody has taken; idempotent."""
        self._stop()
        if self._thread is not None:
            self._thread.join()
        self._stack.close()

    # What a pull tells

    def expect(self, image: Digest, layers: Sequence[Descriptor]) -> None:
        """Begin to unpack an image with these layers, where that makes sense."""
        try:
            if self._digest is not None or not self._is_worth_it(image, layers):
                return
            self._begin()
        except (OSError, BerthError) as error:  # `unpack` will find the same and raise it, at its time
            log.debug("nothing is unpacked ahead: %s", error)
            self._stack.close()
            return
        self._digest, self._layers, self._missing = image, layers, set(range(len(layers)))
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def arrived(self, blob: Digest, open_blob: Callable[[Digest], int]) -> None:
        """Take a layer, wherever in the image it stands."""
        with self._changed:
            for number in [number for number in self._missing if self._layers[number].digest == blob]:
                if not self._stopped:
                    self._take_in(number, blob, open_blob)
            self._changed.notify_all()

    # What an engine asks

    def is_whole(self, digest: str) -> bool:
        """Say whether all of this image has been unpacked."""
        with self._changed:
            return self._digest == digest and self._finished == len(self._layers) and not self._stopped

    def tree(self, digest: str, name: str, progress: Progress) -> int | None:
        """Give the directory with the files of the image `name`, open until `close`, once all are there.

        None when it is not at that image. Raises what unpacking it raised.
        """
        if self._digest != digest:
            return None
        if not self.is_whole(digest):
            progress.step(f"unpacking {name}")
        return self._root if self._wait(progress) else None

    def take(self, digest: str, place: Path, progress: Progress) -> bool:
        """Rename the tree to `place` (absent or empty) once it is whole; False when there is none of this image.

        Raises what unpacking it raised.
        """
        try:
            if self._digest != digest or not self._wait(progress):
                return False
            self._place.rename(place)
            return True
        finally:
            self.close()

    # What is private

    def _is_worth_it(self, image: Digest, layers: Sequence[Descriptor]) -> bool:
        if self._layout.template(image).exists() or self._layout.disk(image).exists():
            return False
        status = os.statvfs(self._layout.data)
        room = status.f_bavail * status.f_frsize
        return 0 < len(layers) <= _LAYERS_MAX and sum(layer.size for layer in layers) * _ROOM <= room

    def _begin(self) -> None:
        make_private_directory(self._layout.unpacking)
        self._place = self._layout.unpacking / f"{os.getpid()}-{os.urandom(4).hex()}"
        lock = self._place.with_suffix(".lock")
        self._stack.enter_context(locks.hold(lock))
        self._stack.callback(lock.unlink)
        self._stack.callback(trees.delete, self._place)
        self._root = self._stack.enter_context(_new_root(self._place))
        self._stack.callback(self._close_waiting)

    def _close_waiting(self) -> None:
        while self._waiting:
            os.close(self._waiting.popitem()[1])

    def _take_in(self, number: int, blob: Digest, open_blob: Callable[[Digest], int]) -> None:
        try:
            self._waiting[number] = open_blob(blob)
            self._missing.remove(number)
        except OSError as error:
            log.debug("unpacking ahead ends: %s", error)
            self._stopped = True

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._end()
            self._changed.notify_all()

    def _wait(self, progress: Progress) -> bool:
        """Wait for the thread's end; say whether the tree is whole."""
        total = sum(layer.size for layer in self._layers)
        with self._changed:
            while not (self._missing or self._stopped or self._error or self._finished == len(self._layers)):
                progress.advance(self._done, total)
                self._changed.wait(_TICK_S)
            if self._error is not None:
                raise self._error
            return self._finished == len(self._layers) and not self._stopped

    # The thread's

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                _apply(
                    self._root, batch, functools.partial(self._advance, self._done),
                    first=self._finished + 1, height=len(self._layers), on_start=self._started,
                )  # fmt: skip
                self._finish(batch)
        except BaseException as error:
            # Raised again by who takes the tree: `take`.
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_batch(self) -> list[tuple[int, str]]:
        """Wait for the layer whose turn it is; return it and those above it that are there. Nothing: it is the end."""
        with self._changed:
            turn = self._finished
            if turn == len(self._layers):
                return []
            self._changed.wait_for(lambda: self._stopped or turn in self._waiting)
            batch: list[tuple[int, str]] = []
            while not self._stopped and turn in self._waiting:
                batch.append((self._waiting[turn], self._layers[turn].media_type))
                turn += 1
            return batch

    def _started(self, end: Callable[[], None]) -> None:
        with self._changed:
            self._end = end
            if self._stopped:
                end()

    def _advance(self, before: int, done: int, total: int | None) -> None:
        del total  # of the batch
        with self._changed:
            self._done = before + done

    def _finish(self, batch: Sequence[tuple[int, str]]) -> None:
        with self._changed:
            self._end = _nothing
            for fd, _ in batch:
                del self._waiting[self._finished]
                os.close(fd)
                self._finished += 1
            self._changed.notify_all()


def _nothing() -> None: ...


@contextlib.contextmanager
def _new_root(place: Path) -> Generator[int]:
    """Make the directory that layers can be unpacked into, and open it."""
    # Closed to the host's other users: what is setuid inside must not be reachable.
    place.mkdir(mode=0o700, exist_ok=True)
    (place / "rootfs").mkdir()
    root = os.open(place / "rootfs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(root, 0o755)
        give(root, userns.plan_idmap(os.getuid(), os.getgid()))
        yield root
    finally:
        os.close(root)


def _apply(
    root: int, layers: Layers, progress: Callable[[int, int | None], None], *,
    first: int = 1, height: int | None = None,
    on_start: Callable[[Callable[[], None]], None] = lambda _end: None,
) -> None:  # fmt: skip
    report = userns.call(
        "berth.oci.unpack:unpack_inside",
        {
            "target_fd": root, "layers": [list(layer) for layer in layers], "devices": "skip",
            "first": first, "height": height,
        },
        idmap=userns.plan_idmap(os.getuid(), os.getgid()),
        pass_fds=[root, *(fd for fd, _ in layers)],
        progress=progress, on_start=on_start,
    )  # fmt: skip
    log.debug("unpacked: %s", report)
