"""Root disks of VMs, as far as files and arithmetic go: sizes, the head of a qcow2 file, what is recorded beside it."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.bundle import Bundle
from berth.engine.qemu import disks, mkfs, qcow2, sizes, templates
from berth.errors import BerthError, InvalidArgumentError, NotFoundError, StateFormatError
from berth.layout import Layout
from berth.names import parse_machine_name
from berth.units import GIB, MIB

DIGEST = "sha256:" + "ab" * 32
UUID = bytes(range(16))


@pytest.fixture
def bundle(layout: Layout) -> Bundle:
    found = Bundle(layout, parse_machine_name("dev"))
    found.vm.mkdir(parents=True)
    return found


def head(*, size: int = 64 * GIB, version: int = 3, incompatible: int = 16, encryption: int = 0) -> bytes:
    """The first bytes of a qcow2 file, field by field as the specification lists them."""
    old = (version, 0, 0, 16, size, encryption, 128, 0x30000, 0x10000, 1, 0, 0)
    return struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", *old) + struct.pack(">QQQII", incompatible, 0, 0, 4, 112)


def put_template(layout: Layout, size: int = 64 * GIB, *, uuid: bytes = UUID, content: int | None = 200 * MIB) -> Path:
    """What `make_template` leaves, without the file system but for its superblock's beginning."""
    template = templates.Template.at(layout, DIGEST, size)
    template.path.parent.mkdir(parents=True, exist_ok=True)
    block = bytearray(1024)
    block[0x38:0x3A], block[0x68:0x78] = b"\x53\xef", uuid
    template.path.write_bytes(bytes(1024) + block)
    if content is not None:
        (template.path.parent / "template.json").write_text(json.dumps({"schema": 1, "content": content}))
    return template.path


def put_disk(bundle: Bundle, *, size: int = 64 * GIB, template: int = 64 * GIB) -> None:
    """What `create_disk` leaves, but for the tables."""
    bundle.vm_disk.write_bytes(head(size=size))
    record = {"schema": 1, "digest": DIGEST, "template": template, "uuid": UUID.hex()}
    (bundle.vm / "disk.json").write_text(json.dumps(record))


# Sizes


@pytest.mark.parametrize(
    ("wanted", "content", "expected"),
    [
        (None, 0, 64), (None, 300 * MIB, 64), (64 * GIB, 0, 64), (64 * GIB - 1, 0, 64), (63 * GIB, 0, 16),
        (1000 * GIB, 0, 64), (16 * GIB, 0, 16), (5 * GIB, 2 * GIB, 4), (GIB, 600 * MIB, 1), (2 * GIB, 0, 1),
        (1000 * GIB, 60 * GIB, 256), (1000 * GIB, 48 * GIB, 64), (4096 * GIB, 900 * GIB, 4096),
    ],
)  # fmt: skip
def test_a_disk_gets_the_largest_template_that_fits_under_it(wanted: int | None, content: int, expected: int) -> None:
    assert sizes.template_size(wanted, content) == expected * GIB


