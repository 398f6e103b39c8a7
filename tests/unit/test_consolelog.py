"""Reading what a keeper writes."""

from __future__ import annotations

from pathlib import Path

from berth import consolelog


def _read(path: Path, lines: int | None = None) -> bytes:
    return b"".join(consolelog.read(path, lines=lines, follow=False, alive=lambda: False))


def test_no_log_is_an_empty_one(tmp_path: Path) -> None:
    assert _read(tmp_path / "console.log") == b""


def test_all_of_it_the_rotated_part_first(tmp_path: Path) -> None:
    (tmp_path / "console.log.1").write_bytes(b"one\n")
    (tmp_path / "console.log").write_bytes(b"two\nthree")
    assert _read(tmp_path / "console.log") == b"one\ntwo\nthree"
    assert _read(tmp_path / "console.log", lines=2) == b"two\nthree"
    assert _read(tmp_path / "console.log", lines=0) == b""


def test_following_ends_with_the_machine_and_crosses_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"a\n")

    def grow() -> None:
        path.write_bytes(b"a\nb\n")

    def rotate() -> None:
        path.rename(tmp_path / "console.log.1")
        path.write_bytes(b"c\n")

    steps = iter([grow, rotate])

    def alive() -> bool:
        step = next(steps, None)
        if step is not None:
            step()
        return step is not None

    chunks = list(consolelog.read(path, lines=None, follow=True, alive=alive))
    assert b"".join(chunks) == b"a\nb\nc\n"


def test_a_link_in_place_of_the_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "console.log").symlink_to(tmp_path / "secret")
    try:
        said = _read(tmp_path / "console.log")
    except OSError:
        said = b""
    assert b"secret" not in said
