"""Files that are whole or absent. Owns atomic writes and the schema check of berth's JSON files; layer 1."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from berth.errors import BerthError, StateFormatError

_PARTIAL = re.compile(r"(.+)\.([0-9]+)\.partial")  # of `write_atomic`


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data`: a reader, or a crash, finds the old file or the new, never half of one.

    One writer at a time, by the caller's lock or by the file's nature; the partial file is removed on failure, and that
    of a writer who was killed by the next one. An OSError names `path`.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        sweep_partials(path.parent, path.name)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):  # of a write it names nothing, else our partial file, which nobody knows
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    sync_directory(path.parent)


def sweep_partials(folder: Path, name: str = "") -> None:
    """Remove what writers of `name` (of any file) in a folder left that were killed; absent is fine.

    The partial file's name holds the process id of its writer.
    """
    for found in os.listdir(folder) if folder.is_dir() else ():
        match = _PARTIAL.fullmatch(found)
        if match and name in ("", match[1]) and not os.path.exists(f"/proc/{match[2]}"):
            (folder / found).unlink(missing_ok=True)


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
