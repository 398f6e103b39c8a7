"""Layers that want out, or too much. Each leaves what is beside the root as it was; as any user."""

from __future__ import annotations

import contextlib
import gzip
import os
import resource
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.errors import BerthError, ImageFormatError
from berth.oci import spec, stream
from berth.oci.layer import Limits
from berth.oci.tar import TarReader
from berth.oci.tree import Tree, split
from berth.oci.unpack import unpack_layers
from tars import (
    END,
    directory,
    file_of,
    hardlink,
    header,
    listing,
    member,
    octal,
    padded,
    pax_records,
    symlink,
    unpack,
    with_checksum,
)


@pytest.fixture
def root(tmp_path: Path) -> Generator[Path]:
    """A root beside which lie things that nobody may touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    yield tmp_path / "root"
    assert listing(tmp_path / "outside") == {"secret": "secret"}
    assert (tmp_path / "outside/secret").stat().st_nlink == 1
    assert set(os.listdir(tmp_path)) <= {"outside", "root"}


def outside(root: Path, name: str = "") -> str:
    return str(root.parent / "outside" / name)


# Ways out


@pytest.mark.parametrize("name", ["../outside/x", "a/../../outside/x", "..", "a/..", "./..", "/../x", "a/../b"])
@pytest.mark.parametrize("kind", [b"0", b"5", b"2", b"6", b"1"])
def test_names_that_lead_upwards_are_refused(root: Path, name: str, kind: bytes) -> None:
    with pytest.raises(ImageFormatError, match="leads upwards"):
        unpack(root, member("f") + member(name, kind=kind, link="f"))


def test_absolute_names_are_below_the_root(root: Path) -> None:
    unpack(root, member(outside(root, "x"), b"1") + member("//etc//./passwd", b"2"))
    assert (root / outside(root, "x").lstrip("/")).read_text() == "1"
    assert (root / "etc/passwd").read_text() == "2"


def test_links_as_parents_do_not_lead_out(root: Path) -> None:
    unpack(
        root,
        symlink("abs", outside(root)) + symlink("rel", "../outside") + symlink("deep", "/../../../../" + outside(root)),
        member("abs/secret", b"1") + member("rel/secret", b"2") + member("deep/secret", b"3"),
        member("rel/.wh.secret"),
    )
    assert (root / outside(root, "secret").lstrip("/")).read_text() == "3"
    assert not (root / "outside/secret").exists()


def test_links_as_parents_in_one_layer_and_through_links(root: Path) -> None:
    unpack(root, symlink("a", "b") + symlink("b", "c/../..") + directory("c") + member("a/secret", b"x"))
    assert (root / "secret").read_text() == "x"


def test_a_file_does_not_go_through_a_link_of_its_own_name(root: Path) -> None:
    unpack(
        root, symlink("f", outside(root, "secret")), member("f", b"new") + symlink("d", outside(root)) + directory("d")
    )
    assert listing(root) == {"f": "new", "d": "dir"}


@pytest.mark.parametrize("target", ["../outside/secret", "/../outside/secret", "a/../../outside/secret"])
def test_hard_links_upwards_are_refused(root: Path, target: str) -> None:
    with pytest.raises(ImageFormatError, match="leads upwards"):
        unpack(root, hardlink("h", target))


def test_hard_links_do_not_lead_out_through_links(root: Path) -> None:
    with pytest.raises(ImageFormatError, match="not there"):
        unpack(root, symlink("l", outside(root)) + hardlink("h", "l/secret"))
    with pytest.raises(ImageFormatError, match="not there"):
        unpack(root, hardlink("h2", outside(root, "secret")))


def test_a_hard_link_to_a_link_is_the_link(root: Path) -> None:
    unpack(root, symlink("l", outside(root, "secret")) + hardlink("h", "l"), member("h", b"mine"))
    assert listing(root) == {"l": f"-> {outside(root, 'secret')}", "h": "mine"}


@pytest.mark.parametrize(
    ("target", "why"),
    [("none", "not there"), ("no/where", "not there"), ("d", "a directory"), ("", "not there"), ("f/x", "not there")],
)
def test_hard_links_to_nothing_useful(root: Path, target: str, why: str) -> None:
    with pytest.raises(ImageFormatError, match=why):
        unpack(root, directory("d") + member("f") + hardlink("h", target))


def test_a_hard_link_to_itself_loses_nothing(root: Path) -> None:
    unpack(root, member("f", b"x") + hardlink("f", "f") + hardlink("./f", "/f"))
    assert listing(root) == {"f": "x"}


@pytest.mark.parametrize("name", [".wh...", ".wh..", ".wh.", "a/.wh..", "a/.wh..."])
def test_whiteouts_of_no_name_are_refused(root: Path, name: str) -> None:
    with pytest.raises(ImageFormatError, match="no valid name"):
        unpack(root, member("a/keep", b"x"), member(name))
    assert (root / "a/keep").exists()


def test_a_directory_named_as_a_whiteout_is_refused(root: Path) -> None:
    with pytest.raises(ImageFormatError, match="name of a whiteout"):
        unpack(root, member(".wh.a/b", b"x"))


def test_whiteouts_do_not_reach_through_links(root: Path) -> None:
    unpack(root, symlink("l", "../outside") + directory("own"), member("l/.wh.secret") + member("l/.wh..wh..opq"))


def test_loops_of_links_are_refused(root: Path) -> None:
    with pytest.raises(ImageFormatError, match="too many links"):
        unpack(root, symlink("a", "b") + symlink("b", "a") + member("a/x"))


def test_links_that_fan_out_end_soon(root: Path) -> None:
    """Each leads twice through the next: 2^60 steps if only the depth were bounded."""
    links = b"".join(symlink(f"l{n}", f"l{n + 1}/../l{n + 1}") for n in range(60))
    with pytest.raises(ImageFormatError, match="too many links"):
        unpack(root, links + directory("l60") + member("l0/x"))


# What the kernel would make more of


def test_attributes_of_overlayfs_are_left_out(root: Path) -> None:
    """In a lower directory they would redirect names and hide directories."""
    keys = ("user.overlay.redirect", "user.overlay.opaque", "trusted.overlay.opaque", "trusted.x", "security.selinux")
    report = unpack(
        root, member("f", pax={f"SCHILY.xattr.{key}": "y" for key in keys} | {"SCHILY.xattr.user.fine": "y"})
    )
    assert os.listxattr(root / "f") == ["user.fine"]
    assert set(report.xattrs_skipped) == set(keys)


def test_the_device_that_is_overlays_whiteout_is_never_made(root: Path) -> None:
    report = unpack(root, member("w", kind=b"3", device=(0, 0)), devices="make")
    assert report.devices_skipped == 1
    assert os.listdir(root) == []


@pytest.mark.parametrize("device", [(4096, 0), (8, 1 << 20)])
def test_devices_that_can_not_be_are_refused(root: Path, device: tuple[int, int]) -> None:
    with pytest.raises(ImageFormatError, match="no device"):
        unpack(root, member("d", kind=b"4", device=device), devices="make")


@pytest.mark.parametrize("owner", [2**32 - 1, 2**32, 2**40])
def test_owners_that_are_no_ids_are_refused(root: Path, owner: int) -> None:
    """-1 would leave the file with whoever unpacks."""
    with pytest.raises(ImageFormatError, match="no valid id"):
        unpack(root, member("f", pax={"uid": str(owner)}))


# Too much


def test_lying_sizes_are_truncation(root: Path) -> None:
    with pytest.raises(ImageFormatError, match="truncated"):
        unpack(root, member("f", b"x", size=2**40))
    with pytest.raises(ImageFormatError, match="more than 17592186044416"):
        unpack(root, member("f", b"x", size=2**60))


@pytest.mark.parametrize("size", ["-1", "99999999999999999999", "0x10", "1e3", "", " 1", "18446744073709551616"])
def test_sizes_that_are_no_numbers(root: Path, size: str) -> None:
    with pytest.raises(ImageFormatError, match="no valid number"):
        unpack(root, member("f", b"x", pax={"size": size}))


def test_a_negative_size_in_base_256(root: Path) -> None:
    with pytest.raises(ImageFormatError, match=r"its size is -5"):
        unpack(root, member("f", b"x", size=octal(-5, 12)))


@pytest.mark.parametrize("field", [b"1_0\0", b"0o17\0", b"+7\0", b"8\0", b"1 2\0", b"\xc2\xb2\0"])
def test_numbers_that_python_alone_would_read(root: Path, field: bytes) -> None:
    with pytest.raises(ImageFormatError, match=r"no octal number|too large"):
        unpack(root, member("f", b"", size=field.ljust(12, b"\0")))


def test_a_bomb_is_stopped_by_its_decompressed_size(root: Path) -> None:
    root.mkdir()
    bomb = gzip.compress(member("f", bytes(64 << 20)) + END)
    target = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    with file_of(bomb) as fd, pytest.raises(ImageFormatError, match="holds more than 8388608 bytes when decompressed"):
        unpack_layers(target, [(fd, spec.LAYER_GZIP)], devices="skip", limits=Limits(stream=8 << 20))
    os.close(target)


def test_what_follows_the_archive_is_bounded_too(root: Path) -> None:
    with pytest.raises(ImageFormatError, match="when decompressed"):
        unpack(root, member("f") + END + bytes(32 << 20), limits=Limits(stream=4 << 20))


def test_too_many_entries(root: Path) -> None:
    with pytest.raises(ImageFormatError, match="more than 10 entries"):
        unpack(root, member("f") * 11, limits=Limits(entries=10))


def test_a_huge_sparse_file_costs_no_disk_and_a_limit_holds(root: Path) -> None:
    pax = {"GNU.sparse.size": str(10 << 40), "GNU.sparse.map": "0,1", "GNU.sparse.numblocks": "1"}
    unpack(root, member("lastlog", b"x", pax=pax))
    assert (root / "lastlog").stat().st_blocks < 100
    with pytest.raises(ImageFormatError, match="its size is"):
        unpack(root, member("g", b"x", pax=pax | {"GNU.sparse.size": str(2**62)}))


@pytest.mark.parametrize(
    "pax",
    [
        {"GNU.sparse.map": "0,1,0,1", "GNU.sparse.size": "100"},  # overlap
        {"GNU.sparse.map": "50,1,0,1", "GNU.sparse.size": "100"},  # backwards
        {"GNU.sparse.map": "0,2", "GNU.sparse.size": "1"},  # beyond the end
        {"GNU.sparse.map": "0,1", "GNU.sparse.size": "100"},  # less than its data
        {"GNU.sparse.map": "0,3", "GNU.sparse.size": "100"},  # more
        {"GNU.sparse.map": "0,2,5", "GNU.sparse.size": "100"},  # odd
        {"GNU.sparse.map": "0,-2", "GNU.sparse.size": "100"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.size": "100"},  # no map in its data
    ],
)
def test_maps_of_sparse_files_that_lie(root: Path, pax: dict[str, str]) -> None:
    with pytest.raises(ImageFormatError):
        unpack(root, member("f", b"xx", pax=pax))


def test_an_endless_sparse_map_is_refused(root: Path) -> None:
    lines = b"999999999\n" + b"1\n" * (3 << 20)
    with pytest.raises(ImageFormatError, match="sparse"):
        unpack(root, member("f", lines, pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.size": "9"}))


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_extended_headers_do_not_fill_the_memory(root: Path, kind: bytes) -> None:
    with pytest.raises(ImageFormatError, match="longer than"):
        unpack(root, header(b"h", kind, size=1 << 33))
    body = padded(pax_records({"comment": "x" * (1 << 20)}) if kind in b"xg" else b"n" * (1 << 20))
    chain = (header(b"h", kind, size=len(body)) + body) * 20
    with pytest.raises(ImageFormatError, match="longer than"):
        unpack(root, chain + member("f"))


def test_global_headers_do_not_add_up(root: Path) -> None:
    layer = b""
    for number in range(20):
        body = pax_records({f"key{number}": "x" * (1 << 20)})
        layer += header(b"h", b"g", size=len(body)) + padded(body) + member(f"f{number}")
    with pytest.raises(ImageFormatError, match="global headers are too long"):
        unpack(root, layer)


@pytest.mark.parametrize("name", ["a" * 256, "a/" * 300 + "x", "/".join(["b" * 200] * 25)])
def test_names_that_no_file_system_takes(root: Path, name: str) -> None:
    with pytest.raises(ImageFormatError, match=r"longer than any path|File name too long"):
        unpack(root, member(name))


def test_trees_that_links_make_ever_deeper_are_bounded(root: Path) -> None:
    """Every name is short, but each starts where the last one ended."""
    deep = "/".join(["d"] * 120)
    layer = directory(deep) + symlink("l1", deep)
    layer += directory(f"l1/{deep}") + symlink("l2", f"{deep}/{deep}") + member(f"l2/{deep}/f")
    with pytest.raises(ImageFormatError, match="nested too deep"):
        unpack(root, layer)


def test_many_deep_directories_do_not_use_up_descriptors(root: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        unpack(
            root,
            b"".join(member(f"{n}/a/b/c/d/e/f", b"x") for n in range(300)),
            member("/".join(["x"] * 250)),
            member(".wh.x"),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir(root)) == 300


# Damage


@pytest.mark.parametrize("cut", [1, 511, 513, 600, 1023, 1025, 1536, 2047])
def test_truncation_is_never_taken_for_the_end(root: Path, cut: int) -> None:
    root.mkdir()
    layer = member("f", b"x" * 512) + member("g", b"y" * 512)
    target = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    with file_of(layer[:cut]) as fd, pytest.raises(ImageFormatError, match="truncated"):
        unpack_layers(target, [(fd, spec.LAYER)], devices="skip")
    os.close(target)


def test_an_archive_without_end_mark_or_with_garbage_after_it_is_read(root: Path) -> None:
    for number, tail in enumerate((b"", bytes(512), END + b"garbage" * 99)):
        root.mkdir(exist_ok=True)
        target = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        with file_of(member(f"f{number}") + tail) as fd:
            unpack_layers(target, [(fd, spec.LAYER)], devices="skip")
        os.close(target)
    assert sorted(os.listdir(root)) == ["f0", "f1", "f2"]


def test_a_damaged_header_in_the_middle_is_not_the_end(root: Path) -> None:
    layer = bytearray(member("f") + member("g") + member("h"))
    layer[520] ^= 1
    with pytest.raises(ImageFormatError, match="entry 2: its checksum is wrong"):
        unpack(root, bytes(layer))


@pytest.mark.parametrize("kind", [b"M", b"N", b"Q", b"\xff"])
def test_unknown_types_are_refused(root: Path, kind: bytes) -> None:
    with pytest.raises(ImageFormatError, match="unknown type"):
        unpack(root, member("f", kind=kind))


@pytest.mark.parametrize(
    "body",
    [
        b"12 path=a\0b\n",
        b"5 a=\n",
        b"99 path=x\n",
        b"x path=x\n",
        b"7 path\n",
        b"8 =abcd\n",
        b"-5 a=b\n",
        b"10 path=xy",
    ],
)
def test_malformed_pax_records(root: Path, body: bytes) -> None:
    layer = header(b"pax", b"x", size=len(body)) + padded(body) + member("f")
    if body == b"5 a=\n":  # an empty value is no error: it takes a value back
        unpack(root, layer)
        return
    with pytest.raises(ImageFormatError):
        unpack(root, layer)


def test_names_with_nul_and_empty_names_and_links(root: Path) -> None:
    for pax in ({"path": b"a\0b"}, {"linkpath": b"a\0b"}, {"path": b""}):
        with pytest.raises(ImageFormatError, match=r"NUL|no name"):
            unpack(root, member("f", kind=b"2", link="x", pax=pax))
    with pytest.raises(ImageFormatError, match="link to nothing"):
        unpack(root, symlink("l", ""))


def test_an_extended_header_with_nothing_after_it(root: Path) -> None:
    with pytest.raises(ImageFormatError, match="nothing after it"):
        unpack(root, header(b"x", b"L", size=5) + padded(b"abcd\0"))


def test_a_file_system_that_refuses_is_one_error_that_names_the_entry(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    root.mkdir()
    target = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    data = stream.ByteStream(iter([member("usr/f", b"x")]), where="layer 1")
    from berth.oci.layer import UnpackReport, apply_layer

    with pytest.raises(BerthError, match=r"can't unpack layer 1: usr/f: No space left on device"):
        apply_layer(data, target, UnpackReport(), devices="skip")
    os.close(target)


def test_media_types_that_are_no_layers_are_refused(root: Path) -> None:
    with pytest.raises(ImageFormatError, match="not one of a layer"):
        unpack(root, member("f"), media_type="application/vnd.oci.image.layer.v1.tar+encrypted")


# Anything


@given(st.binary(max_size=4096))
def test_any_bytes_are_an_archive_or_an_image_error(data: bytes) -> None:
    reader = TarReader(stream.ByteStream(iter([data]), where="test"))
    with contextlib.suppress(ImageFormatError):
        for _ in reader:
            b"".join(reader.pieces())


@given(st.data())
def test_damage_anywhere_is_an_archive_or_an_image_error(data: st.DataObject) -> None:
    good = bytearray(
        member("d/" * 60 + "f", b"x" * 700, pax={"SCHILY.xattr.user.a": "b"}) + symlink("l", "f") + directory("e")
    )
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    for at in range(0, len(good), 512):  # with right checksums the damage goes deeper
        if data.draw(st.booleans()):
            good[at : at + 512] = with_checksum(bytearray(good[at : at + 512]))
    reader = TarReader(stream.ByteStream(iter([bytes(good)]), where="test"))
    with contextlib.suppress(ImageFormatError):
        for _ in reader:
            b"".join(reader.pieces())


_PART = st.sampled_from(["a", "b", "c", "..", ".", "", "l", "lib", "dev", ".wh.a", ".wh..wh..opq", ".wh..."])
_PATH = st.lists(_PART, min_size=1, max_size=4).map("/".join)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.tuples(st.sampled_from([b"0", b"1", b"2", b"5", b"6"]), _PATH, _PATH), max_size=8), max_size=3)
)
def test_nothing_leads_out(
    tmp_path_factory: pytest.TempPathFactory, layers: list[list[tuple[bytes, str, str]]]
) -> None:
    """Any names, links and targets, in any order: beside the root nothing changes, and only berth's errors come."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "a").mkdir()
    (folder / "a/b").write_text("untouched")
    with contextlib.suppress(ImageFormatError):
        unpack(
            folder / "root",
            *(
                b"".join(member(name or "/", b"x", kind=kind, link=link) for kind, name, link in layer)
                for layer in layers
            ),
        )
    assert set(os.listdir(folder)) == {"a", "root"}
    assert listing(folder / "a") == {"b": "untouched"}
    assert (folder / "a/b").stat().st_nlink == 1


def test_split() -> None:
    assert split(b"./a//b/./c/") == b"a/b/c"
    assert split(b"/") == b""
    assert split(b"...") == b"..."


def test_a_tree_closes_what_it_opened(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(fd)
    for number in range(300):
        assert tree.directory(b"%d/x" % number, make=True)
        tree.trim()
    assert tree.directory(b"none/x", make=False) is None
    tree.close()
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
