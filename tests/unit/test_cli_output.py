"""What the command line shows: tables, JSON, errors, progress."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.cli import ending, output
from berth.cli.progress import Bar, Lines, Transfer, display
from berth.errors import (
    BerthError,
    BusyError,
    CommandError,
    DeadlineError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)
from berth.layout import Layout
from berth.progress import Silent
from berth.units import MIB


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("environment", "terminals", "expected"),
    [
        ("120", {1: 90}, 120),
        ("", {1: 90, 2: 70}, 90),
        ("x", {2: 70}, 70),
        ("0", {1: 90}, 90),
        ("-5", {2: 70}, 70),
        ("", {}, 44),
        ("", {1: 0}, 44),
    ],
)
def test_how_wide_it_may_be(
    monkeypatch: pytest.MonkeyPatch, environment: str, terminals: dict[int, int], expected: int
) -> None:
    def size(fd: int) -> os.terminal_size:
        if fd not in terminals:
            raise OSError(25, "Inappropriate ioctl for device")
        return os.terminal_size((terminals[fd], 24))

    monkeypatch.setenv("COLUMNS", environment)
    monkeypatch.setattr(os, "get_terminal_size", size)
    assert output.columns(44) == expected


class TestTables:
    def test_columns(self, capfd: pytest.CaptureFixture[str]) -> None:
        output.emit_table(("NAME", "STATE"), [("dev", "running"), ("a-long-name", "")], coloured="STATE")
        assert capfd.readouterr().out == "NAME          STATE\ndev           running\na-long-name   -\n"

    @pytest.mark.parametrize(("columns", "gap"), [(80, 3), (11, 2), (5, 1)])
    def test_a_narrow_terminal_keeps_rows_whole(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], columns: int, gap: int
    ) -> None:
        monkeypatch.setattr(os, "isatty", lambda _fd: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        output.emit_table(("NAME", "STATE"), [])
        assert capfd.readouterr().out == f"NAME{' ' * gap}STATE\n"

    def test_nothing_but_headings(self, capfd: pytest.CaptureFixture[str]) -> None:
        output.emit_table(("NAME", "STATE"), [])
        assert capfd.readouterr().out == "NAME   STATE\n"

    def test_no_escapes_reach_the_terminal(self, capfd: pytest.CaptureFixture[str]) -> None:
        output.emit_table(("A",), [("\033[31mred\nline",)])
        assert capfd.readouterr().out == "A\n?[31mred?line\n"

    def test_colour_only_on_a_terminal(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdout", Terminal())
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        output.emit_table(("STATE", "X"), [("broken", "y")], coloured="STATE")
        assert capfd.readouterr().out == "STATE    X\n\033[31mbroken\033[m   y\n"
        monkeypatch.setenv("NO_COLOR", "1")
        output.emit_table(("STATE", "X"), [("broken", "y")], coloured="STATE")
        assert capfd.readouterr().out == "STATE    X\nbroken   y\n"

    def test_json_survives_any_terminal(self, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        document = {"path": os.fsdecode(b"/\xff"), "name": "ü"}
        output.emit_json(document)
        written = capfdbinary.readouterr().out
        assert written.isascii()
        assert json.loads(written) == document

    def test_bytes_of_names_leave_as_they_came(self, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        output.emit(os.fsdecode(b"\xff\xfe"))
        assert capfdbinary.readouterr().out == b"\xff\xfe\n"

    def test_cells(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TZ", "UTC")
        assert output.size_cell(None) == ""
        assert output.size_cell(1536 * MIB) == "1.5G"
        assert output.time_cell(None) == ""
        assert output.time_cell("soon") == "soon"
        assert len(output.time_cell("2026-11-22T14:16:00Z")) == len("2026-11-22 14:16")


class TestErrors:
    def test_who_may_not_enter_berths_own_folders_is_told_which(
        self, layout: Layout, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for path in (layout.runtime.parent, layout.runtime, layout.runtime / "m"):
            ending.show_error(PermissionError(13, "Permission denied", str(path)))
            assert (
                f"hint: {layout.runtime} has to be a folder of yours: set BERTH_RUNTIME_DIR" in capsys.readouterr().err
            )
        ending.show_error(PermissionError(13, "Permission denied", "relative"))
        assert "hint" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "text", "status"),
        [
            (NotFoundError("image 'x' not found", hint="look"), "berth: image 'x' not found\nhint: look\n", 1),
            (InvalidArgumentError("invalid name 'X'"), "berth: invalid name 'X'\n", 2),
            (BusyError("it is in use"), "berth: it is in use\n", 1),
            (DeadlineError("too late"), "berth: too late\n", 1),
            (UnsupportedError("no"), "berth: no\n", 1),
            (CommandError(("crun", "run"), 1, "x\nboom\n"), "berth: crun failed with status 1: boom\n", 1),
            (PermissionError(13, "Permission denied", "/x"), "berth: /x: permission denied\n", 1),
            (OSError(28, "No space left on device"), "berth: no space left on device\n", 1),
            (OSError(28, "No space left on device", "/x"),
             ("berth: /x: no space left on device\n"
              "hint: make room there: berth system prune, or BERTH_DATA_DIR on a larger disk\n"), 1),
            (BerthError("two\nlines\033[2J"), "berth: two lines [2J\n", 1),
        ],
    )  # fmt: skip
    def test_rendering(self, error: Exception, text: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
        assert ending.show_error(error) == status
        assert capsys.readouterr() == ("", text)
        assert ending.show_error(error, failed=125) == 125

    def test_a_bug(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert ending.show_error(KeyError("x")) == 1
        assert capsys.readouterr().err.startswith("berth: internal error: KeyError: 'x'\nhint: ")

    @given(st.text(st.characters(codec=None)))
    def test_any_text_can_be_said(self, text: str) -> None:
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            ending.show_error(BerthError(text, hint=text))

    def test_colour(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        ending.show_error(BerthError("no"))
        assert stream.getvalue() == "\033[1;31mberth:\033[m no\n"

    def test_interrupt_and_broken_pipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        def interrupt() -> int:
            raise KeyboardInterrupt

        def bug() -> int:
            raise ZeroDivisionError("oh")

        assert ending.guarded(lambda: 3, debug=False) == 3
        assert ending.guarded(interrupt, debug=False) == 130
        assert ending.guarded(bug, debug=False) == 1
        assert "Traceback" not in capsys.readouterr().err
        assert ending.guarded(bug, debug=True) == 1
        assert "Traceback" in capsys.readouterr().err


class TestTransfer:
    def test_words(self) -> None:
        clock = Clock()
        transfer = Transfer(clock)
        assert transfer.describe() == ""
        transfer.update(0, 100 * MIB)
        assert transfer.describe() == "[                    ]   0%  0B/100M"
        clock.now = 1.0
        transfer.update(25 * MIB, 100 * MIB)
        assert transfer.describe() == "[#####               ]  25%  25M/100M  25M/s  0:03 left"
        clock.now = 4.0
        transfer.update(100 * MIB, 100 * MIB)
        assert transfer.describe() == "[####################] 100%  100M/100M  25M/s"

    def test_total_unknown(self) -> None:
        clock = Clock()
        transfer = Transfer(clock)
        transfer.update(0, None)
        clock.now = 2.0
        transfer.update(3 * MIB, None)
        assert transfer.describe() == "3M  1.5M/s"

    @given(st.lists(st.tuples(st.integers(0, 2**50), st.none() | st.integers(0, 2**50), st.floats(0, 1e6))))
    def test_never_fails(self, updates: list[tuple[int, int | None, float]]) -> None:
        clock = Clock()
        transfer = Transfer(clock)
        for done, total, seconds in updates:
            clock.now += seconds
            transfer.update(done, total)
            assert "\n" not in transfer.describe()


class TestProgress:
    def test_plain_lines(self) -> None:
        stream, clock = io.StringIO(), Clock()
        lines = Lines(stream, clock)
        lines.step("pulling debian:12")
        lines.advance(1, 100)
        lines.note("it is old")
        clock.now = 11.0
        lines.advance(50, 100)
        lines.step("unpacking")
        assert stream.getvalue().splitlines() == [
            "pulling debian:12 …", "it is old",
            "pulling debian:12: [##########          ]  50%  50B/100B  4B/s  0:11 left",
            "unpacking …",
        ]  # fmt: skip

    def test_a_line_that_moves_and_goes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        stream, clock = Terminal(), Clock()
        bar = Bar(stream, clock, lambda: 40)
        bar.step("unpacking debian:12")
        clock.now = 0.05
        bar.advance(10, 100)  # too soon to be drawn
        clock.now = 0.2
        bar.advance(20, 100)
        bar.note("it is old")
        bar.close()
        bar.close()
        drawn = stream.getvalue().split("\r\033[K")
        assert drawn[1] == "unpacking debian:12 …"
        assert drawn[2].startswith("unpacking debian:12  [####")
        assert len(drawn[2]) <= 39
        assert drawn[3] == "it is old\n"
        assert drawn[-1] == ""

    def test_it_says_nothing_odd(self) -> None:
        stream = Terminal()
        bar = Bar(stream, Clock(), lambda: 80)
        bar.step("a\033[2Jb")
        bar.note("c\rd")
        assert "\033[2J" not in stream.getvalue()
        assert "c?d\n" in stream.getvalue()

    def test_a_stderr_that_went_away_is_no_error(self) -> None:
        stream = io.StringIO()
        kinds = (Lines(stream, Clock()), Bar(stream, Clock(), lambda: 80))
        stream.close()
        for shown in kinds:
            shown.step("x")
            shown.advance(1, 2)
            shown.note("y")

    def test_modes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stderr", Terminal())
        kinds = {}
        for mode in ("auto", "plain", "none"):
            with display(mode) as shown:
                kinds[mode] = type(shown)
        assert kinds == {"auto": Bar, "plain": Lines, "none": Silent}
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        with display("auto") as shown:
            assert isinstance(shown, Lines)
