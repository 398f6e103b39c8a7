"""What an engine is: the code that realises one isolation. Layer 3; `lifecycle` talks to engines through this only.

An engine starts, finds and ends machines; it never decides policy (names, defaults, prompts) and prints nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import IO, TYPE_CHECKING, Literal, Protocol

from berth.bundle import Bundle
from berth.config import BootConfig, MachineConfig
from berth.names import MachineName
from berth.net.addresses import Address
from berth.progress import Progress

if TYPE_CHECKING:
    from berth.engine.unpacking import Ahead, Layers


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """All that an engine needs to know of one machine. has_twin: the host's user is to be one in it, too."""

    bundle: Bundle
    config: MachineConfig
    boot: BootConfig
    address: Address
    has_twin: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Liveness:
    """What an engine finds when it looks for a running machine; made anew each time, never stored.

    state: `broken` means that its processes live, yet the agent does not answer. init_pid: the container's process 1
    as the host sees it; vmm_pid: the VM's QEMU. kernel: the release of a VM's own. started: RFC 3339 UTC.
    limits: what the host could not limit or offer, in words; offline: why it has no internet, when that is known.
    problems: what is wrong with it now, in words.
    """

    state: Literal["stopped", "running", "broken"]
    init_pid: int | None = None
    vmm_pid: int | None = None
    keeper_pid: int | None = None
    kernel: str | None = None
    problems: tuple[str, ...] = ()
    started: str | None = None
    limits: tuple[str, ...] = ()
    offline: str | None = None


STOPPED = Liveness("stopped")


class Engine(Protocol):
    """The seam between `lifecycle` and one isolation. Every method may be called again after a crash."""

    def settle(self, boot: BootConfig) -> BootConfig:
        """Put in what a machine gets of this isolation where `boot` leaves it open; None stays for "no limit"."""
        ...

    def has_template(self, machine: Machine) -> bool:
        """Say whether the machine's image has been unpacked for this engine."""
        ...

    def make_template(self, machine: Machine, layers: Layers, progress: Progress, ahead: Ahead | None = None) -> None:
        """Unpack the image's `layers` (open blob descriptor, media type; bottom first) once; idempotent, atomic.

        ahead: may have done so already, or be at it.
        """
        ...

    def sweep_templates(self) -> None:
        """Remove the templates that a killed berth never finished, unless somebody is making one now."""
        ...

    def start(self, machine: Machine, progress: Progress) -> None:
        """Start the machine; return when its guest agent answers. The caller holds the machine's start lock.

        Raises BerthError in words; nothing of the machine runs then.
        """
        ...

    def find(self, machine: Machine) -> Liveness:
        """Look whether it runs. Quick; never raises for what a guest may have done."""
        ...

    def repair(self, machine: Machine) -> None:
        """Bring back what was killed beside a living machine (agent, keeper). Raises BerthError when it can't."""
        ...

    def wait_stopped(self, machine: Machine, timeout_s: float) -> bool:
        """Wait for the machine's end; say whether it came."""
        ...

    def press_power(self, machine: Machine) -> None:
        """Ask it to power off without its agent, where there is a way; does not wait and does not raise."""
        ...

    def kill(self, machine: Machine) -> None:
        """End the machine at once."""
        ...

    def write_changes(
        self, machine: Machine, out: IO[bytes], *, exclude: Collection[str], live: bool, progress: Progress
    ) -> None:
        """Write what the machine has changed since its image, as a layer, to the empty `out`, which then stands at it.

        exclude: paths below the root, which are left out. A machine that runs stands still meanwhile; live: not for the
        sake of single files, which may be torn then. The caller holds the machine's start lock.
        Raises InvalidStateError when it can't be kept still.
        """
        ...

    def end_stray(self, name: MachineName) -> None:
        """End what runs under the name of a machine whose bundle can't be read, as far as it is this engine's."""
        ...

    def clean(self, machine: Machine) -> None:
        """Remove what a stopped machine left in the runtime directory, the cgroups and the network; idempotent."""
        ...


def ensure_template(
    engine: Engine,
    machine: Machine,
    layers: Callable[[], AbstractContextManager[Layers]],
    progress: Progress,
    ahead: Ahead | None = None,
) -> None:
    """Have the image of a machine unpacked for its engine, and say so as far as there is still something to do.

    layers: opens those of the image, for a block.
    """
    if engine.has_template(machine):
        return
    if ahead is None or not ahead.is_whole(machine.config.image_digest):
        progress.step(f"unpacking {machine.config.image_reference}")
    with layers() as opened:
        engine.make_template(machine, opened, progress, ahead)
