"""User namespaces: which id is which."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from berth import userns
from berth.errors import DeadlineError, NotFoundError, UnsupportedError
from berth.userns import Extent, IdMap


def test_root_is_shifted_as_a_whole() -> None:
    idmap = userns.plan_idmap(0, 0)
    assert idmap.uids == idmap.gids == (Extent(0, userns.ROOT_BASE, 1 << 20),)
    assert idmap.host_root() == userns.ROOT_BASE
    assert idmap.nested().uids == (Extent(0, 0, 1 << 20),)


def test_keep_id_keeps_the_users_own_id() -> None:
    extents = userns._keep_id(1000, 100000, 65536)
    assert extents == (Extent(0, 100000, 1000), Extent(1000, 1000, 1), Extent(1001, 101000, 64535))
    assert sum(extent.size for extent in extents) == 65536


def test_keep_id_of_a_directory_services_user_beyond_the_range() -> None:
    assert userns._keep_id(1200345, 100000, 65536) == (Extent(0, 100000, 65536), Extent(1200345, 1200345, 1))


def test_nested_map_has_one_line_an_extent() -> None:
    extents = userns._keep_id(1000, 100000, 65536)
    nested = IdMap(extents, extents).nested()
    assert nested.uids == (Extent(0, 0, 1000), Extent(1000, 1000, 1), Extent(1001, 1001, 64535))


def test_subordinate_range_is_found_by_name_and_by_uid(tmp_path: Path) -> None:
    path = tmp_path / "subuid"
    path.write_text("other:100000:65536\nsmall:1:10\nbroken\nann:165536:65536\n1005:300000:65536\n")
    assert userns._subordinate_range(path, "ann", 1000) == (165536, 65536)
    assert userns._subordinate_range(path, "bob", 1005) == (300000, 65536)


@pytest.mark.parametrize("text", ["", "ann:100000:1000\n", "ann:x:65536\n", "ann\n"])
def test_no_subordinate_range_is_told_with_the_cure(tmp_path: Path, text: str) -> None:
    path = tmp_path / "subuid"
    path.write_text(text)
    with pytest.raises(UnsupportedError, match="user ann has no range") as caught:
        userns._subordinate_range(path, "ann", 1000)
    start = userns.next_free_range(Path("/etc/subuid"), Path("/etc/subgid"))  # nobody else's: they would share files
    span = f"{start}-{start + 65535}"
    assert caught.value.hint == f"sudo usermod --add-subuids {span} --add-subgids {span} ann"


def test_an_error_inside_arrives_as_what_it_was() -> None:
    with pytest.raises(NotFoundError, match="not there"):
        userns.call("berth.userns:_raise", {"message": _error("NotFoundError", "it is not there")})
    with pytest.raises(Exception, match="an unknown kind"):
        userns.call("berth.userns:_raise", {"message": _error("NoSuchClass", "an unknown kind")})


def _error(name: str, text: str) -> dict[str, object]:
    return {"error": {"class": name, "message": text, "hint": ""}}


def test_a_call_has_its_time() -> None:
    with pytest.raises(DeadlineError, match=r"signal:pause did not finish within 0\.2 s"):
        userns.call("signal:pause", {}, timeout_s=0.2)


def test_enter_command_runs_as_root_inside() -> None:
    assert userns.enter_command(7, ["id"]) == ["nsenter", "-t", "7", "-U", "-n", "-S", "0", "-G", "0", "--", "id"]


def test_a_call_without_a_namespace_runs_as_we_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10000)
    used = userns.call("berth.trees:disk_usage", {"path": str(tmp_path)})
    assert isinstance(used, int)
    assert used >= 10000
    assert os.listdir(tmp_path) == ["file"]
