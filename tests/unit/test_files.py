"""Files that are whole or absent, and directories that are this user's own."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth import files, locks, proc
from berth.errors import BerthError, StateFormatError
from support import ROOT

# A writer that dies, as by a power cut, when a step of the write is reached.
_CRASHER = """
import os, sys; from pathlib import Path; from berth import files, locks, proc
setattr(os, sys.argv[2], lambda *arguments, **options: os._exit(9))
files.write_atomic(Path(sys.argv[1]), b"new" * 100_000)
"""


def test_write_replaces_and_sets_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"one")
    files.write_atomic(path, b"two", mode=0o640)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file(tmp_path: Path, step: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    env = {"PYTHONPATH": str(ROOT / "src")}
    assert proc.run([sys.executable, "-c", _CRASHER, str(path), step], env=env, success=(9,)).status == 9
    assert path.read_bytes() == b"old"
    files.write_atomic(path, b"next")  # what the crash left is in nobody's way
    assert path.read_bytes() == b"next"
    assert os.listdir(tmp_path) == ["file"]


def test_writers_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "file"
    written = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(len(written)) as pool:
        for _ in range(5):
            list(pool.map(lambda data: files.write_atomic(path, data), written))
            assert path.read_bytes() in written
    assert os.listdir(tmp_path) == ["file"]


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    left, at_work = tmp_path / "old.partial", tmp_path / "new.partial"
    left.write_bytes(b"half")
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "link.partial").symlink_to(left)
    with locks.hold(at_work):
        files.sweep_partials(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["folder.partial", "link.partial", "new.partial"]
    files.sweep_partials(tmp_path / "absent")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*/file'"):
        files.write_atomic(tmp_path / "file", b"data")
    assert os.listdir(tmp_path) == []


def test_a_partial_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "file.partial").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        files.write_atomic(tmp_path / "file", b"data")
    assert target.read_bytes() == b"precious"


def test_a_link_itself_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "file").symlink_to(tmp_path / "target")
    files.write_atomic(tmp_path / "file", b"data")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "file").is_symlink()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8).filter(lambda key: key != "schema"), JSON, max_size=5))
def test_json_survives(tmp_path_factory: pytest.TempPathFactory, document: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "document.json"
    files.save_json(path, document, schema=3)
    assert files.load_json(path, schema=3) == {"schema": 3, **document}


def test_a_newer_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    files.save_json(tmp_path / "file", {}, schema=2)
    with pytest.raises(StateFormatError, match="written by a newer berth") as caught:
        files.load_json(tmp_path / "file", schema=1)
    assert caught.value.hint == "upgrade berth"


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"1", b'{"schema": "1"}', b"{}", b'{"schema": 0}', b'{"schema": null}',
        b"\xff\xfe\0", b"\0" * 64,
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(StateFormatError, match="is damaged") as caught:
        files.load_json(path, schema=1)
    assert str(path) in caught.value.message


@given(st.binary(max_size=60))
def test_any_bytes_load_or_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.json"
    path.write_bytes(data)
    with contextlib.suppress(StateFormatError):
        assert files.load_json(path, schema=1)["schema"] == 1


def test_deep_nesting_is_damage_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"[" * 200_000)
    with pytest.raises(StateFormatError, match="is damaged"):
        files.load_json(path, schema=1)


def test_an_absent_file_is_absent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.load_json(tmp_path / "file", schema=1)


def test_saved_text_is_ascii_and_ends_with_a_newline(tmp_path: Path) -> None:
    files.save_json(tmp_path / "file", {"name": "grün"}, schema=1)
    data = (tmp_path / "file").read_bytes()
    assert data.isascii()
    assert data.endswith(b"}\n")
    assert next(iter(json.loads(data))) == "schema"


def test_a_private_directory_is_private(tmp_path: Path) -> None:
    path = tmp_path / "a/b/c"
    files.make_private_directory(path)
    files.make_private_directory(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o755)
    files.make_private_directory(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_private_directory_is_no_link_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(BerthError, match="not a directory of this user's own"):
            files.make_private_directory(tmp_path / name)


@pytest.mark.root
def test_a_private_directory_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    path.mkdir()
    os.chown(path, 12345, 12345)
    with pytest.raises(BerthError, match="not a directory of this user's own"):
        files.make_private_directory(path)


def test_sync_directory(tmp_path: Path) -> None:
    files.sync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        files.sync_directory(tmp_path / "file")
