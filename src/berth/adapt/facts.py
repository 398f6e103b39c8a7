"""What matters of an image to whoever makes it a machine: its init, distribution, package manager. For `bootable`.

Found out without running anything of it, and remembered per manifest digest in `Layout.inspection`: a digest means the
same content for ever, so what was found once is true for ever. Read from the image's files where they are unpacked
already, which takes a millisecond, else from its layers. `images` asks for what a list shows, `cli` for a hint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import cast

from berth import files
from berth.engine.unpacking import Layers, find_unpacked
from berth.errors import BerthError, StateFormatError
from berth.host import parse_os_release
from berth.layout import Layout

INIT = "/sbin/init"  # what the engines start
SHELL = "/bin/sh"
_SCHEMA = 1
_OS_RELEASE = ("/etc/os-release", "/usr/lib/os-release")  # source: os-release(5): the first that is there
_MANAGERS = ("apt-get", "dnf", "microdnf", "yum", "zypper", "pacman", "apk", "xbps-install")
_FOLDERS = ("/usr/bin", "/bin", "/usr/sbin", "/sbin")
_WORD = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TEXT_MAX = 64 * 1024  # bytes of an os-release that is believed
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """has_init: /sbin/init leads to a program inside the image. managers: package managers that are there.

    ids: os-release's ID, then those of ID_LIKE, the nearest first. name: what the distribution calls itself.
    """

    has_init: bool
    has_shell: bool
    managers: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    name: str = ""

    def to_json(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "managers": list(self.managers), "ids": list(self.ids)}

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> Facts:
        """Read what `to_json` made. Raises StateFormatError."""
        match document:
            case {
                "has_init": bool(init),
                "has_shell": bool(shell),
                "managers": list(),
                "ids": list(),
                "name": str(name),
            }:
                managers, ids = (cast("list[object]", document[key]) for key in ("managers", "ids"))
                return cls(init, shell, tuple(map(str, managers)), tuple(map(str, ids)), name)
            case _:
                raise StateFormatError("these are no facts of an image")


def inspect(
    layout: Layout,
    digest: str,
    layers: Callable[[], AbstractContextManager[Layers]],
    unpacked: Callable[[], int | None] = lambda: None,
) -> Facts:
    """Find out about the image of this manifest; quick the second time. Raises ImageFormatError for a damaged one.

    layers: opens them, for a block. unpacked: gives the directory of its files, open, where somebody unpacks them now.
    """
    found = recall(layout, digest)
    if found is None:
        found = _look(unpacked())
        if found is None:
            with layers() as opened:
                found = read_layers(opened)
        _remember(layout, digest, found)
    return found


def recall(layout: Layout, digest: str) -> Facts | None:
    """Say what is known of an image, or can be seen at once in its files; None when only its layers would tell."""
    with contextlib.suppress(OSError, StateFormatError):
        return Facts.from_json(files.load_json(layout.inspection(digest), schema=_SCHEMA))
    found: Facts | None = None
    place = find_unpacked(layout, digest)
    if place is not None:
        root = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = _look(root)
        finally:
            os.close(root)
    if found is not None:
        _remember(layout, digest, found)
    return found


def _remember(layout: Layout, digest: str, facts: Facts) -> None:
    path = layout.inspection(digest)
    with contextlib.suppress(OSError, BerthError):  # a cache: without it we look again
        files.make_private_directory(layout.cache)
        files.make_private_directory(path.parent)
        files.save_json(path, facts.to_json(), schema=_SCHEMA)


def read_layers(layers: Layers) -> Facts:
    """Find out about the image of these layers (open descriptor, media type; lowest first)."""
    # Here, because the next create of the same image does not come by.
    from berth.adapt.listing import Listing
    from berth.oci import stream, tar
    from berth.oci.layer import Limits

    listing = Listing(texts=[path.strip("/").encode() for path in _OS_RELEASE])
    for number, (fd, _) in enumerate(layers, 1):
        where = f"layer {number} of {len(layers)}"
        with stream.opened(fd, where=where, limit=Limits().stream) as data:
            listing.add(tar.TarReader(data), where=where)

    def has(path: str) -> bool:
        found = listing.find(path.encode())
        return found is not None and found.is_program

    def text(path: str) -> bytes | None:
        found = listing.find(path.encode())
        return None if found is None else found.text

    return _conclude(has, text)


def read_tree(root: int) -> Facts:
    """Find out about the image whose files lie in the directory `root`. No link in it leads out, no file can block us.

    Raises OSError where something of it is closed to us: its owners are others.
    """
    from berth.rooted import resolve  # here for its import time, as above

    def status_of(path: str) -> os.stat_result | None:
        try:
            place = resolve(root, path)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
        try:
            return os.fstat(place)
        finally:
            os.close(place)

    def has(path: str) -> bool:
        status = status_of(path)
        return (
            status is not None and stat.S_ISREG(status.st_mode) and bool(status.st_mode & 0o111) and status.st_size > 0
        )

    def text(path: str) -> bytes | None:
        status = status_of(path)
        if status is None or not stat.S_ISREG(status.st_mode) or status.st_size > _TEXT_MAX:
            return None
        fd = resolve(root, path, flags=os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(fd, _TEXT_MAX)
        finally:
            os.close(fd)

    return _conclude(has, text)


def _look(root: int | None) -> Facts | None:
    """Read a tree, if there is one and it is open to us."""
    with contextlib.suppress(OSError):
        return None if root is None else read_tree(root)
    return None


def _conclude(has: Callable[[str], bool], text: Callable[[str], bytes | None]) -> Facts:
    """has: says whether a path leads to a program. text: gives what is in the file that it leads to; None for none."""
    found = next((data for data in map(text, _OS_RELEASE) if data is not None), b"")
    release = parse_os_release(found.decode(errors="replace"))
    words = [release.get("ID", "linux"), *release.get("ID_LIKE", "").split()]
    return Facts(
        has_init=has(INIT),
        has_shell=has(SHELL),
        managers=tuple(name for name in _MANAGERS if any(has(f"{folder}/{name}") for folder in _FOLDERS)),
        ids=tuple(word for word in words if _WORD.fullmatch(word))[:8],
        name="".join(char for char in release.get("PRETTY_NAME", "") if char.isprintable())[:200],
    )