@pytest.mark.parametrize(
    ("wanted", "content", "least"),
    [(512 * MIB, 0, "1G"), (GIB, GIB, "4G"), (3 * GIB, 900 * MIB, "4G"), (None, 60 * GIB, "256G")],
)
def test_a_disk_too_small_is_refused_with_the_least_size(wanted: int | None, content: int, least: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is too small for this image") as caught:
        sizes.template_size(wanted, content)
    assert caught.value.hint
    assert f"give it {least} or more: disk={least}" in caught.value.hint


def test_an_image_too_large_for_any_template_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        sizes.template_size(sizes.MAX_DISK, 4096 * GIB)
    assert caught.value.hint is None


def test_disks_have_whole_mebibytes_and_an_upper_bound() -> None:
    assert sizes.disk_size(None) == 64 * GIB
    assert sizes.disk_size(GIB + 1) == GIB + MIB
    with pytest.raises(InvalidArgumentError, match="at most"):
        sizes.disk_size(sizes.MAX_DISK + 1)


@given(st.integers(1, sizes.MAX_DISK), st.integers(0, 2000 * GIB))
def test_a_template_is_never_larger_than_its_disk_and_holds_its_image(wanted: int, content: int) -> None:
    found = sizes.find_size(sizes.disk_size(wanted), content)
    least = sizes.least_size(content)
    assert least is not None
    if found is None:
        assert least > sizes.disk_size(wanted)
    else:
        assert least <= found <= sizes.disk_size(wanted)
        assert content < found * 4 // 5


# The command


def test_mke2fs_is_told_everything_that_its_configuration_could_decide() -> None:
    root = os.stat("/")
    argv = mkfs.mke2fs_command("/proc/self/fd/7", 64 * GIB, root, prezeroed=True)
    features = argv[argv.index("-O") + 1].split(",")
    assert features[0] == "none"
    assert not {"orphan_file", "metadata_csum_seed"} & set(features), "newer than the kernels we support"
    assert {"has_journal", "resize_inode", "64bit", "metadata_csum"} <= set(features)
    assert argv[argv.index("-E") + 1].endswith("assume_storage_prezeroed=1")
    assert {"-b", "-I", "-i", "-m", "-J", "-L"} <= set(argv)
    assert argv[-3:] == ["-d", ".", "/proc/self/fd/7"]
    old = mkfs.mke2fs_command("x", GIB, root, prezeroed=False)
    assert not any("prezeroed" in word for word in old)


def test_the_roots_mode_and_time_are_set_besides(tmp_path: Path) -> None:
    tmp_path.chmod(0o1750)
    os.utime(tmp_path, (981_158_400, 981_158_400))
    expected = b"set_inode_field / mode 041750\nset_inode_field / mtime @981158400\n"
    assert mkfs.root_mode_command(tmp_path.stat()) == expected


def test_content_is_counted_as_our_file_system_will(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 300_000)
    os.link(tmp_path / "big", tmp_path / "again")
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 1 << 40)
    (tmp_path / "loop").symlink_to(tmp_path)
    blocks = 300_000 // 4096 * 4096 + 4096
    # The hole's first block is counted, for file systems that keep small files elsewhere.
    assert blocks <= mkfs.measure(str(tmp_path)) <= blocks + 2 * 4096
    (tmp_path / "many").mkdir()
    for number in range(100):
        (tmp_path / f"many/{number}").touch()
    assert mkfs.measure(str(tmp_path)) == (4 + 100) * sizes.BYTES_PER_INODE


# Templates


def test_a_template_serves_only_disks_of_its_size(layout: Layout) -> None:
    assert not templates.has_template(layout, DIGEST, None)
    put_template(layout, 16 * GIB)
    assert templates.has_template(layout, DIGEST, 20 * GIB)
    assert not templates.has_template(layout, DIGEST, None)
    assert not templates.has_template(layout, DIGEST, 2 * GIB)
    put_template(layout)
    assert templates.has_template(layout, DIGEST, None)
    assert not templates.has_template(layout, DIGEST.replace("ab", "cd"), None)


def test_an_image_known_to_be_too_large_is_refused_before_any_work(layout: Layout) -> None:
    put_template(layout, content=20 * GIB)
    with pytest.raises(InvalidArgumentError, match="too small"):
        templates.has_template(layout, DIGEST, 16 * GIB)


def test_templates_are_listed_and_removed(layout: Layout) -> None:
    assert templates.list_templates(layout) == []
    for size in (64 * GIB, 4 * GIB):
        put_template(layout, size)
    layout.disk(DIGEST).with_name("sha256-cd.partial").mkdir()
    (layout.disk(DIGEST) / "root-xG.raw").touch()
    assert [(item.digest, item.size) for item in templates.list_templates(layout)] == [
        (DIGEST, 4 * GIB), (DIGEST, 64 * GIB),
    ]  # fmt: skip
    templates.remove_template(layout, DIGEST)
    assert templates.list_templates(layout) == []
    assert [path.name for path in layout.disks.iterdir()] == ["disks.lock"], "what was half-made is swept"
    templates.remove_template(layout, DIGEST)


def test_what_is_no_file_system_is_no_template(tmp_path: Path) -> None:
    for content in (b"", bytes(4096)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(BerthError, match="holds no ext4 file system"):
            templates.template_uuid(tmp_path / "x")


# The head of a disk


def test_a_head_tells_size_and_corruption() -> None:
    assert qcow2.parse_head(head(size=5 * GIB)) == qcow2.Head(5 * GIB, is_corrupt=False)
    assert qcow2.parse_head(head(incompatible=16 | 2)).is_corrupt


@pytest.mark.parametrize(
    "data",
    [
        b"", head()[:103], head(version=2), head(incompatible=16 | 4), head(incompatible=1 << 60),
        head(encryption=1), b"QFI\xfa" + head()[4:], bytes(4096),
    ],
    ids=["empty", "short", "old", "data-file", "unknown", "encrypted", "magic", "zeros"],
)  # fmt: skip
def test_other_heads_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="it "):
        qcow2.parse_head(data)


