"""A machine's changes as a layer: what is written is what `apply_layer` and other readers make of it again.

The marks are those of an overlayfs in a user namespace (`user.overlay.*`), which any user may set; root's are tested
with real mounts in tests/integration/test_adapt.py.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import ImageFormatError
from berth.oci import tar
from berth.oci.diff import Digests, write_layer
from berth.oci.stream import opened
from berth.oci.tarwriter import END, Member, encode_member, padding
from berth.userns import Extent, IdMap
from tars import directory, file_of, listing, member, symlink, unpack

MINE = os.getuid()


def layer(upper: Path, **options: object) -> tuple[bytes, Digests]:
    out = io.BytesIO()
    digests = write_layer(str(upper), out, **options)  # type: ignore[arg-type]
    return out.getvalue(), digests


def mark(path: Path, name: str, value: bytes = b"y") -> None:
    os.setxattr(path, f"user.overlay.{name}", value)


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getnames()


@pytest.fixture
def upper(scratch: Path) -> Path:
    path = scratch / "upper"
    path.mkdir()
    return path


def test_a_tree_comes_back_as_it_was(scratch: Path, upper: Path) -> None:
    long = "n" * 120
    (upper / "etc").mkdir(mode=0o700)
    (upper / "etc/f").write_text("hello")
    (upper / "etc/f").chmod(0o4750)
    os.link(upper / "etc/f", upper / "etc/h")
    (upper / "etc/s").symlink_to("/" + long)
    (upper / long).mkdir()
    (upper / long / "ümlaut").write_bytes(b"x" * 513)
    (upper / os.fsdecode(b"raw\xff")).write_text("bytes")
    os.mkfifo(upper / "pipe")
    os.setxattr(upper / "etc/f", "user.note", b"a\0b\xff")
    os.utime(upper / "etc/f", ns=(0, 1_234_567_890_123_456_789))
    os.utime(upper / "etc", ns=(0, -1_500_000_000))
    data, digests = layer(upper)
    assert digests.diff_id == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert digests.size == len(data)
    assert Digests.from_json(digests.to_json()) == digests
    root = scratch / "root"
    unpack(root, data[: -len(END)])
    status = (root / "etc/f").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o4750, 1_234_567_890_123_456_789)
    assert status.st_ino == (root / "etc/h").stat().st_ino
    assert os.getxattr(root / "etc/f", "user.note") == b"a\0b\xff"
    assert os.readlink(root / "etc/s") == "/" + long
    assert (root / "etc").stat().st_mtime_ns == -1_500_000_000
    assert stat.S_IMODE((root / "etc").stat().st_mode) == 0o700
    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)
    (upper / "pipe").unlink()
    (root / "pipe").unlink()
    assert listing(root) == listing(upper)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:  # another reader
        assert archive.getmember("etc/f").pax_headers["SCHILY.xattr.user.note"]
        assert archive.getmember(f"{long}/ümlaut").size == 513


def test_the_same_tree_gives_the_same_bytes(upper: Path) -> None:
    for name in "cab":
        (upper / name).mkdir()
        (upper / name / "f").write_text(name)
    assert layer(upper) == layer(upper)
    assert names(layer(upper)[0]) == ["a", "a/f", "b", "b/f", "c", "c/f"]


def test_an_attribute_that_no_archive_can_name_is_left_out(upper: Path) -> None:
    """A PAX record ends its key at the first equals sign: it would come back as another attribute."""
    (upper / "f").write_text("x")
    os.setxattr(upper / "f", "user.a=b", b"1")
    os.setxattr(upper / "f", "user.c", b"=2")
    with tarfile.open(fileobj=io.BytesIO(layer(upper)[0])) as archive:
        records = archive.getmember("f").pax_headers
    assert {key: value for key, value in records.items() if "xattr" in key} == {"SCHILY.xattr.user.c": "=2"}


def test_an_open_directory_does_as_well_as_its_path(upper: Path) -> None:
    (upper / "f").write_text("x")
    fd = os.open(upper, os.O_PATH | os.O_DIRECTORY)
    try:
        out = io.BytesIO()
        write_layer(fd, out)
        assert out.getvalue() == layer(upper)[0]
    finally:
        os.close(fd)


def test_opaque_directories_and_whiteouts(scratch: Path, upper: Path) -> None:
    lower = scratch / "lower"
    base = directory("d") + member("d/old", b"1") + directory("e") + member("e/gone", b"2") + member("e/kept", b"3")
    unpack(lower, base)
    for name in ("d", "e", "new"):
        (upper / name).mkdir()
    (upper / "d/mine").write_text("4")
    mark(upper / "d", "opaque")
    mark(upper / "new", "opaque")  # the kernel marks new directories, too
    mark(upper / "e", "opaque", b"x")  # there may be whiteouts that are marked files
    (upper / "e/gone").touch()
    mark(upper / "e/gone", "whiteout")
    (upper / "e/empty").touch()
    data, digests = layer(upper, lower=str(lower))
    assert names(data) == ["d", "d/.wh..wh..opq", "d/mine", "e", "e/empty", "e/.wh.gone", "new"]
    assert digests.whiteouts == 2
    root = scratch / "root"
    unpack(root, base, data[: -len(END)])
    assert listing(root) == {"d": "dir", "d/mine": "4", "e": "dir", "e/kept": "3", "e/empty": "", "new": "dir"}
    assert "new/.wh..wh..opq" in names(layer(upper)[0]), "nobody knows whether there is something below"


def test_a_renamed_directory_comes_with_all_that_is_in_it(scratch: Path, upper: Path) -> None:
    lower = scratch / "lower"
    base = (
        directory("a") + directory("a/deep") + member("a/deep/f", b"1") + member("a/gone", b"2")
        + member("a/kept", b"3") + symlink("a/link", "kept") + directory("b") + member("b/old", b"4")
    )  # fmt: skip
    unpack(lower, base)
    (upper / "b").mkdir()
    mark(upper / "b", "redirect", b"/a")
    mark(upper / "b", "opaque", b"x")
    (upper / "b/gone").touch()
    mark(upper / "b/gone", "whiteout")
    (upper / "b/new").write_text("5")
    (upper / "b/moved").mkdir()
    mark(upper / "b/moved", "redirect", b"deep")
    data, _ = layer(upper, lower=str(lower))
    root = scratch / "root"
    unpack(root, base, data[: -len(END)])
    found = {name: what for name, what in listing(root).items() if name.startswith("b/")}
    assert found == {
        "b/deep": "dir", "b/deep/f": "1", "b/kept": "3", "b/link": "-> kept", "b/new": "5", "b/moved": "dir",
        "b/moved/f": "1",
    }  # fmt: skip
    with pytest.raises(ImageFormatError, match="/b was renamed"):
        layer(upper)


def test_a_file_whose_data_is_the_images(scratch: Path, upper: Path) -> None:
    lower = scratch / "lower"
    unpack(lower, member("f", b"data"))
    (upper / "f").touch()
    os.truncate(upper / "f", 4)
    mark(upper / "f", "metacopy", b"")
    data, _ = layer(upper, lower=str(lower))
    assert b"data" in data


def test_a_mark_that_leads_out_stays_inside(scratch: Path, upper: Path) -> None:
    (scratch / "secret").mkdir()
    (scratch / "secret/f").write_text("secret")
    lower = scratch / "lower"
    unpack(lower, symlink("out", str(scratch / "secret")))
    for name, target in (("a", b"/../secret"), ("b", b"/out"), ("c", b"../../secret")):
        (upper / name).mkdir()
        mark(upper / name, "redirect", target)
    assert b"secret" not in layer(upper, lower=str(lower))[0]


def test_what_no_layer_can_hold_is_left_out(upper: Path) -> None:
    (upper / ".wh.evil").write_text("x")
    (upper / "f").write_text("x")
    data, digests = layer(upper)
    assert names(data) == ["f"]
    assert digests.left_out == 1


def test_excluded_paths_go_with_all_below(upper: Path) -> None:
    for name in ("etc/hosts", "run/x/y", "var/lib/berth/twin", "hosts"):
        (upper / name).parent.mkdir(parents=True, exist_ok=True)
        (upper / name).write_text("x")
    data, _ = layer(upper, exclude=("etc/hosts", "/run", "var/lib/berth"))
    assert names(data) == ["etc", "hosts", "var", "var/lib"]


def test_holes_stay_holes(scratch: Path, upper: Path) -> None:
    with open(upper / "lastlog", "wb") as file:
        os.truncate(file.fileno(), 10 * 2**30)
        os.pwrite(file.fileno(), b"somebody", 5 * 2**30)
    (upper / "end").touch()
    os.truncate(upper / "end", 2**20)
    with open(upper / "full", "wb") as file:
        file.write(b"\1" * 2**20)
    data, _ = layer(upper)
    assert len(data) < 2**21
    root = scratch / "root"
    unpack(root, data[: -len(END)])
    for name in ("lastlog", "end", "full"):
        assert (root / name).stat().st_size == (upper / name).stat().st_size
    with open(root / "lastlog", "rb") as file:
        assert os.pread(file.fileno(), 8, 5 * 2**30) == b"somebody"
    assert (root / "lastlog").stat().st_blocks < 1000
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getmember("lastlog").size == 10 * 2**30
        found = archive.extractfile("end")
        assert found is not None
        assert found.read() == bytes(2**20)


def test_ids_are_mapped_back(upper: Path) -> None:
    (upper / "f").write_text("x")
    ours = IdMap((Extent(0, MINE, 1),), (Extent(5, os.getgid(), 1),))
    others = IdMap((Extent(0, MINE + 1, 1),), (Extent(0, os.getgid() + 1, 1),))
    for idmap, owner in ((ours, (0, 5)), (others, (65534, 65534))):
        with tarfile.open(fileobj=io.BytesIO(layer(upper, idmap=idmap)[0])) as archive:
            found = archive.getmember("f")
            assert (found.uid, found.gid) == owner


def test_marks_of_the_guests_own_are_none_for_roots_machines(upper: Path) -> None:
    (upper / "d").mkdir()
    mark(upper / "d", "opaque")
    idmap = IdMap((Extent(0, MINE, 1),), (Extent(0, os.getgid(), 1),))
    assert names(layer(upper, idmap=idmap)[0]) == ["d"]


def test_access_control_lists_are_mapped_too(upper: Path) -> None:
    (upper / "f").write_text("x")
    entries = [
        (0x01, 6, 2**32 - 1),
        (0x02, 4, 1000 + 7),
        (0x04, 4, 2**32 - 1),
        (0x10, 4, 2**32 - 1),
        (0x20, 4, 2**32 - 1),
    ]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(upper / "f", "system.posix_acl_access", value)
    except OSError:
        pytest.skip("this file system has no access control lists")
    idmap = IdMap((Extent(0, 1000, 100),), (Extent(0, 1000, 100),))
    data, _ = layer(upper, idmap=idmap)
    with file_of(data) as fd, opened(fd, where="it") as stream:
        (found,) = list(tar.TarReader(stream))
    assert found.xattrs[b"system.posix_acl_access"] == value.replace(struct.pack("<I", 1007), struct.pack("<I", 7))


def test_directories_too_deep_are_refused(upper: Path) -> None:
    path = upper
    for _ in range(260):
        path = path / "d"
        path.mkdir()
    with pytest.raises(ImageFormatError, match="nested deeper"):
        layer(upper)


@given(
    name=st.binary(min_size=1, max_size=300).filter(
        lambda name: not {0, 0x2F} & set(name) and name not in (b".", b"..")
    ),
    uid=st.integers(0, 2**32 - 3),
    mtime_ns=st.integers(-(2**60), 2**60),
    mode=st.integers(0, 0o7777),
    size=st.integers(0, 2000),
    value=st.binary(max_size=200),
)
def test_the_reader_reads_what_the_writer_writes(
    name: bytes, uid: int, mtime_ns: int, mode: int, size: int, value: bytes
) -> None:
    written = Member(name, tar.FILE, mode, uid, uid, size, mtime_ns, xattrs={b"user.x": value})
    data = encode_member(written) + b"x" * size + padding(size) + END
    with file_of(data) as fd, opened(fd, where="it") as stream:
        reader = tar.TarReader(stream)
        entry = next(iter(reader))
        assert b"".join(reader.pieces()) == b"x" * size
    assert (entry.name, entry.mode, entry.uid, entry.gid, entry.mtime_ns) == (name, mode, uid, uid, mtime_ns)
    assert entry.xattrs == {b"user.x": value}
