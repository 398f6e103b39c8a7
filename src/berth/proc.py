"""The one door to other programs: `run` and `spawn`. Only importer of `subprocess`; layer 1.

argv is a list, never a shell's text; stdin is /dev/null unless said; the environment is an allow-list; every wait ends.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from berth.errors import CommandError, DeadlineError, UnsupportedError
from berth.log import log

_KEPT = (
    "HOME", "USER", "LOGNAME", "PATH", "TMPDIR", "DBUS_SESSION_BUS_ADDRESS", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip
_TAIL = 8192  # bytes of stderr that an error keeps


@dataclasses.dataclass(frozen=True, slots=True)
class Completed:
    """What a program left: its status (negative: the signal), stdout, stderr."""

    status: int
    stdout: bytes
    stderr: bytes


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Build a program's environment: an allow-list of ours, LC_ALL=C.UTF-8, the sbin folders on PATH, then `extra`."""
    env = {key: os.environ[key] for key in _KEPT if key in os.environ}
    path = env.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":")
    # An ordinary user's PATH on Debian lacks sbin, where ip, nft and mke2fs live.
    path += [folder for folder in ("/usr/local/sbin", "/usr/sbin", "/sbin") if folder not in path]
    return {**env, "PATH": ":".join(path), "LC_ALL": "C.UTF-8", **(extra or {})}


def find_program(name: str) -> Path | None:
    """Find a program on the path that `run` uses; None when it is not installed."""
    # As shutil.which does, whose module takes 2 ms to import: it brings all that archives need.
    for folder in [""] if "/" in name else environment()["PATH"].split(":"):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return Path(path)
    return None


def require_program(name: str, *, package: str) -> Path:
    """Find a program or raise UnsupportedError, which says how to get it. package: Debian's name of what has it."""
    found = find_program(name)
    if found is None:
        raise UnsupportedError(f"{name} is not installed", hint=install_command(package))
    return found


def install_command(package: str) -> str:
    """Say how to install a Debian package; where there is no apt, by what finds out the host's own command."""
    return f"sudo apt-get install {package}" if find_program("apt-get") else "berth system check"


def run(
    argv: Sequence[str],
    *,
    timeout_s: float = 60.0,
    input: bytes | None = None,
    stdin: int | IO[bytes] | None = None,
    stdout: int | IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    success: Sequence[int] = (0,),
) -> Completed:
    """Run a program to its end.

    env: added to `environment()`. stdout: where it goes instead of into the result.
    Raises CommandError for a status not in `success`, DeadlineError after `timeout_s`, UnsupportedError if absent.
    """
    log.debug("run: %s", shlex.join(argv))
    stdin = subprocess.PIPE if input is not None else stdin
    stdout = subprocess.PIPE if stdout is None else stdout
    with spawn(
        argv, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=env, cwd=cwd, pass_fds=pass_fds
    ) as process:
        try:
            out, err = process.communicate(input, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise DeadlineError(f"{argv[0]} did not finish within {timeout_s:g} s") from None
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode not in success:
        raise CommandError(tuple(argv), process.returncode, (err or b"")[-_TAIL:].decode(errors="replace"))
    return Completed(process.returncode, out or b"", err or b"")


def spawn(
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    new_session: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program; the caller owns the process. Unsaid standard files are /dev/null.

    new_session: it is to outlive us (a sidecar): own session, no terminal.
    """
    log.debug("spawn: %s", shlex.join(argv))
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.DEVNULL if stdout is None else stdout,
            stderr=subprocess.DEVNULL if stderr is None else stderr,
            env=environment(env), cwd=cwd, pass_fds=pass_fds, start_new_session=new_session,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise UnsupportedError(f"{argv[0]} is not installed", hint="berth system check") from error


def start_time(pid: int) -> int | None:
    """Return when a process started (clock ticks since boot); None when it is gone, or a zombie.

    With the process id it names a process for good. A process whose first thread has ended lives on in the others, and
    looks like a zombie for a moment when another thread calls execve, as a Go program does.
    Source: proc(5), stat: state, num_threads and starttime are the fields 3, 20 and 22.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    is_ended = fields[0] in (b"Z", b"X") and int(fields[17]) <= 1
    return None if is_ended else int(fields[19])