@given(st.binary(max_size=200))
def test_any_head_is_read_or_refused(data: bytes) -> None:
    for candidate in (data, head()[:16] + data):
        try:
            qcow2.parse_head(candidate)
        except ValueError:
            continue


# A machine's disk


def test_no_disk_is_no_error(bundle: Bundle) -> None:
    assert disks.find_disk(bundle) is None
    assert disks.disk_usage(bundle) == 0
    with pytest.raises(NotFoundError, match="has no disk"), disks.opened_disk(bundle):
        pass


def test_a_disk_is_opened_with_the_template_it_was_made_on(bundle: Bundle) -> None:
    put_disk(bundle)
    path = put_template(bundle.layout)
    with disks.opened_disk(bundle) as opened:
        os.pwrite(opened.disk, b"x", 4096)
        assert os.pread(opened.template, 16, 1024 + 0x68) == UUID
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(opened.template, b"x")
    put_template(bundle.layout, uuid=bytes(16))  # made anew: its blocks lie elsewhere
    with pytest.raises(StateFormatError, match="another than the one it was made on"), disks.opened_disk(bundle):
        pass
    path.unlink()
    with pytest.raises(StateFormatError, match="is gone"), disks.opened_disk(bundle):
        pass


def test_a_damaged_disk_is_one_error_that_names_it(bundle: Bundle) -> None:
    put_disk(bundle)
    for data in (b"", b"garbage" * 100, head(incompatible=2)):
        bundle.vm_disk.write_bytes(data)
        with pytest.raises(StateFormatError, match=str(bundle.vm_disk)) as caught:
            disks.ensure_disk(bundle, DIGEST, None)
        assert caught.value.hint
        assert bundle.vm_disk.read_bytes() == data
    for record in (None, "{}", '{"schema": 1, "digest": 1}', '{"schema": 9}'):
        put_disk(bundle)
        (bundle.vm / "disk.json").unlink()
        if record is not None:
            (bundle.vm / "disk.json").write_text(record)
        with pytest.raises(StateFormatError, match=r"disk\.json"):
            disks.find_disk(bundle)


def test_only_a_file_is_a_disk(bundle: Bundle, tmp_path: Path) -> None:
    put_disk(bundle)
    bundle.vm_disk.rename(tmp_path / "elsewhere")
    bundle.vm_disk.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        disks.find_disk(bundle)
    bundle.vm_disk.unlink()
    os.mkfifo(bundle.vm_disk)
    with pytest.raises(StateFormatError, match="is no file"):
        disks.find_disk(bundle)


def test_a_disk_keeps_its_size_and_never_shrinks(bundle: Bundle) -> None:
    put_disk(bundle, size=100 * GIB)
    kept = disks.Disk(100 * GIB, DIGEST, 64 * GIB, UUID.hex())
    assert disks.ensure_disk(bundle, DIGEST, None) == kept
    assert disks.ensure_disk(bundle, DIGEST, 100 * GIB) == kept
    with pytest.raises(InvalidArgumentError, match="has 100G and can't shrink to 99G") as caught:
        disks.ensure_disk(bundle, DIGEST, 99 * GIB)
    assert caught.value.hint == f"berth set -n dev disk={100 * 1024}M"


def test_a_disk_is_unclean_while_it_is_marked(bundle: Bundle) -> None:
    assert disks.was_clean(bundle)
    disks.mark_running(bundle)
    disks.mark_running(bundle)
    assert not disks.was_clean(bundle)
    disks.mark_clean(bundle)
    disks.mark_clean(bundle)
    assert disks.was_clean(bundle)


def test_a_clone_is_a_copy_with_its_holes(bundle: Bundle) -> None:
    put_disk(bundle)
    with bundle.vm_disk.open("r+b") as file:
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(b"data" * 1000)
    disks.mark_running(bundle)
    target = Bundle(bundle.layout, parse_machine_name("copy"))
    target.path.mkdir()
    disks.clone_disk(bundle, target)
    assert target.vm_disk.read_bytes() == bundle.vm_disk.read_bytes()
    assert disks.disk_usage(target) < MIB
    assert disks.find_disk(target) == disks.find_disk(bundle)
    assert not disks.was_clean(target), "a copy of what may be inconsistent is no better"
    assert sorted(path.name for path in target.vm.iterdir()) == ["disk.json", "disk.qcow2", "running"]


def test_a_machine_never_started_clones_to_one_without_a_disk(bundle: Bundle) -> None:
    target = Bundle(bundle.layout, parse_machine_name("copy"))
    disks.clone_disk(bundle, target)
    assert not target.vm.exists()
