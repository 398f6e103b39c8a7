"""Paths in somebody else's directory never lead out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from berth.rooted import open_inside, resolve


def _root(tmp_path: Path) -> int:
    (tmp_path / "root").mkdir()
    return os.open(tmp_path / "root", os.O_PATH | os.O_DIRECTORY)


def _name(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def test_missing_parents_are_made_inside(tmp_path: Path) -> None:
    root = _root(tmp_path)
    fd = open_inside(root, "/home/ann/project", directory=True, owner=os.getuid())
    assert _name(fd) == str(tmp_path / "root/home/ann/project")
    file = open_inside(root, "/home/ann/.netrc", directory=False, owner=os.getuid())
    assert (tmp_path / "root/home/ann/.netrc").is_file()
    for each in (root, fd, file):
        os.close(each)


@pytest.mark.parametrize("target", ["/etc", "../../../../etc", "/proc/self/root/etc"])
def test_links_of_a_guest_resolve_inside(tmp_path: Path, target: str) -> None:
    root = _root(tmp_path)
    (tmp_path / "root/etc").mkdir()
    (tmp_path / "root/home").symlink_to(target)
    if target.startswith("/proc"):
        with pytest.raises(OSError, match="home"):
            open_inside(root, "/home/ann", directory=True, owner=os.getuid())
    else:
        fd = open_inside(root, "/home/ann", directory=True, owner=os.getuid())
        assert _name(fd) == str(tmp_path / "root/etc/ann")
        os.close(fd)
    os.close(root)


def test_dots_stay_inside(tmp_path: Path) -> None:
    root = _root(tmp_path)
    fd = resolve(root, "/../../..")
    assert _name(fd) == str(tmp_path / "root")
    os.close(fd)
    os.close(root)


def test_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    root = _root(tmp_path)
    (tmp_path / "root/file").touch()
    with pytest.raises(NotADirectoryError):
        open_inside(root, "/file", directory=True, owner=os.getuid())
    with pytest.raises(NotADirectoryError):
        open_inside(root, "/file/below", directory=True, owner=os.getuid())
    (tmp_path / "root/folder").mkdir()
    with pytest.raises(IsADirectoryError):
        open_inside(root, "/folder", directory=False, owner=os.getuid())
    os.close(root)
