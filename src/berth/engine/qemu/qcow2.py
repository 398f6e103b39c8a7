"""The head of a qcow2 file: what the host itself reads of a machine's disk. Used by `disks` only.

QEMU writes that file, and a guest may have taken its QEMU over. So nothing in the head is believed that names another
file: the template is found by our own record, and a disk that wants an external data file is refused.

Source: QEMU's docs/interop/qcow2.txt, "Header".
"""

from __future__ import annotations

import dataclasses
import struct

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_DIRTY, _CORRUPT, _EXTENDED_L2 = 1 << 0, 1 << 1, 1 << 4
_KNOWN = _DIRTY | _CORRUPT | _EXTENDED_L2  # not an external data file, not another compression


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """size: bytes that the guest sees. is_corrupt: QEMU has found its tables damaged, and writes to it no more."""

    size: int
    is_corrupt: bool


def parse_head(data: bytes) -> Head:
    """Read the first bytes of a qcow2 file. Raises ValueError, which says in words what is wrong."""
    if len(data) < _HEADER.size:
        raise ValueError("it is too short")
    fields = _HEADER.unpack_from(data)
    magic, version, size, encryption, incompatible = fields[0], fields[1], fields[5], fields[6], fields[13]
    if magic != b"QFI\xfb" or version != 3:
        raise ValueError("it is no qcow2 file of version 3")
    if encryption or incompatible & ~_KNOWN:
        raise ValueError("it asks for what berth never makes")
    return Head(size, bool(incompatible & _CORRUPT))
