"""Synthetic kernel images: headers as the real ones have, and next to nothing in them. Used by the tests of kernels."""

from __future__ import annotations

import struct

import pytest

from berth import proc

BANNER = b"Linux version 6.1.0-test (x@y) #1\0"


def elf(*, note: int = 18, machine: int = 62, name: bytes = b"Xen\0") -> bytes:
    """Make a vmlinux with one PT_NOTE segment of two notes."""
    notes = struct.pack("<III", 4, 3, 1) + b"GNU\0" + b"abc\0" + struct.pack("<III", len(name), 8, note)
    notes += name + bytes(-len(name) % 4) + struct.pack("<Q", 0x1000000)
    table = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, 0, 0)
    table += struct.pack("<IIQQQQQQ", 4, 4, 64 + 112, 0, 0, len(notes), len(notes), 4)
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0x1000000, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    return head + table + notes + BANNER


def bzimage(payload: bytes, *, length: int | None = None) -> bytes:
    """Make a bzImage whose setup code has one sector; payload: with what the build appends."""
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<HH", head, 0x206, 0x20F, 0)
    struct.pack_into("<H", head, 0x20E, 0x100)
    head[0x300 : 0x300 + 32] = b"6.1.0-test (x@y) #1 SMP\0".ljust(32, b"\0")
    head[0x211] = 1
    struct.pack_into("<H", head, 0x236, 1)
    struct.pack_into("<II", head, 0x248, 16, len(payload) if length is None else length)
    return bytes(head) + bytes(16) + payload + bytes(100)


def appended(packed: bytes, plain: bytes) -> bytes:
    return packed + struct.pack("<I", len(plain))


def lz4_legacy(plain: bytes) -> bytes:
    """Write literals only. Source: lz4's doc/lz4_Frame_format.md and lz4_Block_format.md."""
    extra = len(plain) - 15
    block = b"\xf0" + b"\xff" * (extra // 255) + bytes([extra % 255]) + plain
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


def zstd(plain: bytes) -> bytes:
    if proc.find_program("zstd") is None:
        pytest.skip("needs the program zstd")
    return proc.run(["zstd", "-cq"], input=plain).stdout


def arm_image() -> bytes:
    head = bytearray(64)
    head[0x38:0x3C] = b"ARM\x64"
    return bytes(head) + BANNER


def zboot(packed: bytes, codec: bytes = b"gzip") -> bytes:
    head = bytearray(64)
    head[:2], head[4:8] = b"MZ", b"zimg"
    struct.pack_into("<II", head, 8, 64, len(packed))
    head[24 : 24 + len(codec)] = codec
    return bytes(head) + packed + b"the rest"
