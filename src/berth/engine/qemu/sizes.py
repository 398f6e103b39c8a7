"""How large what is: the template that a disk gets, the processors and the memory of a VM that was given no number.

Pure arithmetic but for the host's own size; shared by `engine`, `templates`, and by `mkfs`, which measures the image.
"""

from __future__ import annotations

import os

from berth.errors import InvalidArgumentError
from berth.units import GIB, MIB, format_size

DEFAULT_DISK = 64 * GIB
# An ext4 file system grows while it is mounted but never shrinks, so a disk needs a template no larger than itself.
# A few sizes only, so that disks share them; those beyond the default are for images that fit in no smaller one.
SIZES = tuple(4**power * GIB for power in range(7))  # 1 GiB … 4 TiB
MOST_CPUS = 4
MOST_MEMORY = 4 * GIB
MAX_DISK = 256 * 1024 * GIB  # qcow2's first table is 4 MiB then; ext4 goes further
BYTES_PER_INODE = 16384  # mke2fs's own habit

_ROOM = 128 * MIB  # the journal, the tables of the smallest template, and something to boot with


def disk_size(wanted: int | None) -> int:
    """Say how large the disk is that `set disk=` asks for (None: the default), in whole MiB.

    Raises InvalidArgumentError when it is larger than a disk can be.
    """
    size = DEFAULT_DISK if wanted is None else -(-wanted // MIB) * MIB
    if size > MAX_DISK:
        raise InvalidArgumentError(
            f"invalid disk size '{format_size(size)}': at most {format_size(MAX_DISK)} are possible"
        )
    return size


def find_size(disk: int, content: int) -> int | None:
    """Find the size of template for a disk of `disk` bytes and an image that takes `content`; None: it does not fit.

    The largest up to the default, so that few guests have to grow theirs.
    """
    fitting = [size for size in SIZES if _needed(content) <= size <= disk]
    usual = [size for size in fitting if size <= DEFAULT_DISK]
    return usual[-1] if usual else next(iter(fitting), None)


def least_size(content: int) -> int | None:
    """Say what the smallest disk is that an image of `content` bytes fits in; None when there is none."""
    return next((size for size in SIZES if _needed(content) <= size), None)


def template_size(wanted: int | None, content: int) -> int:
    """Choose for what `set disk=` asks for. Raises InvalidArgumentError, which names the least size."""
    disk = disk_size(wanted)
    found = find_size(disk, content)
    if found is None:
        least = least_size(content)
        raise InvalidArgumentError(
            f"a disk of {format_size(disk)} is too small for this image, which takes {format_size(content)}",
            hint=f"give it {format_size(least)} or more: disk={format_size(least)}" if least else None,
        )
    return found


def _needed(content: int) -> int:
    # A fifth stays free, also of the inodes: a machine that can't write anything is of no use.
    return content + content // 4 + _ROOM


def default_cpus() -> int:
    """Say how many CPUs a VM gets that was not given a number: the host's, but not so many that all have to be up."""
    return min(MOST_CPUS, len(os.sched_getaffinity(0)))


def default_memory() -> int:
    """Say how much memory a VM gets that was not given a size: it returns what it does not use."""
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(min(MOST_MEMORY, half) // GIB, 1) * GIB
