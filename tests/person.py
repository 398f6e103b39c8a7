"""Somebody who runs berth: root or an ordinary user, each with directories of their own, by one interface."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from berth import proc
from berth.layout import Layout
from ordinary import Ordinary


@dataclasses.dataclass(frozen=True, slots=True)
class Person:
    """label: `root` or `user`. command: turns argv, environment and directory into what this process must start.

    isolation: of the machines that are created.
    """

    label: str
    uid: int
    name: str
    home: Path
    layout: Layout
    program: tuple[str, ...]
    python: tuple[str, ...]
    command: Callable[[Sequence[str | bytes], Mapping[str, str], Path | None], list[str | bytes]]
    isolation: str = "container"
    namespace: int | None = None  # the process whose mount namespace the person's commands run in

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    def try_berth(
        self,
        *words: str | bytes,
        input: bytes | None = b"",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 120.0,
    ) -> proc.Completed:
        """Run berth to its end, whatever its status."""
        argv = self.command([*self.program, *words], env or {}, cwd)
        done = subprocess.run(argv, input=input, capture_output=True, timeout=timeout_s, check=False)
        return proc.Completed(done.returncode, done.stdout, done.stderr)

    def berth(
        self,
        *words: str | bytes,
        input: bytes | None = b"",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 120.0,
    ) -> str:
        """Run berth, which must succeed; return its stdout."""
        done = self.try_berth(*words, input=input, env=env, cwd=cwd, timeout_s=timeout_s)
        assert done.status == 0, (
            f"berth {words}: {done.status}\n{done.stdout[-2000:]!r}\n{done.stderr.decode()[-4000:]}"
        )
        return done.stdout.decode()

    def run(self, machine: str, *words: str | bytes, **options: object) -> str:
        """Run a command in a machine, which must succeed; return its stdout."""
        return self.berth("run", "-n", machine, "--", *words, **options)  # type: ignore[arg-type]

    def beside(self, argv: Sequence[str | bytes]) -> list[str | bytes]:
        """Say what this process must start so that root's `argv` sees the mounts that the person sees."""
        return [*(["nsenter", "-t", str(self.namespace), "-m", "--"] if self.namespace else []), *argv]

    def popen(
        self,
        *words: str | bytes,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = subprocess.PIPE,
        stderr: int | IO[bytes] | None = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Start berth; the caller owns the process."""
        return subprocess.Popen(
            self.command([*self.program, *words], {}, None), stdin=stdin, stdout=stdout, stderr=stderr
        )

    def inspect(self, machine: str) -> dict[str, object]:
        return cast("dict[str, object]", json.loads(self.berth("inspect", machine)))

    def pids(self, machine: str) -> dict[str, int]:
        return cast("dict[str, int]", self.inspect(machine)["pids"])

    def main_pid(self, machine: str) -> int:
        """Return the process whose end is the machine's: the container's init, or QEMU."""
        return self.pids(machine)["init" if self.isolation == "container" else "vmm"]

    def take_down(self) -> None:
        """Remove every machine and what the network holds."""
        for name in self.berth("ls", "-q").split():
            self.berth("rm", "--force", name)
        self.script(
            "from berth.layout import Layout; from berth.net.network import teardown; "
            "teardown(Layout.from_environment())"
        )
        left = [path.name for path in self.layout.machines.glob("*")] if self.layout.machines.exists() else []
        assert not left, f"something of a machine is left: {left}"

    def script(self, text: str) -> str:
        """Run a Python script that imports berth, as this person; return its stdout."""
        done = subprocess.run(
            self.command([*self.python, "-c", text], {}, None), capture_output=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()


def as_root(folder: Path, isolation: str = "container") -> Person:
    """Be root, with directories below `folder`."""
    layout = Layout(folder / "data", folder / "run", folder / "config", folder / "cache")
    roots = {
        "BERTH_DATA_DIR": str(layout.data), "BERTH_RUNTIME_DIR": str(layout.runtime),
        "BERTH_CONFIG_DIR": str(layout.config), "BERTH_CACHE_DIR": str(layout.cache),
    }  # fmt: skip
    home = Path(pwd.getpwuid(0).pw_dir)

    def command(argv: Sequence[str | bytes], env: Mapping[str, str], cwd: Path | None) -> list[str | bytes]:
        kept = {key: value for key, value in os.environ.items() if key not in ("SSH_AUTH_SOCK", "LANG", "TERM")}
        values = {**kept, "TERM": "xterm", "LANG": "C.UTF-8", "BERTH_ISOLATION": isolation, **roots, **env}
        return ["env", "-i", f"--chdir={cwd or home}", *(f"{key}={value}" for key, value in values.items()), *argv]

    python = (sys.executable,)
    return Person("root", 0, "root", home, layout, (*python, "-m", "berth"), python, command, isolation)


def as_ordinary(user: Ordinary, isolation: str = "container") -> Person:
    """Be the ordinary user of these tests."""

    def command(argv: Sequence[str | bytes], env: Mapping[str, str], cwd: Path | None) -> list[str | bytes]:
        return user.command(argv, env={"BERTH_ISOLATION": isolation, **env}, cwd=cwd)

    return Person(
        "user", user.uid, user.name, user.home, user.layout, (str(user.berth),), (str(user.python),), command,
        isolation, user.namespace,
    )  # fmt: skip


def fetch(address: str, port: int, *, timeout_s: float = 30.0) -> bytes:
    """Get / of a web server, trying until it answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        connection = http.client.HTTPConnection(address, port, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        finally:
            connection.close()
