"""Files that are whole or absent. Owns atomic writes and the schema check of berth's JSON files; layer 1."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from berth import locks
from berth.errors import BerthError, BusyError, StateFormatError

_PARTIAL = ".partial"
_TURN_S = 60.0  # a write takes milliseconds


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data`: a reader, or a crash, finds the old file or the new, never half of one.

    Writers take turns at one partial file beside it, so that the next one writes over what a killed one left; it is
    removed on failure. An OSError names `path`. Raises BusyError when another writer is stuck.
    """
    partial = path.with_name(f"{path.name}{_PARTIAL}")
    try:
        with locks.hold(partial, timeout_s=_TURN_S, what=str(path)) as fd:
            try:
                with open(fd, "wb", closefd=False) as file:
                    os.ftruncate(fd, 0)
                    os.fchmod(fd, mode)
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as error:  # of a write it names nothing, else our partial file, which nobody knows
        raise type(error)(error.errno, error.strerror, str(path)) from error
    sync_directory(path.parent)


def sweep_partials(folder: Path) -> None:
    """Remove what killed writers left in a folder of files that nobody writes again; an absent folder is fine."""
    for path in folder.glob(f"*{_PARTIAL}"):
        if path.is_file() and not path.is_symlink():
            # Held: nobody is at it, and who comes now waits for us and begins anew.
            with contextlib.suppress(BusyError), locks.hold(path, timeout_s=0):
                path.unlink()


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def save_json(path: Path, document: Mapping[str, object], *, schema: int) -> None:
    """Write `document` with its schema number, atomically."""
    text = json.dumps({"schema": schema, **document}, indent=2, ensure_ascii=True)
    write_atomic(path, text.encode() + b"\n")


def load_json(path: Path, *, schema: int) -> dict[str, object]:
    """Read one of berth's own JSON files, whose schema must be `schema`.

    Raises:
        FileNotFoundError: it is not there.
        StateFormatError: it is damaged, or written by a newer berth.
    """
    try:
        document: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StateFormatError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise StateFormatError(f"{path} is damaged: it is no JSON object")
    members = cast("dict[str, object]", document)
    found = members.get("schema")
    if isinstance(found, int) and found > schema:
        raise StateFormatError(
            f"{path} was written by a newer berth (schema {found}, this one reads {schema})", hint="upgrade berth"
        )
    if found != schema:
        raise StateFormatError(f"{path} is damaged: it has no valid schema number")
    return members


def make_private_directory(path: Path) -> None:
    """Ensure a directory that only this user can enter (0700); its parents are made too, 0755. Idempotent.

    Raises BerthError when somebody else owns it or it is a symbolic link.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise BerthError(f"{path} is not a directory of this user's own")
    if stat.S_IMODE(status.st_mode) != 0o700:
        path.chmod(0o700)
