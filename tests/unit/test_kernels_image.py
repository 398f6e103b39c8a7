"""Kernel images: told apart by synthetic headers; hostile ones give one clear error."""

from __future__ import annotations

import gzip
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth import proc
from berth.errors import InvalidArgumentError, UnsupportedError
from berth.kernels import image
from berth.kernels.image import KernelImage, examine, extract_vmlinux, unpack_image
from kernelimages import appended, arm_image, bzimage, elf, lz4_legacy, zboot, zstd


@pytest.fixture
def write(scratch: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        (scratch / "kernel").write_bytes(data)
        return scratch / "kernel"

    return write


Write = Callable[[bytes], Path]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bzimage(appended(lzma.compress(elf()), elf())), KernelImage("bzimage", "amd64", "6.1.0-test")),
        (elf(), KernelImage("elf", "amd64", "6.1.0-test")),
        (arm_image(), KernelImage("image", "arm64", "6.1.0-test")),
        (gzip.compress(arm_image()), KernelImage("image", "arm64", "", "gzip")),
        (zboot(gzip.compress(arm_image())), KernelImage("image", "arm64", "", "zboot")),
    ],
    ids=["bzimage", "elf", "image", "gzip", "zboot"],
)
def test_told_apart(data: bytes, expected: KernelImage, write: Write) -> None:
    assert examine(write(data)) == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "begins like none"),
        (b"#!/bin/sh\n" * 200, "begins like none"),
        (elf(note=1), "no PVH entry point"),
        (elf(name=b"Xem\0"), "no PVH entry point"),
        (elf(machine=183), "arch/arm64/boot/Image"),
        (elf(machine=3), "another processor"),
        (elf()[:100], "truncated"),
        (bzimage(b"x" * 9, length=2**32 - 1), "truncated"),
        (bzimage(b"x" * 9)[:0x220], "truncated"),
        (zboot(b"", b"lzo"), "compressed by 'lzo'"),
    ],
)
def test_refused_in_words(data: bytes, reason: str, write: Write) -> None:
    with pytest.raises(InvalidArgumentError, match=reason) as caught:
        examine(write(data))
    assert "kernel is no kernel that can be booted" in caught.value.message
    assert caught.value.hint


def test_what_is_no_file(scratch: Path) -> None:
    os.mkfifo(scratch / "fifo")
    for path in (scratch / "absent", scratch, scratch / "fifo", Path("/dev/zero")):
        with pytest.raises(InvalidArgumentError, match="no kernel that can be booted"):
            examine(path)


@pytest.mark.parametrize("codec", ["gzip", "xz", "zstd", "lz4"])
def test_vmlinux_out_of_a_bzimage(codec: str, scratch: Path, write: Write) -> None:
    plain = elf() + bytes(3000)
    match codec:
        case "gzip":
            payload = gzip.compress(plain)  # ends with the size by itself
        case "xz":
            payload = appended(lzma.compress(plain), plain)
        case "zstd":
            payload = appended(zstd(plain), plain)
        case _:
            if proc.find_program("lz4") is None:
                pytest.skip("needs the program lz4")
            payload = appended(lz4_legacy(plain), plain)
    assert extract_vmlinux(write(bzimage(payload)), scratch / "vmlinux") == ""
    assert (scratch / "vmlinux").read_bytes() == plain
    assert (scratch / "vmlinux").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (gzip.compress(elf(note=1)), "no PVH"),
        (gzip.compress(b"not an ELF file" * 10), "ELF"),
        (appended(lzma.compress(elf()), b"x"), "another number of bytes"),
        (appended(lzma.compress(elf())[:-8], elf()), "truncated|damaged"),
        (appended(b"\x02\x21\x4c\x18" + b"\xff" * 60, elf()), "damaged|lz4|another number"),
        (b"unknown to anybody", "unknown"),
    ],
    ids=["no-pvh", "no-elf", "size", "cut", "lz4", "codec"],
)
def test_no_vmlinux_leaves_no_file(payload: bytes, reason: str, scratch: Path, write: Write) -> None:
    assert re.search(reason, extract_vmlinux(write(bzimage(payload)), scratch / "vmlinux"))
    assert not (scratch / "vmlinux").exists()


def test_a_bomb_is_not_unpacked(scratch: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "_UNPACKED_MAX", 1024 * 1024)
    bomb = gzip.compress(bytes(64 * 1024 * 1024))
    assert "more than 1048576 bytes" in extract_vmlinux(write(bzimage(bomb)), scratch / "vmlinux")
    with pytest.raises(InvalidArgumentError, match="more than 1048576 bytes"):
        unpack_image(write(bomb), scratch / "image")


def test_without_lz4_the_bzimage_boots(scratch: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_name: str) -> None: ...

    monkeypatch.setattr(image, "find_program", nowhere)
    path = write(bzimage(appended(lz4_legacy(elf()), elf())))
    assert extract_vmlinux(path, scratch / "vmlinux") == "it is compressed with lz4"
    with pytest.raises(UnsupportedError):
        unpack_image(write(zboot(lz4_legacy(arm_image()), b"lz4")), scratch / "image")


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: zboot(gzip.compress(data))], ids=["gzip", "zboot"])
def test_packed_images(pack: Callable[[bytes], bytes], scratch: Path, write: Write) -> None:
    assert unpack_image(write(pack(arm_image())), scratch / "image") == KernelImage("image", "arm64", "6.1.0-test")
    assert (scratch / "image").read_bytes() == arm_image()


def test_a_packed_something_else(scratch: Path, write: Write) -> None:
    with pytest.raises(InvalidArgumentError, match="what it holds is no Image"):
        unpack_image(write(gzip.compress(b"a letter" * 100)), scratch / "image")


SEEDS = [bzimage(gzip.compress(elf())), elf(), arm_image(), zboot(gzip.compress(arm_image()))]


@given(st.sampled_from(SEEDS), st.integers(0, 700), st.binary(min_size=1, max_size=8), st.integers(0, 2000))
def test_damage_is_one_clear_error(seed: bytes, at: int, junk: bytes, cut: int) -> None:
    """Whatever is written over a header, or cut off: an answer or an InvalidArgumentError, never anything else."""
    data = (seed[:at] + junk + seed[at + len(junk) :])[: max(0, len(seed) - cut // 2)]
    folder = Path(os.environ["BERTH_TEST_SESSION"])
    path, target = folder / f"fuzz-{os.getpid()}", folder / f"fuzz-{os.getpid()}-out"
    path.write_bytes(data)
    try:
        kind = examine(path)
        if kind.kind == "bzimage":
            said = extract_vmlinux(path, target)
            assert bool(said) != target.exists()
        elif kind.packed:
            unpack_image(path, target)
    except InvalidArgumentError as error:
        assert error.hint  # noqa: PT017
    finally:
        path.unlink()
        target.unlink(missing_ok=True)
