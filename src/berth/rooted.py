"""Paths inside a directory that somebody else filled: resolved as if it were /, never outside. Layer 1.

Source: openat2(2), RESOLVE_IN_ROOT.
"""

from __future__ import annotations

import ctypes
import errno
import os
import posixpath

_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_libc = ctypes.CDLL(None, use_errno=True)


def resolve(root: int, path: str, *, flags: int = os.O_PATH | os.O_CLOEXEC) -> int:
    """Open `path` with `root` (a directory descriptor) as its /: links in it can't lead out. Raises OSError."""
    how = _OpenHow(flags=flags, mode=0, resolve=_RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    fd = _libc.syscall(_OPENAT2, root, os.fsencode(path), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(fd)


def open_inside(root: int, path: str, *, directory: bool, owner: int) -> int:
    """Open `path` inside `root` as a place to mount on (O_PATH), made if absent with its parents, owned by `owner`.

    Raises OSError, also when it is of the other kind (ENOTDIR, EISDIR).
    """
    try:
        fd = resolve(root, path)
    except FileNotFoundError:
        fd = _make(root, path, directory=directory, owner=owner)
    if directory != _is_directory(fd):
        os.close(fd)
        number = errno.ENOTDIR if directory else errno.EISDIR
        raise OSError(number, os.strerror(number), path)
    return fd


def _make(root: int, path: str, *, directory: bool, owner: int) -> int:
    parent_path, name = posixpath.split(path.rstrip("/"))
    parent = open_inside(root, parent_path or "/", directory=True, owner=owner)
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent))
        os.chown(name, owner, owner, dir_fd=parent, follow_symlinks=False)
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)


def _is_directory(fd: int) -> bool:
    return (os.fstat(fd).st_mode & 0o170000) == 0o040000
