"""The throw-away machine that a recipe is carried out in. Owns its life from bundle to layer; `bootable` uses it.

It is a container of the image itself without an init, so berth's agent is its process 1, with the network of all
machines and nothing of the host in it: no home, no twin. Its name begins with a dot: no list shows it, no command takes
it. At most one is there at a time (`Layout.adapt_lock`); what a killed berth left is swept by the next who takes that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Generator, Sequence
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from berth import bundle as bundles
from berth import locks, trees
from berth.adapt.recipes import Recipe, Step
from berth.agent import connect
from berth.bundle import Bundle
from berth.config import BootConfig, HostUser, MachineConfig
from berth.engine.base import Engine, Machine, ensure_template
from berth.engine.select import engine_for
from berth.engine.unpacking import Ahead
from berth.errors import BerthError, BusyError, DeadlineError
from berth.files import make_private_directory
from berth.layout import Layout
from berth.log import log
from berth.names import HIDDEN, MachineName
from berth.net import addresses
from berth.outputs import MemoryOutput
from berth.progress import Progress, Silent
from berth.session import run_into
from berth.units import utc_now
from berth.wire.messages import ExecRequest

if TYPE_CHECKING:
    from berth.images import Images, StoredImage

_LOCK_S = 3600.0
_CONNECT_S = 10.0
_STEP_S = 1800.0  # a slow mirror is no error, one that has stalled is
_KEPT = 16 * 1024  # bytes of a step's output
_LAST_LINES = 4
_LETTERS = 300  # of a line that is shown
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e]")  # nothing of a guest's reaches a terminal as it is
_ENV = ("LC_ALL=C.UTF-8", "TERM=dumb")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
# What berth itself makes in every machine, and what it mounts there: none of it is the recipe's.
_NOT_OURS = (
    "dev", "proc", "sys", "run", "etc/hostname", "etc/hosts", "etc/resolv.conf", "var/lib/berth", "var/lib/docker",
    "var/lib/containers",
)  # fmt: skip


class StepError(BerthError):
    """A step of a recipe failed. `output`: the last lines that it wrote, made safe to show."""

    def __init__(self, step: Step, how: str, output: str, *, hint: str | None = None) -> None:
        said = f": {output}" if output else ""
        super().__init__(f"{step.say} failed ({os.path.basename(step.argv[0])} {how}){said}", hint=hint)
        self.output = output


@contextlib.contextmanager
def adapting(layout: Layout, progress: Progress) -> Generator[None]:
    """Be the only one who adapts images, and sweep what the dead left."""
    make_private_directory(layout.data)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.hold(layout.adapt_lock, timeout_s=0, what="adapting"))
        except BusyError:
            progress.step("waiting for another berth command that adapts an image")
            stack.enter_context(locks.hold(layout.adapt_lock, timeout_s=_LOCK_S, what="adapting"))
        _sweep(layout)
        yield


def sweep(layout: Layout) -> None:
    """Remove the throw-away machine that a killed berth has left, unless one is at work."""
    with contextlib.suppress(BusyError), locks.hold(layout.adapt_lock, timeout_s=0, what="adapting"):
        _sweep(layout)


@contextlib.contextmanager
def workshop(
    layout: Layout, images: Images, image: StoredImage, progress: Progress, ahead: Ahead | None = None
) -> Generator[Workshop]:
    """Start a throw-away machine of `image`; nothing of it is left at the end. `adapting` is held."""
    name = MachineName(f"{HIDDEN}{secrets.token_hex(4)}")
    config = MachineConfig(
        name=name, id=os.urandom(16).hex(), image_reference=image.reference or image.digest, image_digest=image.digest,
        platform=image.platform, isolation="container", created=utc_now(), user=HostUser.current(), init=(),
    )  # fmt: skip
    boot = BootConfig(home_mount="none", ssh_agent=False)
    layout.agent_socket(name)  # refuses a path too long
    with bundles.create(layout, config, boot):
        address = addresses.allocate(layout, name)
    machine = Machine(Bundle(layout, name), config, boot, address, has_twin=False)
    engine = engine_for("container", layout)
    try:
        ensure_template(engine, machine, lambda: images.opened_layers(image), progress, ahead)
        progress.step(f"starting {config.image_reference} to adapt it")
        engine.start(machine, Silent())
        offline = engine.find(machine).offline
        if offline:
            progress.note(offline)
        yield Workshop(layout, engine, machine, offline)
    finally:
        _remove(layout, engine, machine)


@dataclasses.dataclass(frozen=True, slots=True)
class Workshop:
    """A running throw-away machine. offline: why it has no internet, and the cure."""

    layout: Layout
    engine: Engine
    machine: Machine
    offline: str | None = None

    def run(self, step: Step, recipe: Recipe) -> None:
        """Run one step to its end, as root. Raises StepError."""
        log.debug("adapting: %s", step.argv)
        env = (*_ENV, *recipe.env, *_proxies())
        request = ExecRequest(
            argv=tuple(map(os.fsencode, step.argv)), env=tuple(map(os.fsencode, env)), cwd=b"/", user="root"
        )
        tail = _Tail()
        sock = connect(self.layout.agent_socket(self.machine.config.name), timeout_s=_CONNECT_S)
        try:
            status = run_into(sock, request, tail, timeout_s=_STEP_S)
        except DeadlineError:
            raise StepError(step, f"did not end within {_STEP_S:g} s", tail.text(), hint=self.offline) from None
        except BerthError as error:  # it did not start, or the machine ended
            raise StepError(step, "could not be run", error.message) from error
        if status:
            raise StepError(step, f"ended with status {status}", tail.text(), hint=self.offline)

    def finish(self, out: IO[bytes]) -> None:
        """End the machine and write what was changed in it as a layer to the empty `out`, which then stands at it."""
        self.engine.kill(self.machine)
        self.engine.clean(self.machine)
        self.engine.write_changes(self.machine, out, exclude=_NOT_OURS, live=False, progress=Silent())


class _Tail(MemoryOutput):
    """Keeps only the last bytes of what a command writes."""

    def write(self, data: memoryview) -> int:
        self.data += data[-_KEPT:]
        if len(self.data) > 2 * _KEPT:
            del self.data[:-_KEPT]
        return len(data)

    def text(self) -> str:
        """Return the last lines, in one."""
        lines = self.data[-_KEPT:].decode(errors="replace").replace("\r", "\n").splitlines()
        shown = [_ESCAPES.sub("", line).strip()[:_LETTERS] for line in lines]
        return "; ".join([line for line in shown if line][-_LAST_LINES:])


def _proxies() -> Sequence[str]:
    """Say which proxies of ours a machine can use as well: those that don't listen on our loopback."""
    found = {key: os.environ[key] for key in _PROXIES if os.environ.get(key)}
    return [f"{key}={value}" for key, value in found.items() if "no_proxy" in key.lower() or not _is_loopback(value)]


def _is_loopback(url: str) -> bool:
    try:
        host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except ValueError:
        return True
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _remove(layout: Layout, engine: Engine, machine: Machine) -> None:
    engine.kill(machine)
    engine.clean(machine)
    _forget(layout, machine.config.name)


def _forget(layout: Layout, name: MachineName) -> None:
    shutil.rmtree(layout.live(name), ignore_errors=True)
    addresses.release(layout, name)
    with contextlib.suppress(BerthError):
        trees.delete(bundles.delete(layout, name))


def _sweep(layout: Layout) -> None:
    """Remove throw-away machines; the lock is held, so none of them is anybody's."""
    engine = engine_for("container", layout)
    for listed in bundles.list_hidden(layout):
        log.debug("sweeping %s", listed.bundle.path)
        if listed.config is not None and listed.boot is not None:
            address = addresses.allocate(layout, listed.name)
            machine = Machine(listed.bundle, listed.config, listed.boot, address, has_twin=False)
            _remove(layout, engine, machine)
        else:
            engine.end_stray(listed.name)
            _forget(layout, listed.name)
