"""What matters of an image to whoever makes it a machine: its init, distribution, package manager. For `bootable`.

Found out without running anything of it, and remembered per manifest digest in `Layout.inspections`: a digest means the
same content for ever, so what was found once is true for ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from berth import files
from berth.errors import BerthError, StateFormatError
from berth.layout import Layout

if TYPE_CHECKING:
    from berth.images import Images, StoredImage

INIT = "/sbin/init"  # what the engines start
SHELL = "/bin/sh"
_SCHEMA = 1
_OS_RELEASE = (b"etc/os-release", b"usr/lib/os-release")  # source: os-release(5): the first that is there
_MANAGERS = ("apt-get", "dnf", "microdnf", "yum", "zypper", "pacman", "apk", "xbps-install")
_FOLDERS = ("/usr/bin", "/bin", "/usr/sbin", "/sbin")
_WORD = re.compile(r"[A-Za-z0-9._-]{1,64}")


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


def inspect(layout: Layout, images: Images, image: StoredImage) -> Facts:
    """Find out about an image in the store; quick the second time. Raises ImageFormatError for a damaged one."""
    path = layout.inspection(image.digest)
    with contextlib.suppress(OSError, StateFormatError):
        return Facts.from_json(files.load_json(path, schema=_SCHEMA))
    with images.opened_layers(image) as layers:
        facts = read_layers(layers)
    with contextlib.suppress(OSError, BerthError):  # a cache: without it we look again
        files.make_private_directory(layout.cache)
        files.make_private_directory(path.parent)
        files.save_json(path, facts.to_json(), schema=_SCHEMA)
    return facts


def read_layers(layers: Sequence[tuple[int, str]]) -> Facts:
    """Find out about the image of these layers (open descriptor, media type; lowest first)."""
    # Here, because the next create of the same image does not come by.
    from berth.adapt.listing import Listing
    from berth.oci import stream, tar
    from berth.oci.layer import Limits

    listing = Listing(texts=_OS_RELEASE)
    for number, (fd, _) in enumerate(layers, 1):
        where = f"layer {number} of {len(layers)}"
        with stream.opened(fd, where=where, limit=Limits().stream) as data:
            listing.add(tar.TarReader(data), where=where)

    def has(path: str) -> bool:
        found = listing.find(path.encode())
        return found is not None and found.is_program

    texts = (listing.find(path) for path in _OS_RELEASE)
    release = parse_os_release(next((found.text for found in texts if found is not None), b""))
    words = [release.get("ID", "linux"), *release.get("ID_LIKE", "").split()]
    return Facts(
        has_init=has(INIT),
        has_shell=has(SHELL),
        managers=tuple(name for name in _MANAGERS if any(has(f"{folder}/{name}") for folder in _FOLDERS)),
        ids=tuple(word for word in words if _WORD.fullmatch(word))[:8],
        name=release.get("PRETTY_NAME", ""),
    )


def parse_os_release(text: bytes) -> dict[str, str]:
    """Read ``KEY=value`` lines with a shell's quotes; what is none is left out. Source: os-release(5)."""
    import shlex  # here: only a first look at an image needs it

    found: dict[str, str] = {}
    for line in text.decode(errors="replace").splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and key.isidentifier():
            with contextlib.suppress(ValueError):
                words = shlex.split(value)
                found[key] = "".join(char for char in " ".join(words) if char.isprintable())[:200]
    return found
