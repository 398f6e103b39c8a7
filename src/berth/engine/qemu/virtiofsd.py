"""virtiofsd, the program that serves a folder of the host to a VM: where it is, of which kind, how it is started.

Two programs bear the name: QEMU's own in C (until QEMU 7.2: Debian 12, Ubuntu 22.04) and its successor in Rust. Pure
but for the search; used by `shares` and by `berth system check`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

from berth.errors import UnsupportedError
from berth.host import parse_version
from berth.proc import find_program, run

# Distributions keep it off PATH: it is no command for people. The C one comes last, where both are there.
PLACES = (
    "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/virtiofsd/virtiofsd", "/usr/lib/qemu/virtiofsd",
    "/usr/libexec/qemu/virtiofsd",
)  # fmt: skip
_DEADLINE_S = 10.0
# What the daemon may do as root of its namespace. It acts with the ids of whoever calls in the guest, so it changes
# ids and owners; but it needs no device nodes, which the host's file system would keep, and no file capabilities.
_DROPPED_CAPABILITIES = ("mknod", "setfcap")


@dataclasses.dataclass(frozen=True, slots=True)
class Virtiofsd:
    """One installed virtiofsd. options: its long options, which differ by version (of the Rust one)."""

    path: Path
    kind: Literal["rust", "c"]
    version: str
    options: frozenset[str] = frozenset()


def find_virtiofsd() -> Virtiofsd | None:
    """Find a virtiofsd that works, on PATH or where distributions hide it; None when there is none. Starts it, 5 ms."""
    on_path = find_program("virtiofsd")
    for path in [*([on_path] if on_path else []), *map(Path, PLACES)]:
        if os.access(path, os.X_OK) and path.is_file():
            return parse_virtiofsd(path, _ask(path, "--version"), _ask(path, "--help"))
    return None


def _ask(path: Path, word: str) -> str:
    done = run([str(path), word], timeout_s=_DEADLINE_S, success=range(256))
    return (done.stdout + done.stderr).decode(errors="replace")


def require_virtiofsd() -> Virtiofsd:
    """Find a virtiofsd. Raises UnsupportedError, which says how to get one."""
    found = find_virtiofsd()
    if found is None:
        raise UnsupportedError(
            "virtiofsd is not installed: VMs can't see folders of the host",
            hint="berth system check says how to get it here (or do without: --home-mount none)",
        )
    return found


def parse_virtiofsd(path: Path, version: str, usage: str) -> Virtiofsd:
    """Tell the two kinds apart by what they say to --version and --help."""
    # The C one takes its options by -o as FUSE programs do; the Rust one has --shared-dir and knows -o for its sake.
    kind: Literal["rust", "c"] = "rust" if "--shared-dir" in usage else "c"
    words = usage.replace("=", " ").replace(",", " ").split()
    options = frozenset(word for word in words if word.startswith("--"))
    # An ordinary user hears of setgroups() from the C one, and no version.
    return Virtiofsd(path, kind, (None if "setgroups() failed" in version else parse_version(version)) or "", options)


def virtiofsd_command(daemon: Virtiofsd, *, shared: str, listener: int, read_only: bool) -> list[str]:
    """Say how to serve the folder `shared` to who connects to the listening descriptor `listener`.

    It runs as root of a mount namespace that holds little else (`sharing`), and still changes its root directory to
    the folder: no path, no `..` and no link leads out, and links are resolved by the guest anyway.

    - cache=auto: the guest keeps data while a file is not opened anew. `none` has no shared mmap (sqlite, git,
      linkers), `always` would never see the host's changes.
    - timeout=0: names and attributes are asked for each time, for `echo x > f; berth run cat f` has to see x. The Rust
      one can't be told so and keeps them for a second.
    - no write-back: what a program in the machine has written, the host sees at once, with the right mtime (make).
    - no remote locks: flock and fcntl hold between the processes of the machine. The daemon can't wait for a lock
      without blocking its queue, and so refuses those that wait: git and sqlite would fail.
    - no xattr: each write would ask for security.capability first; nothing that a home is used for needs them.
    - submounts are announced: what is mounted below the folder gets a device number of its own, so that no two files
      seem to be one (find, tar, git).
    """
    capabilities = ":".join(f"-{name}" for name in _DROPPED_CAPABILITIES)
    if daemon.kind == "c":
        modes = (
            "sandbox=chroot", "cache=auto", "timeout=0", "announce_submounts", "no_writeback",
            "no_posix_lock", "no_flock", "no_xattr", f"modcaps={capabilities}", "log_level=err",
        )  # fmt: skip
        return [
            str(daemon.path), "-f", f"--fd={listener}", "-o", f"source={shared}", "-o", ",".join(modes),
            "--rlimit-nofile=0",  # as high as it can be: `sharing` has seen to it
        ]  # fmt: skip
    argv = [
        str(daemon.path), f"--fd={listener}", f"--shared-dir={shared}", "--sandbox=chroot", "--cache=auto",
        "--announce-submounts", "--inode-file-handles=never", f"--modcaps={capabilities}", "--log-level=error",
        "--rlimit-nofile=0",
    ]  # fmt: skip
    # Younger than the rest. The mount is read-only in any case.
    return argv + (["--readonly"] if read_only and "--readonly" in daemon.options else [])
