"""The order of modules, from synthetic lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.kernels.modules import EARLY, LATER, load_index, module_name

DEP = """\
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/hw_random/virtio-rng.ko.zst: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/lib/crc16.ko
kernel/fs/jbd2/jbd2.ko:
kernel/lib/crc16.ko:
kernel/crypto/crc32c_generic.ko:
kernel/arch/x86/crypto/crc32c-intel.ko:
"""


@pytest.fixture
def folder(scratch: Path) -> Path:
    (scratch / "modules.dep").write_text(DEP)
    (scratch / "modules.builtin").write_text("kernel/drivers/char/virtio_console.ko\nkernel/net/9p/9pnet.ko\n")
    (scratch / "modules.softdep").write_text("# comment\nsoftdep ext4 pre: crc32c\nsoftdep jbd2 pre: crc32c post: x\n")
    (scratch / "modules.alias").write_text(
        "# Aliases\nalias crypto-crc32c crc32c_generic\nalias crc32c crc32c_generic\nalias crc32c crc32c_intel\n"
        "alias virtio:d00000001v* virtio_net\nalias crc* nothing\n"
    )
    return scratch


def test_dependencies_come_first(folder: Path) -> None:
    index = load_index(folder)
    names = [module_name(path) for path in index.order(["virtio_blk", "virtio-pci"])]
    assert names == ["virtio_ring", "virtio", "virtio_blk", "virtio_pci"]


def test_soft_dependencies_by_alias(folder: Path) -> None:
    """Else an ext4 with checksums can't be mounted: nobody in the initramfs calls modprobe."""
    names = [module_name(path) for path in load_index(folder).order(["ext4"])]
    assert names[-1] == "ext4"
    assert set(names) == {"crc16", "jbd2", "crc32c_generic", "crc32c_intel", "ext4"}
    assert max(map(names.index, ("crc32c_generic", "crc32c_intel"))) < names.index("jbd2")


def test_built_in_or_missing_is_left_out(folder: Path) -> None:
    index = load_index(folder)
    assert index.order(["virtio_console", "nothing-like-it"]) == []
    early = index.order(EARLY)
    later = index.order(LATER, loaded=early)
    assert "virtio_console" not in map(module_name, early)
    assert later == ["kernel/drivers/char/hw_random/virtio-rng.ko.zst"]
    assert not set(early) & set(later)


def test_circles_end(folder: Path) -> None:
    (folder / "modules.softdep").write_text(
        "softdep crc16 pre: ext4\nsoftdep ext4 pre: crc16\nsoftdep jbd2 pre: jbd2\n"
    )
    names = [module_name(path) for path in load_index(folder).order(["ext4", "crc16"])]
    assert sorted(names) == ["crc16", "ext4", "jbd2"]


def test_paths_that_lead_out_are_not_taken(folder: Path) -> None:
    (folder / "modules.dep").write_text("../../etc/shadow.ko:\n/etc/passwd.ko:\na.ko: ../b.ko\nc.ko:\n")
    assert set(load_index(folder).needs) == {"c.ko"}


def test_no_lists_at_all(scratch: Path) -> None:
    assert load_index(scratch).order(EARLY) == []


@pytest.mark.parametrize(
    ("path", "name"),
    [("kernel/a/virtio-rng.ko", "virtio_rng"), ("x_y.ko.xz", "x_y"), ("9pnet.ko.gz", "9pnet"),
     ("a.kot.ko.zst", "a.kot")],
)  # fmt: skip
def test_names(path: str, name: str) -> None:
    assert module_name(path) == name


@given(st.text(alphabet="ab/.:- ko\n", max_size=200), st.text(alphabet="softdep:re ab\n", max_size=100))
def test_any_text_is_read(dep: str, soft: str) -> None:
    from berth.kernels import modules

    needs = dict(modules._parse_dependencies(dep))
    index = modules.ModuleIndex(
        needs, {module_name(path): path for path in needs}, frozenset(), dict(modules._parse_soft(soft)), {}
    )
    for name in index.paths:
        found = index.order([name])
        assert len(found) == len(set(found))
