"""The few system calls that Python 3.11 has no name for. Layer 1; used by `inside`, `userns` and the engines.

Sources: mount(2), umount2(2), unshare(2), setns(2), open_tree(2), move_mount(2), mount_setattr(2), pivot_root(2),
pidfd_getfd(2), prctl(2), keyctl(2);
numbers from the kernel's include/uapi (the new ones are the same on every architecture).
"""

from __future__ import annotations

import ctypes
import errno
import os

CLONE_NEWNS = 0x0002_0000
CLONE_NEWCGROUP = 0x0200_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWNET = 0x4000_0000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x4_0000
MS_SLAVE = 0x8_0000

_OPEN_TREE = 428
_MOVE_MOUNT = 429
_PIDFD_GETFD = 438
_MOUNT_SETATTR = 442
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 0x1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
_MOUNT_ATTR_IDMAP = 0x0010_0000

_MNT_DETACH = 0x2

_KEYCTL = {"x86_64": 250, "aarch64": 219}
_KEYCTL_JOIN_SESSION_KEYRING = 1

_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags`. Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """Enter the namespace behind `fd`, which must be of `kind` (CLONE_NEW…). Raises OSError."""
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """Attach a file system. Raises OSError, which names `target`."""
    _check(_libc.mount(_text(source), _text(target), _text(fstype), ctypes.c_ulong(flags), _text(data)), target)


def unmount(target: str) -> None:
    """Detach the mount at `target`, at once or when its last user leaves. Raises OSError."""
    _check(_libc.umount2(_text(target), _MNT_DETACH), target)


def open_tree(path: str, *, recursive: bool) -> int:
    """Clone the mount (tree) at `path`, detached; return its descriptor. Raises OSError."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return _check(_libc.syscall(_OPEN_TREE, -100, _text(path), ctypes.c_uint(flags)), path)


def move_mount(tree: int, target: int) -> None:
    """Attach the detached mount `tree` on what the descriptor `target` names. Raises OSError."""
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)
    _check(_libc.syscall(_MOVE_MOUNT, tree, b"", target, b"", flags), "move_mount")


def mount_setattr(tree: int, *, set_attr: int = 0, userns: int | None = None, recursive: bool = False) -> None:
    """Change a detached mount: MOUNT_ATTR_* to set, and the user namespace whose map its ids shall go through."""
    attr = _MountAttr(attr_set=set_attr, attr_clr=0, propagation=0, userns_fd=0)
    if userns is not None:
        attr.attr_set |= _MOUNT_ATTR_IDMAP
        attr.userns_fd = userns
    flags = ctypes.c_uint(_AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0))
    size = ctypes.c_size_t(ctypes.sizeof(attr))
    _check(_libc.syscall(_MOUNT_SETATTR, tree, b"", flags, ctypes.byref(attr), size), "mount_setattr")


def replace_root(root: str) -> None:
    """Make the mount at `root` the / of our mount namespace and take all that was mounted before away. Raises OSError.

    We must be in a mount namespace of our own. Source: pivot_root(2), pivot_root(".", ".").
    """
    os.chdir(root)
    _check(_libc.pivot_root(b".", b"."), root)
    _check(_libc.umount2(b".", _MNT_DETACH), root)  # the old root now lies on top of the new
    os.chdir("/")


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Duplicate the descriptor `fd` of another process, close-on-exec. Raises OSError."""
    return _check(_libc.syscall(_PIDFD_GETFD, pidfd, fd, ctypes.c_uint(0)), "pidfd_getfd")


def leave_session_keyring() -> None:
    """Change to a new, empty session keyring, away from the keys of whoever started us. Raises OSError."""
    number = _KEYCTL.get(os.uname().machine, -1)
    try:
        _check(_libc.syscall(ctypes.c_long(number), _KEYCTL_JOIN_SESSION_KEYRING, None), "keyctl")
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a kernel without keys
            raise


def die_with_parent(signal: int) -> None:
    """Ask the kernel to send us `signal` when the thread that started us ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0), "prctl")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def _text(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)
