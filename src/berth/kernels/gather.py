"""What a source of kernels hands over, and the rule of what is taken from it. Used by `apt`, `running` and `build`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path

from berth.errors import BerthError, StateFormatError
from berth.kernels.model import VERSION
from berth.kernels.record import E2FSCK

# Where a source puts things, below the folder that it fills.
PACKED_IMAGE = "image.packed"
_TOTAL_MAX = 4 * 1024**3  # bytes; a distribution's full kernel has half a gigabyte
_FILES_MAX = 100_000

_IMAGE = re.compile(r"(?:boot/vmlinu[xz]-([^/]+)|(?:usr/)?lib/modules/([^/]+)/vmlinuz)")
_MODULE = re.compile(
    r"(?:usr/)?lib/modules/([^/]+)/((?:(?:kernel|updates|extra)/.+\.ko(?:\.(?:gz|xz|zst))?)|modules\.[a-z.]+)"
)
_E2FSCK = re.compile(r"(?:usr/)?s?bin/e2fsck\.static")


@dataclasses.dataclass(frozen=True, slots=True)
class Gathered:
    """A kernel in pieces. version: uname's release. source: where it is from, in words that change when it does."""

    version: str
    source: str


class Gatherer:
    """Fills `folder` with what belongs to a kernel, whatever else is offered; everything 0644 and 0755."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bytes = self._files = 0
        self.versions: set[str] = set()

    def place(self, path: str) -> Path | None:
        """Say where a file goes that a source calls `path` (relative to its root); None: it is not wanted."""
        if ".." in path.split("/") or "\0" in path:
            return None
        if _E2FSCK.fullmatch(path):
            return self._folder / E2FSCK
        if (image := _IMAGE.fullmatch(path)) and VERSION.fullmatch(image[1] or image[2]):
            self.versions.add(image[1] or image[2])
            return self._folder / PACKED_IMAGE
        if (module := _MODULE.fullmatch(path)) and VERSION.fullmatch(module[1]):
            return modules_folder(self._folder, module[1]) / module[2]
        return None

    def write(self, target: Path, pieces: Iterable[bytes]) -> None:
        """Write a new file. Raises StateFormatError beyond what any kernel has, BerthError when it is there already."""
        make_folders(target.parent, self._folder)
        self._files += 1
        try:
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileExistsError as error:
            raise BerthError(f"the kernel's packages have {target.name} twice") from error
        with open(fd, "wb") as file:
            for piece in pieces:
                self._bytes += len(piece)
                if self._bytes > _TOTAL_MAX or self._files > _FILES_MAX:
                    raise StateFormatError("the kernel's packages are larger than any kernel")
                file.write(piece)
            os.fchmod(file.fileno(), 0o755 if target.name == E2FSCK else 0o644)

    def version(self) -> str:
        """Return the version of the one kernel that came. Raises BerthError for none, or several."""
        if len(self.versions) != 1:
            found = ", ".join(sorted(self.versions)) or "no kernel"
            raise BerthError(f"the kernel's packages hold {found} instead of one kernel")
        return next(iter(self.versions))


def modules_folder(folder: Path, version: str) -> Path:
    return folder / "lib/modules" / version


def make_folders(path: Path, top: Path) -> None:
    """Make `path` below `top` with its parents, 0755 whatever the umask."""
    if path == top or path.exists():
        return
    make_folders(path.parent, top)
    path.mkdir()
    path.chmod(0o755)
