"""Debian root file systems for tests: bootstrapped from the package mirror, once a day and machine.

They are kept in /var/tmp/berth-tests-UID/DAY, so that a second run is quick; those of two days ago and before are
removed. Yesterday's stay: a run may go on past midnight, and its tests hold paths.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from berth import locks, proc

# What a machine needs beyond Debian's minimum: an init, its bus, and the tools that tests use inside.
SYSTEMD = (
    "systemd", "systemd-sysv", "dbus", "udev", "kmod", "iproute2", "procps", "passwd", "login", "sudo",
    "ca-certificates", "netbase",
)  # fmt: skip
_DEADLINE_S = 900.0


def bootstrap(suite: str, packages: Sequence[str] = SYSTEMD, *, options: Sequence[str] = ()) -> Path:
    """Make (or find) a tar archive of a Debian root file system. Needs root and mmdebstrap; takes 20 s when new.

    suite: `bookworm`, `trixie`, `sid`. options: more of mmdebstrap's.
    """
    command = [
        "mmdebstrap", "--variant=minbase", "--quiet", f"--include={','.join(packages)}",
        # The mirror may be a snapshot, or this machine's clock be ahead of it.
        '--aptopt=Acquire::Check-Valid-Until "false"', *options, suite,
    ]  # fmt: skip
    folder = _today()
    digest = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
    path = folder / f"{suite}-{digest}.tar"
    with locks.hold(folder / "lock"):
        if not path.exists():
            partial = path.with_suffix(".partial.tar")  # mmdebstrap goes by the ending
            try:
                proc.run([*command, str(partial)], timeout_s=_DEADLINE_S)
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
    return path


def _today() -> Path:
    root = Path(f"/var/tmp/berth-tests-{os.geteuid()}")
    now = datetime.datetime.now(datetime.UTC)
    today, yesterday = (root / day.strftime("%Y-%m-%d") for day in (now, now - datetime.timedelta(days=1)))
    today.mkdir(parents=True, exist_ok=True)
    for folder in root.iterdir():
        if folder not in (today, yesterday):
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
    return today
