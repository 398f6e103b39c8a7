"""User namespaces that are made for their id map alone, by which idmapped mounts are told. Layer 1.

Called in processes of `berth.inside` only: they have no threads, so they may fork. Source: mount_setattr(2).
"""

from __future__ import annotations

import os

from berth import syscalls, userns


def open_userns(idmap: list[list[list[int]]]) -> int:
    """Make a user namespace only for its id map, which idmapped mounts are told by; return its descriptor."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(ready[1], b".")
            os.close(go[1])
            os.read(go[0], 1)
        finally:
            os._exit(0)
    os.close(ready[1])
    os.read(ready[0], 1)
    for kind, extents in zip(("uid", "gid"), idmap, strict=True):
        userns.write_map(str(child), kind, [userns.Extent(*extent) for extent in extents])
    fd = os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    for end in (go[0], go[1], ready[0]):
        os.close(end)
    os.waitpid(child, 0)
    return fd
