"""What a layer does to a directory, by the image-spec's layer.md. As any user, on a real file system."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import ImageFormatError
from berth.oci import spec, stream
from berth.oci.tar import TarReader
from berth.oci.unpack import unpack_inside, unpack_layers
from berth.proc import find_program
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

ROOT = os.geteuid() == 0


def test_files_directories_and_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    report = unpack(
        root,
        directory("./") + directory("./a/") + member("./a/f", b"hello", mode=0o640) + symlink("./a/s", "/etc/passwd")
        + hardlink("./a/h", "./a/f") + member("./a/e"),
    )  # fmt: skip
    assert listing(root) == {"a": "dir", "a/f": "hello", "a/s": "-> /etc/passwd", "a/h": "hello", "a/e": ""}
    assert (root / "a/f").stat().st_ino == (root / "a/h").stat().st_ino
    assert stat.S_IMODE((root / "a/f").stat().st_mode) == 0o640
    assert (report.entries, report.data, report.layers) == (6, 5, 1)


def test_times_of_files_directories_and_links_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "root"
    unpack(
        root,
        directory("d", mtime=1111) + member("d/f", b"x", mtime=2222) + member("d/s", kind=b"2", link="f", mtime=3333)
        + member("d/p", b"x", pax={"mtime": "1700000000.123456789"}) + member("d/old", pax={"mtime": "-5.5"}),
    )  # fmt: skip
    assert (root / "d").stat().st_mtime == 1111
    assert (root / "d/f").stat().st_mtime == 2222
    assert (root / "d/s").lstat().st_mtime == 3333
    assert (root / "d/p").stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert (root / "d/old").stat().st_mtime_ns == -5_500_000_000


def test_setuid_and_setgid_are_kept(tmp_path: Path) -> None:
    unpack(
        tmp_path / "root",
        member("su", b"x", mode=0o4755) + directory("mail", mode=0o2775) + directory("t", mode=0o1777),
    )
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "root").iterdir()}
    assert modes == {"su": 0o4755, "mail": 0o2775, "t": 0o1777}


def test_a_directory_without_write_permission_can_be_filled(tmp_path: Path) -> None:
    root = tmp_path / "root"
    unpack(root, directory("d", mode=0o555) + directory("d/e", mode=0) + member("d/e/f", b"x") + member("d/g", b"y"))
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o555
    assert stat.S_IMODE((root / "d/e").stat().st_mode) == 0
    (root / "d/e").chmod(0o700)
    assert (root / "d/e/f").read_text() == "x"
    (root / "d").chmod(0o700)


def test_a_later_layer_fills_and_changes_a_directory_that_shuts_its_owner_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    unpack(root, directory("d", mode=0o500), directory("d", mode=0o550) + member("d/f", b"x"))
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o550
    (root / "d").chmod(0o700)


def test_parents_that_no_entry_names_are_made(tmp_path: Path) -> None:
    unpack(tmp_path / "root", member("a/b/c", b"x"))
    assert listing(tmp_path / "root") == {"a": "dir", "a/b": "dir", "a/b/c": "x"}
    assert stat.S_IMODE((tmp_path / "root/a").stat().st_mode) == 0o755


def test_the_umask_does_not_matter(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        base = (
            directory("usr/lib")
            + symlink("lib", "usr/lib")
            + member("a/f", b"x", mode=0o666)
            + member("p", kind=b"6", mode=0o666)
        )
        unpack(tmp_path / "root", base, directory("lib") + member("lib/.wh..wh..opq"))
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / "root" / name).stat().st_mode) for name in ("a", "a/f", "p", "lib", "usr")}
    assert modes == {"a": 0o755, "a/f": 0o666, "p": 0o666, "lib": 0o755, "usr": 0o755}


def test_the_root_gets_its_mode(tmp_path: Path) -> None:
    unpack(tmp_path / "root", directory("./", mode=0o711, mtime=77))
    assert stat.S_IMODE((tmp_path / "root").stat().st_mode) == 0o711
    assert (tmp_path / "root").stat().st_mtime == 77


def test_what_is_below_dev_is_left_out(tmp_path: Path) -> None:
    report = unpack(
        tmp_path / "root",
        directory("./dev/") + member("./dev/null", kind=b"3", device=(1, 3)) + directory("./dev/pts/")
        + member("dev/file", b"x") + hardlink("copy", "dev/file") + member("device", b"y"),
    )  # fmt: skip
    assert listing(tmp_path / "root") == {"dev": "dir", "device": "y"}
    assert (report.dev_skipped, report.devices_skipped) == (4, 0)


def test_devices_are_counted_when_they_are_skipped_and_fifos_are_made(tmp_path: Path) -> None:
    report = unpack(
        tmp_path / "root",
        member("c", kind=b"3", device=(1, 3)) + member("b", kind=b"4", device=(7, 0))
        + member("p", kind=b"6", mode=0o622),
    )  # fmt: skip
    status = (tmp_path / "root/p").stat()
    assert stat.S_ISFIFO(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o622
    assert os.listdir(tmp_path / "root") == ["p"]
    assert report.devices_skipped == 2


# Whiteouts


def test_a_whiteout_hides_what_lower_layers_have(tmp_path: Path) -> None:
    base = directory("d") + member("d/f", b"1") + directory("d/sub") + member("d/sub/x", b"2") + member("g", b"3")
    report = unpack(tmp_path / "root", base, member("d/.wh.f") + member("d/.wh.sub") + member("d/.wh.none"))
    assert listing(tmp_path / "root") == {"d": "dir", "g": "3"}
    assert report.whiteouts == 3


def test_a_whiteout_hides_a_link_and_not_its_target(tmp_path: Path) -> None:
    unpack(tmp_path / "root", directory("d") + member("d/f", b"1") + symlink("l", "d"), member(".wh.l"))
    assert listing(tmp_path / "root") == {"d": "dir", "d/f": "1"}


def test_a_whiteout_below_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    unpack(
        tmp_path / "root", member("x", b"1"), member("no/where/.wh.f") + member("x/.wh.f") + member("no/.wh..wh..opq")
    )
    assert listing(tmp_path / "root") == {"x": "1"}


@pytest.mark.parametrize("first", [True, False])
def test_whiteouts_do_not_hide_what_their_own_layer_brings(tmp_path: Path, first: bool) -> None:
    """layer.md, "Whiteouts": they apply to lower layers only, wherever in the archive they stand."""
    white = member(".wh.f") + member("d/.wh..wh..opq") + member(".wh.e")
    new = member("f", b"new") + directory("d") + directory("d/keep") + member("d/keep/new", b"n") + directory("e")
    base = (
        member("f", b"old")
        + directory("d/keep")
        + member("d/keep/old", b"o")
        + member("d/x", b"o")
        + member("e/old", b"o")
    )
    unpack(tmp_path / "root", base, white + new if first else new + white)
    assert listing(tmp_path / "root") == {"f": "new", "d": "dir", "d/keep": "dir", "d/keep/new": "n", "e": "dir"}


def test_an_opaque_root(tmp_path: Path) -> None:
    unpack(tmp_path / "root", member("a/b", b"1") + member("c", b"2"), member(".wh..wh..opq") + member("n", b"3"))
    assert listing(tmp_path / "root") == {"n": "3"}


def test_aufs_metadata_is_left_out(tmp_path: Path) -> None:
    unpack(
        tmp_path / "root", directory(".wh..wh.plnk") + member(".wh..wh.plnk/1.2", b"x") + member(".wh..wh.aufs", b"y")
    )
    assert listing(tmp_path / "root") == {}


# Changes of type between layers


@pytest.mark.parametrize("after", ["file", "directory", "link", "fifo", "hardlink"])
@pytest.mark.parametrize("before", ["file", "directory", "full directory", "link", "dangling link", "fifo"])
def test_a_later_layer_may_change_what_a_name_is(tmp_path: Path, before: str, after: str) -> None:
    kinds = {
        "file": member("x", b"file"),
        "directory": directory("x"),
        # In its namespace berth is root, whom no mode of a lower layer's directory stops.
        "full directory": directory("x") + directory("x/y", mode=0o500 if ROOT else 0o755) + member("x/y/z", b"deep"),
        "link": symlink("x", "other"),
        "dangling link": symlink("x", "/no/where"),
        "fifo": member("x", kind=b"6"),
        "hardlink": hardlink("x", "keep"),
    }
    base = directory("other") + member("other/f", b"untouched") + member("keep", b"kept")
    unpack(tmp_path / "root", base + kinds[before], kinds[after])
    path = tmp_path / "root/x"
    mode = path.lstat().st_mode
    expected = {
        "file": stat.S_ISREG,
        "directory": stat.S_ISDIR,
        "link": stat.S_ISLNK,
        "fifo": stat.S_ISFIFO,
        "hardlink": stat.S_ISREG,
    }
    assert expected[after](mode)
    if after == "directory":
        assert os.listdir(path) == (["y"] if before == "full directory" else [])  # directories are merged
        if before == "full directory":
            (path / "y").chmod(0o700)
    assert (tmp_path / "root/other/f").read_text() == "untouched"
    assert (tmp_path / "root/keep").read_text() == "kept"


def test_a_directory_that_is_replaced_later_in_its_layer_leaves_no_mode_behind(tmp_path: Path) -> None:
    layer = directory("d", mode=0o700) + member("d", b"file") + member("d/x", b"implied directory")
    unpack(tmp_path / "root", layer + directory("o", mode=0o701) + directory("l", mode=0) + symlink("l", "o"))
    assert stat.S_IMODE((tmp_path / "root/d").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "root/o").stat().st_mode) == 0o701


def test_the_last_of_duplicate_entries_counts(tmp_path: Path) -> None:
    unpack(
        tmp_path / "root",
        member("f", b"first, longer") + member("f", b"second") + directory("d", mode=0o700) + directory("d"),
    )
    assert (tmp_path / "root/f").read_text() == "second"
    assert stat.S_IMODE((tmp_path / "root/d").stat().st_mode) == 0o755


def test_a_file_that_becomes_a_directory_because_a_name_implies_it(tmp_path: Path) -> None:
    unpack(tmp_path / "root", member("a", b"file"), member("a/b", b"x"))
    assert listing(tmp_path / "root") == {"a": "dir", "a/b": "x"}


# Links on the way


def test_a_merged_usr_stays_merged(tmp_path: Path) -> None:
    """Layers of tools that know nothing of the base carry lib/x, and some the directory lib/ as well."""
    base = directory("usr/lib") + directory("usr/bin") + symlink("lib", "usr/lib") + symlink("bin", "usr/bin")
    unpack(
        tmp_path / "root",
        base + member("usr/lib/ld.so", b"ld"),
        member("lib/x", b"1"),
        directory("lib", mode=0o700) + member("lib/y", b"2") + directory("bin/") + member("bin/z", b"3"),
    )
    assert listing(tmp_path / "root") == {
        "usr": "dir", "usr/lib": "dir", "usr/bin": "dir", "usr/lib/ld.so": "ld",
        "lib": "-> usr/lib", "bin": "-> usr/bin",
        "usr/lib/x": "1", "usr/lib/y": "2", "usr/bin/z": "3",
    }  # fmt: skip
    assert stat.S_IMODE((tmp_path / "root/usr/lib").stat().st_mode) == 0o755


def test_an_opaque_directory_does_replace_the_link_into_usr(tmp_path: Path) -> None:
    base = directory("usr/lib") + symlink("lib", "usr/lib") + member("usr/lib/ld.so", b"ld")
    unpack(tmp_path / "root", base, directory("lib") + member("lib/.wh..wh..opq") + member("lib/own", b"x"))
    assert listing(tmp_path / "root") == {
        "usr": "dir",
        "usr/lib": "dir",
        "usr/lib/ld.so": "ld",
        "lib": "dir",
        "lib/own": "x",
    }


def test_any_other_link_is_replaced_by_a_directory_entry(tmp_path: Path) -> None:
    base = directory("run") + directory("var") + symlink("var/run", "/run") + member("run/x", b"1")
    unpack(tmp_path / "root", base, directory("var/run") + member("var/run/y", b"2"))
    assert listing(tmp_path / "root") == {"run": "dir", "run/x": "1", "var": "dir", "var/run": "dir", "var/run/y": "2"}


@pytest.mark.parametrize("target", ["/data/real", "data/real", "./data/../data/./real", "/../../data/real", "other"])
def test_links_on_the_way_are_followed_inside_the_root(tmp_path: Path, target: str) -> None:
    base = directory("data/real") + symlink("other", "/data/real") + symlink("link", target)
    unpack(tmp_path / "root", base, member("link/sub/f", b"x"), hardlink("h", "link/sub/f") + member("link/sub/.wh.f"))
    assert listing(tmp_path / "root") == {
        "data": "dir", "data/real": "dir", "data/real/sub": "dir", "other": "-> /data/real",
        "link": f"-> {target}", "h": "x",
    }  # fmt: skip


def test_a_dangling_link_on_the_way_is_followed_into_new_directories(tmp_path: Path) -> None:
    unpack(tmp_path / "root", symlink("var/run", "/run/here") + member("var/run/f", b"x"))
    assert (tmp_path / "root/run/here/f").read_text() == "x"


def test_a_link_that_changes_leads_elsewhere_at_once(tmp_path: Path) -> None:
    layer = (
        directory("a")
        + directory("b")
        + symlink("l", "a")
        + member("l/1", b"1")
        + symlink("l", "b")
        + member("l/2", b"2")
    )
    unpack(tmp_path / "root", layer)
    assert listing(tmp_path / "root") == {"a": "dir", "b": "dir", "a/1": "1", "b/2": "2", "l": "-> b"}


# Names and attributes


def test_names_of_any_bytes(tmp_path: Path) -> None:
    names = [b"new\nline", b"\xff\xfe", b" ", b"-rf", "ünï".encode(), b"a" * 255, b"*", b"\\", b"tab\t"]
    unpack(tmp_path / "root", b"".join(member(name, name) for name in names))
    assert sorted(os.listdir(os.fsencode(tmp_path / "root"))) == sorted(names)


def test_long_names_in_pax_gnu_and_ustar(tmp_path: Path) -> None:
    pax, gnu = "p/" * 60 + "pax", "g/" * 60 + "gnu"
    prefixed = bytearray(header(b"file", b"0", uid=os.getuid(), gid=os.getgid()))
    prefixed[345:355] = b"pre/fix/es"

    def gnu_long(kind: bytes, text: str) -> bytes:
        data = os.fsencode(text) + b"\0"
        return header(b"././@LongLink", kind, size=len(data), magic=b"ustar  \0") + padded(data)

    unpack(
        tmp_path / "root",
        member(pax, b"1") + gnu_long(b"L", gnu) + member("cut", b"2") + with_checksum(prefixed)
        + gnu_long(b"L", "link") + gnu_long(b"K", gnu) + member("cut", kind=b"1", link="cut"),
    )  # fmt: skip
    assert (tmp_path / "root" / pax).read_text() == "1"
    assert (tmp_path / "root" / gnu).read_text() == "2"
    assert (tmp_path / "root/link").read_text() == "2"
    assert (tmp_path / "root/pre/fix/es/file").exists()


def test_global_pax_headers_hold_for_all_entries_that_follow(tmp_path: Path) -> None:
    body = pax_records({"comment": "git archive", "mtime": "4444"})
    unpack(
        tmp_path / "root",
        header(b"pax", b"g", size=len(body)) + padded(body) + member("f") + member("g", pax={"mtime": "5"}),
    )
    assert (tmp_path / "root/f").stat().st_mtime == 4444
    assert (tmp_path / "root/g").stat().st_mtime == 5


def test_extended_attributes(tmp_path: Path) -> None:
    report = unpack(
        tmp_path / "root",
        member("f", b"x", mode=0o444, pax={"SCHILY.xattr.user.note": b"b\0\xffin", "SCHILY.xattr.user.empty": ""})
        + member("d", kind=b"5", mode=0o555, pax={"SCHILY.xattr.user.dir": "yes"})
        + member("l", kind=b"2", link="f", pax={"SCHILY.xattr.user.x": "no"}),
    )  # fmt: skip
    assert os.getxattr(tmp_path / "root/f", "user.note") == b"b\0\xffin"
    assert os.getxattr(tmp_path / "root/f", "user.empty") == b""
    assert os.getxattr(tmp_path / "root/d", "user.dir") == b"yes"
    assert report.xattrs_skipped == {"user.x": 1}


# Sparse files


def _is_hole(path: Path, at: int) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.lseek(fd, at, os.SEEK_DATA) > at
    except OSError as error:
        return error.errno == errno.ENXIO  # no data from here to the end
    finally:
        os.close(fd)


def test_runs_of_zeros_become_holes(tmp_path: Path) -> None:
    data = b"head" + bytes(3 << 20) + b"middle" + bytes(300_001)
    report = unpack(tmp_path / "root", member("f", data) + member("zeros", bytes(1 << 20)))
    assert (tmp_path / "root/f").read_bytes() == data
    assert _is_hole(tmp_path / "root/f", 1 << 20)
    assert (tmp_path / "root/zeros").stat().st_blocks * 512 <= 2 << 16  # pieces that straddle two reads are written
    assert (tmp_path / "root/zeros").stat().st_size == 1 << 20
    assert report.data < 600_000


_PIECES = [(4096, 3), (1 << 20, 5), (2 << 20, 0)]
_CONTENT = b"abchello"


def _pax_0_0() -> bytes:
    records: list[tuple[str, str | bytes]] = [("GNU.sparse.size", str(2 << 20)), ("GNU.sparse.numblocks", "3")]
    for offset, length in _PIECES:
        records += [("GNU.sparse.offset", str(offset)), ("GNU.sparse.numbytes", str(length))]
    body = pax_records(records)
    return header(b"pax", b"x", size=len(body)) + padded(body) + member("f", _CONTENT)


def _pax_0_1() -> bytes:
    numbers = ",".join(f"{offset},{length}" for offset, length in _PIECES)
    pax = {
        "GNU.sparse.size": str(2 << 20),
        "GNU.sparse.map": numbers,
        "GNU.sparse.name": "f",
        "GNU.sparse.numblocks": "3",
    }
    return member("GNUSparseFile/f", _CONTENT, pax=pax)


def _pax_1_0() -> bytes:
    lines = padded(b"3\n" + b"".join(b"%d\n%d\n" % piece for piece in _PIECES))
    pax = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(2 << 20),
        "GNU.sparse.name": "f",
    }
    return member("GNUSparseFile/f", lines + _CONTENT, pax=pax)


def _gnu_old() -> bytes:
    block = bytearray(header(b"f", b"S", size=len(_CONTENT), magic=b"ustar  \0", uid=os.getuid(), gid=os.getgid()))
    pieces = [(offset, 0) for offset in range(4)] + _PIECES  # more than fit into the header
    fields = b"".join(octal(offset, 12) + octal(length, 12) for offset, length in pieces)
    block[386:482] = fields[:96]
    block[482:483] = b"\1"
    block[483:495] = octal(2 << 20, 12)
    return with_checksum(block) + padded(fields[96:]) + padded(_CONTENT)


@pytest.mark.parametrize("form", [_pax_0_0, _pax_0_1, _pax_1_0, _gnu_old])
def test_sparse_files_keep_their_holes(tmp_path: Path, form: Callable[[], bytes]) -> None:
    unpack(tmp_path / "root", form() + member("next", b"n"))
    expected = bytearray(2 << 20)
    expected[4096:4099], expected[1 << 20 : (1 << 20) + 5] = b"abc", b"hello"
    assert (tmp_path / "root/f").read_bytes() == bytes(expected)
    assert _is_hole(tmp_path / "root/f", 64 << 10)
    assert (tmp_path / "root/next").read_text() == "n"


@pytest.mark.parametrize("form", ["posix", "gnu", "--sparse-version=0.0", "--sparse-version=0.1"])
def test_sparse_files_as_gnu_tar_writes_them(tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "f", "wb") as file:
        for number in range(40):
            file.seek(number << 17)
            file.write(b"%d" % number)
        file.truncate(7 << 20)
    argv = ["--format=posix", form] if form.startswith("-") else [f"--format={form}"]
    subprocess.run(["tar", "-C", source, "-S", *argv, "-cf", tmp_path / "a.tar", "."], check=True)
    unpack(tmp_path / "root", (tmp_path / "a.tar").read_bytes())
    assert (tmp_path / "root/f").read_bytes() == (source / "f").read_bytes()
    assert _is_hole(tmp_path / "root/f", 64 << 10)


# Compression


@pytest.mark.parametrize("codec", ["", "gzip", "gzip members", "zstd", "xz", "bzip2"])
def test_layers_are_decompressed_by_what_they_are(tmp_path: Path, codec: str) -> None:
    data = member("f", os.urandom(3 << 20)) + member("g", b"x" * (5 << 20)) + END
    match codec:
        case "gzip":
            packed = gzip.compress(data)
        case "gzip members":
            packed = b"".join(gzip.compress(data[at : at + 999_999]) for at in range(0, len(data), 999_999)) + bytes(
                512
            )
        case "xz":
            packed = lzma.compress(data, preset=0)
        case "bzip2":
            packed = bz2.compress(data, 1)
        case "zstd":
            if find_program("zstd") is None:
                pytest.skip("zstd is not installed")
            packed = subprocess.run(["zstd", "-1cq"], input=data, capture_output=True, check=True).stdout
        case _:
            packed = data
    with file_of(packed) as fd:
        assert stream.codec_of(fd) == codec.partition(" ")[0]
        with stream.opened(fd, where="test") as opened:
            assert opened.read(len(data) + 1) == data
    (tmp_path / "packed").write_bytes(packed)
    target = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    told: list[int] = []
    with file_of(packed) as fd:
        unpack_layers(
            target, [(fd, spec.LAYER_GZIP)], devices="skip", progress=lambda done, total: told.append(done == total)
        )
    os.close(target)
    assert told[-1]
    assert (tmp_path / "g").stat().st_size == 5 << 20


@pytest.mark.parametrize("codec", ["gzip", "zstd", "xz", "bzip2"])
def test_truncated_and_damaged_compression_is_an_image_error(codec: str) -> None:
    data = os.urandom(100_000) + bytes(100_000)
    match codec:
        case "gzip":
            packed = gzip.compress(data)
        case "xz":
            packed = lzma.compress(data)
        case "bzip2":
            packed = bz2.compress(data)
        case _:
            if find_program("zstd") is None:
                pytest.skip("zstd is not installed")
            packed = subprocess.run(["zstd", "-cq"], input=data, capture_output=True, check=True).stdout
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    for bad in (packed[:-5], packed[: len(packed) // 2], bytes(damaged), packed[:12]):
        with file_of(bad) as fd, pytest.raises(ImageFormatError, match=r"test is (truncated|damaged)"):
            with stream.opened(fd, where="test") as opened:
                opened.drain()


def test_what_runs_in_a_namespace_takes_and_gives_plain_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int | None]] = []
    monkeypatch.setattr("berth.inside.report", lambda done, total: told.append((done, total)))  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    target = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    with file_of(member("f", b"x") + END) as fd:
        result = unpack_inside(target, [(fd, spec.LAYER)], "skip")
    os.close(target)
    assert result["entries"] == 1
    assert told[-1][0] == told[-1][1]


# The parser beside the standard library's


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=150).filter(lambda text: "\0" not in text and text.strip("/.")),
            st.binary(max_size=2000),
            st.integers(0, 2**31),
            st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
        ),
        max_size=6,
    )
)
def test_what_tarfile_writes_is_read(items: list[tuple[str, bytes, int, int]]) -> None:
    out = io.BytesIO()
    form = items[0][3] if items else tarfile.PAX_FORMAT
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data, number, _ in items:
            info = tarfile.TarInfo(name)
            info.size, info.uid, info.gid, info.mtime = len(data), number, number // 2, number
            tar.addfile(info, io.BytesIO(data))
    reader = TarReader(stream.ByteStream(iter([out.getvalue()]), where="test"))
    read = [(entry.name, b"".join(reader.pieces()), entry.uid, entry.gid, entry.mtime_ns) for entry in reader]
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        expected = [
            (os.fsencode(info.name), _data(tar, info), info.uid, info.gid, int(info.mtime) * 10**9) for info in tar
        ]
    assert [(name.rstrip(b"/"), *rest) for name, *rest in read] == [
        (name.rstrip(b"/"), *rest) for name, *rest in expected
    ]


def _data(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    return file.read() if file else b""
