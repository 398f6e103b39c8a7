"""Trees go by the user's own hands; only what is a machine's takes a user namespace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from berth import trees, userns
from berth.errors import UnsupportedError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of a user who is not root and has no subordinate ids."""

    def no_range(_uid: int, _gid: int) -> object:
        raise UnsupportedError("user nobody has no range")

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(userns, "plan_idmap", no_range)
    (tmp_path / "tree/folder").mkdir(parents=True)
    (tmp_path / "tree/folder/file").touch()
    return tmp_path / "tree"


def test_ones_own_tree_goes_without_subordinate_ids(tree: Path) -> None:
    trees.delete(tree)
    assert not tree.exists()


def test_what_one_may_not_remove_goes_in_a_user_namespace(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(path)

    calls: list[object] = []
    monkeypatch.setattr(trees, "remove_tree", refuse)
    monkeypatch.setattr(userns, "plan_idmap", lambda uid, gid: (uid, gid))
    monkeypatch.setattr(userns, "call", lambda name, arguments, **_: calls.append((name, arguments)))
    trees.delete(tree)
    assert calls == [("berth.trees:remove_tree", {"path": str(tree)})]


def test_what_is_not_there_is_fine(tree: Path) -> None:
    trees.delete(tree / "absent")
