"""Layers that a guest has made, before they are stored: what can't be applied, and what is not to be in one."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import ImageFormatError
from berth.oci import hostile
from berth.oci.hostile import check_layer
from berth.oci.layer import Limits
from tars import END, directory, hardlink, member, symlink

EXCLUDE = (b"home/ada", b"etc/hosts", b"run")


def check(data: bytes, *, end: bytes = END, limits: Limits | None = None) -> int:
    fd = os.memfd_create("layer")
    try:
        os.write(fd, b"~" * 4096 + data + end + b"~")
        size = len(data) + len(end)
        return check_layer(fd, start=4096, size=size, exclude=EXCLUDE, where="the new layer", limits=limits)
    finally:
        os.close(fd)


def test_what_the_agent_writes_is_taken() -> None:
    data = (
        directory("etc") + member("etc/.wh.motd") + member("etc/f", b"x" * 600) + hardlink("etc/h", "etc/f")
        + directory("opt") + member("opt/.wh..wh..opq") + symlink("opt/l", "/etc/hosts") + member("fifo", kind=b"6")
        + member("home/adam", b"another") + hardlink("h2", "fifo") + member(b"raw\xff")
    )  # fmt: skip
    assert check(data) == 11
    assert check(b"") == 0


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (member("../x"), "leads upwards"),
        (member("a/../../x"), "leads upwards"),
        (hardlink("x", "../x"), "leads upwards"),
        (member("x/" * 257), "longer than any path"),
        (directory("./"), "the root itself"),
        (member("etc/hosts", b"x"), "not to be in an image"),
        (directory("home/ada/"), "not to be in an image"),
        (member("/./home//ada", b"x"), "not to be in an image"),
        (member("home/ada/.ssh/id", b"x"), "nothing of a machine's is taken from"),
        (member("etc/.wh.hosts"), "not to be in an image"),
        (member(".wh.run"), "not to be in an image"),
        (member("run/.wh..wh..opq"), "nothing of a machine's is taken from"),
        (member(".wh.x", b"data"), "no empty file"),
        (directory(".wh.x"), "no empty file"),
        (member(".wh.x/f"), "a directory has the name of a whiteout"),
        (member(".wh."), "hides no valid name"),
        (member(".wh..."), "hides no valid name"),
        (member(".wh..wh.plnk"), "hides no valid name"),
        (hardlink("x", "y"), "a hard link to what is not there"),
        (hardlink("x", "y") + member("y"), "a hard link to what is not there"),
        (directory("y") + hardlink("x", "y"), "a hard link to what is not there"),
        (hardlink("x", "x"), "a hard link to what is not there"),
        (symlink("x", ""), "a symbolic link to nothing"),
        (member("x", kind=b"Z"), "unknown type"),
    ],
)
def test_what_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ImageFormatError, match=why):
        check(member("before", b"1") + data)


@pytest.mark.parametrize("end", [b"", END[:512], END + END, END[:512] + b"x" * 512, END + member("after")])
def test_it_ends_where_it_says(end: bytes) -> None:
    with pytest.raises(ImageFormatError, match="does not end where it says"):
        check(member("x", b"1"), end=end)


def test_limits() -> None:
    with pytest.raises(ImageFormatError, match="more than 2 entries"):
        check(member("a") + member("b") + member("c"), limits=Limits(entries=2))
    with pytest.raises(ImageFormatError, match="its size is"):
        check(member("a", b"four"), limits=Limits(size=3))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "_MEMORY_MAX", 1000)
    many = [member(f"f{number}") + hardlink(f"l{number}", f"f{number}") for number in range(20)]
    assert check(b"".join(many[:9])) == 18
    with pytest.raises(ImageFormatError, match="than fit in memory"):
        check(b"".join(many))


def test_names_are_shown_harmless() -> None:
    with pytest.raises(ImageFormatError) as caught:
        check(member(b"\x1b[31m/../" + b"\xff" * 300))
    assert caught.value.message.isprintable()


@given(st.binary(max_size=2048), st.integers(0, 600))
def test_noise(noise: bytes, at: int) -> None:
    data = member("a", b"1") + hardlink("b", "a")
    with contextlib.suppress(ImageFormatError):
        check(data[:at] + noise + data[at + len(noise) :])
