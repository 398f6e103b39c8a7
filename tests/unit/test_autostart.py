"""The systemd unit: its golden text, and what happens where no systemd answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from berth import autostart, proc
from berth.errors import BerthError
from berth.layout import Layout

USER_UNIT = """\
[Unit]
Description=berth machines that start by themselves

[Service]
Type=oneshot
RemainAfterExit=yes
Environment=BERTH_DATA_DIR=/data
ExecStart=/home/me/.venv/bin/berth system start
ExecStop=/home/me/.venv/bin/berth system stop
KillMode=process
Delegate=yes
TimeoutStartSec=5min
TimeoutStopSec=2min

[Install]
WantedBy=default.target
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ordinary user with a configuration directory; the folder where the unit goes."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for variable in autostart._OVERRIDES:
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "systemd/user"


def no_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autostart, "_why_no_systemd", lambda: ("no systemd here",))


def test_golden_text() -> None:
    text = autostart.unit_text(("/home/me/.venv/bin/berth",), {"BERTH_DATA_DIR": "/data"}, for_root=False)
    assert text == USER_UNIT


def test_roots_unit_comes_after_firewalls_and_with_the_host() -> None:
    text = autostart.unit_text(("/usr/bin/berth",), {}, for_root=True)
    assert "After=network.target nftables.service firewalld.service\n" in text
    assert "WantedBy=multi-user.target\n" in text
    assert "Environment" not in text


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("/usr/bin/berth", "/usr/bin/berth"),
        ("/a b/berth", '"/a b/berth"'),
        ("100%", '"100%%"'),
        ("$HOME", '"$$HOME"'),
        ('a"b\\', '"a\\"b\\\\"'),
        ("", '""'),
        ("it's;", '"it\'s;"'),
    ],
)
def test_words_are_quoted_for_systemd(word: str, quoted: str) -> None:
    assert autostart._quote(word) == quoted


def test_a_newline_can_not_get_into_a_unit() -> None:
    with pytest.raises(BerthError, match="can't hold"):
        autostart.unit_text(("/usr/bin/berth",), {"BERTH_DATA_DIR": "/x\nExecStart=/bin/evil"}, for_root=False)


@pytest.mark.parametrize("for_root", [True, False])
@pytest.mark.parametrize("folder", ["plain", "we ird; % $x"])
def test_systemd_understands_it(scratch: Path, for_root: bool, folder: str) -> None:
    if proc.find_program("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = scratch / folder / "berth"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = scratch / "berth.service"
    unit.write_text(autostart.unit_text((str(program),), {"BERTH_DATA_DIR": str(scratch / folder)}, for_root=for_root))
    argv = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = proc.run(argv, env={"SYSTEMD_LOG_LEVEL": "warning"}, success=range(256))
    said = done.stderr.decode()
    # It also says what it thinks of this host's own units.
    assert "berth.service" not in said, said
    if "Failed to" in said:
        pytest.skip(f"systemd-analyze does not work here: {said}")


def test_a_program_that_systemd_can_not_start_is_refused() -> None:
    with pytest.raises(BerthError, match="quotes or backslashes"):
        autostart.unit_text(('/a"b/berth',), {}, for_root=False)


def test_enable_without_systemd_writes_the_unit_and_says_what_to_do(
    user: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_systemd(monkeypatch)
    for _again in range(2):
        state = autostart.enable(layout)
        assert state == autostart.Autostart(user / "berth.service", "disabled", ("no systemd here",))
    text = (user / "berth.service").read_text()
    assert f"Environment=BERTH_DATA_DIR={layout.data}\n" in text
    assert (user / "berth.service").stat().st_mode & 0o777 == 0o644


def test_the_unit_carries_only_what_was_overridden(user: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    del user
    assert autostart.overrides(layout)["BERTH_RUNTIME_DIR"] == str(layout.runtime)
    for variable in autostart._OVERRIDES:
        monkeypatch.delenv(variable, raising=False)
    assert autostart.overrides(layout) == {}


def test_with_systemd_it_is_told(user: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(autostart, "_why_no_systemd", lambda: None)
    monkeypatch.setattr(autostart, "_systemctl", lambda *arguments: told.append(arguments))
    monkeypatch.setenv("USER", "no-such-user")
    state = autostart.enable(layout)
    assert state.state == "enabled"
    assert told == [("daemon-reload",), ("enable", "berth.service")]
    assert "loginctl enable-linger no-such-user" in state.notes[0]
    told.clear()
    assert autostart.disable(layout).state == "absent"
    assert told == [("disable", "berth.service"), ("daemon-reload",)]
    assert not (user / "berth.service").exists()


def test_disable_is_idempotent_and_takes_the_link_away(
    user: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_systemd(monkeypatch)
    assert autostart.disable(layout).state == "absent"
    autostart.enable(layout)
    link = user / "default.target.wants/berth.service"
    link.parent.mkdir()
    link.symlink_to("../berth.service")
    assert autostart.status().state == "enabled"
    assert autostart.disable(layout).state == "absent"
    assert not link.is_symlink()
    assert autostart.status().state == "absent"


def test_status_of_a_unit_that_is_not_enabled(user: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    del user
    no_systemd(monkeypatch)
    autostart.enable(layout)
    assert autostart.status() == autostart.Autostart(autostart.unit_path(), "disabled", ("no systemd here",))


def test_the_command_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert os.path.isabs(autostart.berth_command()[0])
    (tmp_path / "berth").touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert autostart.berth_command() == (str(tmp_path / "berth"),)


def test_where_the_unit_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(autostart.unit_path()) == "/etc/systemd/system/berth.service"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(autostart.unit_path()) == "/home/me/.config/systemd/user/berth.service"
