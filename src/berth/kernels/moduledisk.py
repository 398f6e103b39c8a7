"""The kernel's modules as a read-only disk: what `modprobe` in the guest finds below /lib/modules."""

from __future__ import annotations

import os
from pathlib import Path

from berth.proc import require_program, run

_BLOCK = 4096
# Named one by one, from none on, because what mke2fs makes by itself differs by version and /etc/mke2fs.conf. No
# journal: nobody ever writes here.
_FEATURES = "none,filetype,extent,sparse_super,large_file,dir_index"
_DEADLINE_S = 300.0


def make_module_disk(modules: Path, target: Path) -> None:
    """Make `target`, an ext4 image (0644) with what is in `modules` (``VERSION/…``) at its top, owned by root.

    Raises CommandError, UnsupportedError without mke2fs.
    """
    require_program("mke2fs", package="e2fsprogs")
    run([*_as_root(), *mke2fs_command(modules, target)], timeout_s=_DEADLINE_S, env={"MKE2FS_CONFIG": "/dev/null"})
    target.chmod(0o644)


def mke2fs_command(modules: Path, target: Path) -> list[str]:
    """Say how to make it, sized to what it shall hold. The file is sparse: what is left over takes no space."""
    inodes, size = 0, 0
    for folder, _, names in os.walk(modules):
        inodes += 1 + len(names)
        size += _BLOCK + sum(-(-os.lstat(os.path.join(folder, name)).st_size // _BLOCK) * _BLOCK for name in names)
    total = size + size // 16 + (inodes + 64) * 256 + 4 * 1024 * 1024
    return [
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-I", "256", "-N", str(inodes + 64), "-m", "0",
        "-O", _FEATURES, "-E", "root_owner=0:0,lazy_itable_init=0", "-L", "berth-modules", "-d", str(modules),
        str(target), f"{total // 1024}k",
    ]  # fmt: skip


def _as_root() -> list[str]:
    """Let our files look like root's, as mke2fs copies the owners it sees."""
    if os.geteuid() == 0:
        return []
    require_program("unshare", package="util-linux")
    return ["unshare", "--user", "--map-root-user", "--"]
