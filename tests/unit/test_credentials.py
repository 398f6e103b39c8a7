"""What of a home a machine does not see."""

from __future__ import annotations

import re
from pathlib import Path

from berth.credentials import DIRECTORIES, FILES, Hidden, View, plan_hidden

_DOCS = Path(__file__).parents[2] / "docs/security.md"


def _home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".config/gcloud").mkdir(parents=True)
    (home / ".docker").mkdir()
    (home / ".netrc").write_text("machine x password y")
    (home / "project").mkdir()
    return home


def test_what_exists_is_hidden_folders_and_files(tmp_path: Path) -> None:
    home = _home(tmp_path)
    hidden = plan_hidden(str(home), [View(str(home), str(home))], ())
    assert {(item.relative, item.directory) for item in hidden} == {
        (".ssh", True), (".config/gcloud", True), (".docker", True), (".netrc", False),
    }  # fmt: skip
    assert Hidden(f"{home}/.ssh", ".ssh", directory=True) in hidden


def test_exposed_paths_stay_open(tmp_path: Path) -> None:
    home = _home(tmp_path)
    hidden = plan_hidden(str(home), [View(str(home), str(home))], (".ssh", f"{home}/.netrc", ".config/gcloud/"))
    assert [item.relative for item in hidden] == [".docker"]


def test_a_link_is_hidden_where_it_leads(tmp_path: Path) -> None:
    home = _home(tmp_path)
    (home / "dotfiles/aws").mkdir(parents=True)
    (home / ".aws").symlink_to(home / "dotfiles/aws")
    paths = {item.path for item in plan_hidden(str(home), [View(str(home), str(home))], ())}
    assert f"{home}/dotfiles/aws" in paths
    assert f"{home}/.aws" not in paths


def test_a_link_out_of_every_view_needs_no_cover(tmp_path: Path) -> None:
    home = _home(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (home / ".aws").symlink_to(tmp_path / "elsewhere")
    assert not [item for item in plan_hidden(str(home), [View(str(home), str(home))], ()) if item.relative == ".aws"]


def test_a_mount_of_a_parent_is_covered_too_and_at_its_destination(tmp_path: Path) -> None:
    home = _home(tmp_path)
    hidden = plan_hidden(str(home), [View(str(tmp_path), "/mnt/all")], ())
    assert Hidden("/mnt/all/home/.ssh", ".ssh", directory=True) in hidden


def test_a_mount_of_the_path_itself_is_a_wish_to_see_it(tmp_path: Path) -> None:
    home = _home(tmp_path)
    assert plan_hidden(str(home), [View(f"{home}/.ssh", "/keys")], ()) == []


def test_berths_own_folders_are_never_open(tmp_path: Path) -> None:
    home = _home(tmp_path)
    data = home / ".local/share/berth"
    data.mkdir(parents=True)
    hidden = plan_hidden(str(home), [View(str(home), str(home))], (".local/share/berth",), [str(data), "/no/such"])
    assert [item.path for item in hidden if item.path == str(data)] == [str(data)]


def test_the_documented_list_is_the_list() -> None:
    text = _DOCS.read_text()
    for marker, paths in (("DIRECTORIES", DIRECTORIES), ("FILES", FILES)):
        paragraph = text.partition(f"<!-- credentials.{marker} -->")[2].partition("\n\n")[0]
        assert sorted(re.findall(r"`([^`]+)`", paragraph)) == sorted(paths)
