"""The Python API: `Client`, `Machine`, `Image`. Layer 5; re-exported by `berth`. Synchronous, typed, prints nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from berth.adapt import AdaptMode
from berth.config import BootConfig, apply_assignments
from berth.images import StoredImage
from berth.layout import Layout
from berth.lifecycle import STOP_S, Machines
from berth.machineinfo import MachineInfo
from berth.names import MachineName
from berth.progress import Progress, Silent
from berth.session import run_captured, run_session
from berth.wire.messages import ExecRequest


@dataclasses.dataclass(frozen=True, slots=True)
class Completed:
    """What a command left. status: its exit status, 128+N when signal N ended it; stdout, stderr: if captured."""

    args: tuple[str, ...]
    status: int
    stdout: bytes = b""
    stderr: bytes = b""


class Client:
    """All machines and images of this user; `Machine` and `Image` use one when they are given none.

    layout: other directories than the user's own (`Layout.from_environment()`).
    """

    def __init__(self, layout: Layout | None = None) -> None:
        self.lifecycle = Machines(layout)

    def machines(self) -> list[Machine]:
        """Return every machine, broken ones included."""
        return [Machine(info.name, client=self) for info in self.lifecycle.list()]

    def images(self) -> list[Image]:
        """Return every stored image."""
        return [Image(stored) for stored in self.lifecycle.images.list()]

    def default_machine(self) -> Machine | None:
        """Return the default machine, if there is one."""
        name = self.lifecycle.default()
        return None if name is None else Machine(name, client=self)


class Machine:
    """One machine, by its name. Nothing is cached: every answer is of this moment."""

    def __init__(self, name: str, *, client: Client | None = None) -> None:
        """Name an existing machine. Raises NotFoundError, InvalidArgumentError."""
        self._client = client or Client()
        self.name: MachineName = self._lifecycle.resolve(name)

    @classmethod
    def create(
        cls,
        image: str,
        *,
        name: str | None = None,
        settings: Sequence[str] = (),
        isolation: str = "auto",
        platform: str | None = None,
        adapt: AdaptMode = "auto",
        boot: bool = True,
        set_default: bool = False,
        progress: Progress | None = None,
        client: Client | None = None,
    ) -> Machine:
        """Make a machine from an image and boot it.

        settings: ``key=value`` as for `berth set`: ``["memory=2G", "mount+=/srv/data:ro"]``.
        adapt: ``auto`` gives an image without an init one, ``never`` lets berth's agent be its init.
        Raises ExistsError, InvalidArgumentError, RegistryError, ImageFormatError, UnsupportedError.
        """
        client = client or Client()
        boot_config, _ = apply_assignments(BootConfig(), settings)
        made = client.lifecycle.create(
            image, name=name, boot_config=boot_config, isolation=isolation, platform=platform, boot=boot,
            set_default=set_default, adapt=adapt, progress=progress,
        )  # fmt: skip
        return cls(made, client=client)

    def __repr__(self) -> str:
        return f"Machine({self.name!r})"

    @property
    def _lifecycle(self) -> Machines:
        return self._client.lifecycle

    @property
    def info(self) -> MachineInfo:
        """What `berth inspect` shows. Raises NotFoundError."""
        return self._lifecycle.inspect(self.name)

    def start(self, *, progress: Progress | None = None) -> None:
        """Boot it until its agent answers; a running one is left as it is."""
        self._lifecycle.start(self.name, progress=progress or Silent())

    def stop(self, *, force: bool = False, timeout_s: float = STOP_S) -> None:
        """Power it off; after `timeout_s` seconds, or at once with `force`, end it. Idempotent."""
        self._lifecycle.stop(self.name, force=force, timeout_s=timeout_s)

    def remove(self, *, force: bool = False) -> None:
        """Delete it with its storage. Raises InvalidStateError when it runs and `force` is not set."""
        self._lifecycle.remove(self.name, force=force)

    def wait(self, *, target: str = "agent", timeout_s: float | None = None) -> str:
        """Wait for its `agent`, or until its `init` has settled; return the init's state."""
        return self._lifecycle.wait(self.name, target=target, timeout_s=timeout_s)

    def set(self, *assignments: str) -> None:
        """Change settings, all or nothing: ``machine.set("cpus=2", "memory=1G")``."""
        self._lifecycle.set(self.name, list(assignments))

    def run(
        self,
        args: Sequence[str | bytes],
        *,
        capture: bool = False,
        input: bytes | None = None,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        shell: bool = False,
        timeout_s: float | None = None,
    ) -> Completed:
        """Run a command in it (booted if it is stopped) and wait for its end.

        Without `capture` the command has this process's standard files. cwd: None is this process's working
        directory where the machine has it, else the home. user: ``NAME``, ``UID``, ``NAME:GROUP``; None: the twin.
        Raises StartError (a BerthError) when the command can't be started, DeadlineError after `timeout_s`.
        """
        request = ExecRequest(
            argv=tuple(os.fsencode(word) for word in args),
            shell=shell,
            env=tuple(os.fsencode(f"{key}={value}") for key, value in (env or {}).items()),
            cwd=os.fsencode(cwd or os.getcwd()),
            cwd_optional=cwd is None,
            user=user,
        )
        words = tuple(os.fsdecode(word) for word in args)
        sock = self._lifecycle.connect(self.name)  # closed by the session
        if capture or input is not None:
            captured = run_captured(sock, request, input=input, timeout_s=timeout_s)
            return Completed(words, captured.status, captured.stdout, captured.stderr)
        status = run_session(sock, request, stdin_fd=0, stdout_fd=1, stderr_fd=2, tty=False)
        return Completed(words, status)


class Image:
    """One stored image."""

    def __init__(self, stored: StoredImage) -> None:
        self._stored = stored

    @classmethod
    def pull(
        cls,
        reference: str,
        *,
        platform: str | None = None,
        progress: Progress | None = None,
        client: Client | None = None,
    ) -> Image:
        """Bring an image into the store, from wherever its reference says."""
        images = (client or Client()).lifecycle.images
        return cls(images.ensure(reference, platform=platform, progress=progress or Silent()))

    def __repr__(self) -> str:
        return f"Image({self.reference!r})"

    @property
    def reference(self) -> str:
        return self._stored.reference

    @property
    def digest(self) -> str:
        """The manifest's digest: ``sha256:`` and 64 hex digits."""
        return self._stored.digest

    @property
    def platform(self) -> str:
        return self._stored.platform
