"""What a folder server finds around it: runs inside the namespace, by `userns.start_prepared`, before it is virtiofsd.

Its mount namespace holds the program, /proc, and the one folder, with what must be hidden in it covered. Nothing else
of the host is there to be found, whatever a guest makes of the daemon: the old root is unmounted. A cover can't be
taken away from where the guest is; it does not even see that there is one.
"""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from typing import TypedDict

from berth import rooted, syscalls
from berth.errors import BerthError

SHARED = "/share"  # where the folder is, in there
_NEW_ROOT = "/tmp"  # noqa: S108 (any directory that is always there; covered in our own mount namespace only)
# What a program needs to be executed: itself, its loader, its libraries. /nix and /gnu: NixOS, Guix.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix", "/gnu", "/etc/ld.so.cache", "/proc",
           "/dev/null")  # fmt: skip
# The most that Linux gives one process unless told otherwise; virtiofsd holds one for each file the guest knows of.
_FILES = 1 << 20


class CoverPlan(TypedDict):
    """What stands in the folder in place of something else. path: relative to the folder, without links."""

    path: str
    source: str
    directory: bool
    read_only: bool


class SharePlan(TypedDict):
    """The folder to serve; or, with `file`, the one file of this name."""

    source: str
    file: str | None
    read_only: bool
    covers: list[CoverPlan]


def prepare(share: SharePlan, argv: list[str]) -> list[str]:
    """Build the world that the daemon `argv` will see, and return it. Raises BerthError in words."""
    # The network namespace is empty: the daemon has no use for one.
    syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET)
    # What the host mounts and unmounts below a folder later (a USB disk) shows in the machine too. Not where the
    # folder is read-only: the new mount would not be.
    propagation = syscalls.MS_PRIVATE if share["read_only"] else syscalls.MS_SLAVE
    syscalls.mount(None, "/", None, syscalls.MS_REC | propagation)
    # The host's side first: what is mounted below may cover the place that it comes from.
    tree = _clone(share["source"], read_only=share["read_only"])
    covers = [(cover, _clone(cover["source"], read_only=cover["read_only"])) for cover in share["covers"]]
    needed = [*_SYSTEM, *(path for path in argv[:1] if not path.startswith(tuple(f"{one}/" for one in _SYSTEM)))]
    system = [(path, _clone(path, read_only=path == "/usr")) for path in needed if _is_there(path)]
    links = [(path, os.readlink(path)) for path in needed if os.path.islink(path)]
    syscalls.mount("berth-root", _NEW_ROOT, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "size=1m,mode=755")
    root = os.open(_NEW_ROOT, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for path, target in links:
        os.symlink(target, path.lstrip("/"), dir_fd=root)
    for path, one in system:
        _attach(one, root, path)
    rooted.open_inside(root, "/run/virtiofsd", directory=True, owner=0)  # QEMU's own insists on it
    _attach_share(share, root, tree)
    for cover, one in covers:
        _attach_cover(cover, root, one)
    syscalls.replace_root(_NEW_ROOT)
    flags = syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount(None, "/", None, flags)
    _allow_many_files()
    return argv


def _clone(path: str, *, read_only: bool) -> int:
    """Clone what is mounted at `path`, with all below it; return the detached mount."""
    attributes = syscalls.MOUNT_ATTR_NOSUID | (syscalls.MOUNT_ATTR_RDONLY if read_only else 0)
    if path != "/dev/null":
        attributes |= syscalls.MOUNT_ATTR_NODEV
    try:
        tree = syscalls.open_tree(path, recursive=True)
        syscalls.mount_setattr(tree, set_attr=attributes, recursive=True)
    except OSError as error:
        raise BerthError(f"{path} can't be shared with the machine: {error.strerror}") from error
    return tree


def _is_there(path: str) -> bool:
    return os.path.exists(path) and not os.path.islink(path)


def _attach_share(share: SharePlan, root: int, tree: int) -> None:
    if share["file"] is None:
        _attach(tree, root, SHARED)
        return
    # A folder that holds this file alone.
    os.close(rooted.open_inside(root, SHARED, directory=True, owner=0))
    _attach(tree, root, f"{SHARED}/{share['file']}")


def _attach_cover(cover: CoverPlan, root: int, tree: int) -> None:
    """Put a cover where the plan saw something; where it has gone since, there is nothing to cover."""
    folder = rooted.resolve(root, SHARED)
    with contextlib.suppress(FileNotFoundError):
        place = rooted.resolve(folder, cover["path"])
        if stat.S_ISDIR(os.fstat(place).st_mode) != cover["directory"]:
            raise BerthError(f"{cover['path']}, which must be hidden, has just been replaced")
        syscalls.move_mount(tree, place)
        os.close(place)
    os.close(tree)
    os.close(folder)


def _attach(tree: int, root: int, path: str) -> None:
    directory = stat.S_ISDIR(os.fstat(tree).st_mode)
    target = rooted.open_inside(root, path, directory=directory, owner=0)
    syscalls.move_mount(tree, target)
    os.close(tree)
    os.close(target)


def _allow_many_files() -> None:
    """Raise the limit of open files as far as this user may: root of the host to the kernel's, others to theirs."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (max(hard, _FILES), hard):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return
