"""The initial RAM file system: the cpio format byte by byte, and what berth puts in."""

from __future__ import annotations

import json
import lzma
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from berth.errors import BerthError
from berth.kernels import cpio, initramfs
from berth.kernels.initramfs import check_cpio, document_cpio, make_initramfs
from berth.kernels.model import Kernel
from berth.layout import Layout

GOLDEN = (
    b"07070100000001000041ED0000000000000000000000020000000000000000"
    b"000000000000000000000000000000000000000200000000d\0"
    b"07070100000002000081A40000000000000000000000010000000000000005"
    b"000000000000000000000000000000000000000400000000d/f\0\0\0hello\0\0\0"
    b"07070100000003000021800000000000000000000000010000000000000000"
    b"000000000000000000000005000000010000000200000000c\0"
    b"07070100000000000000000000000000000000000000010000000000000000"
    b"000000000000000000000000000000000000000B00000000TRAILER!!!\0\0\0\0"
)  # fmt: skip


def read(data: bytes) -> Iterator[tuple[str, int, bytes, tuple[int, int]]]:
    """Read concatenated newc archives as the kernel's init/initramfs.c does."""
    at = 0
    while at < len(data):
        if data[at] == 0:
            at += 1
            continue
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        field = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        end = at + 110 + field[11]
        assert data[end - 1] == 0
        name = data[at + 110 : end - 1].decode()
        start = end + -end % 4
        at = start + field[6] + -field[6] % 4
        if name == "TRAILER!!!":
            at += -at % 512
            assert at <= len(data), "another archive could not follow"
            continue
        assert field[2:4] == [0, 0], "root owns everything"
        assert field[5] == 0, "no times"
        yield name, field[1], data[start : start + field[6]], (field[9], field[10])


@pytest.fixture
def agent(scratch: Path) -> Path:
    path = scratch / "agent"
    path.write_bytes(b"\x7fELF agent")
    return path


@pytest.fixture
def kernel(scratch: Path) -> Kernel:
    """A kernel whose modules are words, two of them compressed."""
    modules = scratch / "modules"
    (modules / "kernel").mkdir(parents=True)
    (modules / "kernel/virtio.ko").write_bytes(b"virtio")
    (modules / "kernel/virtio_blk.ko.xz").write_bytes(lzma.compress(b"blk" * 1000))
    (modules / "kernel/virtio-rng.ko").write_bytes(b"rng")
    (modules / "modules.dep").write_text(
        "kernel/virtio.ko:\nkernel/virtio_blk.ko.xz: kernel/virtio.ko\nkernel/virtio-rng.ko: kernel/virtio.ko\n"
    )
    return Kernel("6.1.0", "amd64", scratch / "image", None, modules, None, None, "linux-image 6.1")


def test_golden_bytes() -> None:
    nodes = [cpio.directory("d"), cpio.file("d/f", b"hello"), cpio.character_device("c", 5, 1)]
    data = cpio.archive(nodes)
    assert data.rstrip(b"\0") == GOLDEN.rstrip(b"\0")
    assert len(data) == 512
    assert cpio.archive(nodes) == data


def test_content(layout: Layout, kernel: Kernel, agent: Path) -> None:
    path = make_initramfs(layout, kernel, agent)
    assert path.parent == layout.initramfs
    found = {name: (mode, data, device) for name, mode, data, device in read(path.read_bytes())}
    assert found["init"] == (stat.S_IFREG | 0o755, b"\x7fELF agent", (0, 0))
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert all(stat.S_ISDIR(found[name][0]) for name in ("dev", "proc", "sys", "run", "newroot", "modules"))
    order = found["modules.order"][1].decode().split("\n")
    assert order == ["/modules/virtio.ko", "/modules/virtio_blk.ko", "--", "/modules/virtio_rng.ko", ""]
    assert found["modules/virtio_blk.ko"][1] == b"blk" * 1000
    assert {f"/{name}" for name in found if name.endswith(".ko")} == set(order) - {"--", ""}
    names = list(found)
    assert names.index("dev") < names.index("dev/console")
    assert names.index("modules") < names.index("modules/virtio.ko")


def test_a_kernel_without_modules(layout: Layout, agent: Path) -> None:
    kernel = Kernel("", "arm64", Path("/image"), None, None, None, None, "/image")
    found = {name: data for name, _, data, _ in read(make_initramfs(layout, kernel, agent).read_bytes())}
    assert found["modules.order"] == b"--\n"
    assert found["init"]


def test_it_is_made_once(layout: Layout, kernel: Kernel, agent: Path) -> None:
    path = make_initramfs(layout, kernel, agent)
    before = (path.stat().st_ino, path.read_bytes())
    assert make_initramfs(layout, kernel, agent) == path
    assert path.stat().st_ino == before[0]
    path.unlink()
    assert make_initramfs(layout, kernel, agent).read_bytes() == before[1], "the same goes in, the same comes out"


def test_what_goes_in_decides(layout: Layout, kernel: Kernel, agent: Path) -> None:
    first = make_initramfs(layout, kernel, agent)
    agent.write_bytes(b"another")
    second = make_initramfs(layout, kernel, agent)
    assert kernel.modules
    os.utime(kernel.modules / "modules.dep", (1, 1))
    assert len({first, second, make_initramfs(layout, kernel, agent)}) == 3


def test_the_least_used_go(layout: Layout, agent: Path) -> None:
    paths: list[Path] = []
    for number in range(initramfs._KEPT + 2):
        kernel = Kernel(f"6.{number}", "amd64", Path("/image"), None, None, None, None, "x")
        paths.append(make_initramfs(layout, kernel, agent))
        os.utime(paths[-1], (number + 1, number + 1))
        if number == initramfs._KEPT - 1:
            (layout.initramfs / "x.cpio.partial").write_bytes(b"left by the dead")
            os.utime(paths[0], (100, 100))
    left = {path.name for path in layout.initramfs.iterdir()}
    assert paths[0].name in left
    assert paths[-1].name in left
    assert {paths[1].name, paths[2].name}.isdisjoint(left)
    assert "x.cpio.partial" not in left


def test_a_damaged_module(layout: Layout, kernel: Kernel, agent: Path) -> None:
    assert kernel.modules
    blk = kernel.modules / "kernel/virtio_blk.ko.xz"
    blk.write_bytes(blk.read_bytes()[:-20])
    with pytest.raises(BerthError, match=r"virtio_blk\.ko\.xz is (truncated|damaged)"):
        make_initramfs(layout, kernel, agent)
    blk.unlink()
    with pytest.raises(BerthError, match="cannot make the initial RAM file system"):
        make_initramfs(layout, kernel, agent)
    assert list(layout.initramfs.iterdir()) == []


def test_appended_archives(layout: Layout, kernel: Kernel, agent: Path, scratch: Path) -> None:
    (scratch / "e2fsck").write_bytes(b"\x7fELF check")
    document = {"schema": 1, "hostname": "ünï"}
    data = make_initramfs(layout, kernel, agent).read_bytes()
    data += document_cpio(document) + check_cpio(scratch / "e2fsck")
    assert len(data) % 512 == 0
    found = {name: (mode, content) for name, mode, content, _ in read(data)}
    assert found["boot.json"][0] == stat.S_IFREG | 0o600
    assert json.loads(found["boot.json"][1]) == document
    assert found["e2fsck"] == (stat.S_IFREG | 0o755, b"\x7fELF check")
    assert "init" in found
