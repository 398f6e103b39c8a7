"""Where everything lies."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path

import pytest

from berth import fastpath
from berth.errors import InvalidArgumentError
from berth.layout import Layout
from berth.names import MachineName

KINDS = ("DATA", "RUNTIME", "CONFIG", "CACHE")
NAME = MachineName("dev")


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        monkeypatch.delenv(f"BERTH_{kind}_DIR", raising=False)
    for kind in ("DATA_HOME", "CONFIG_HOME", "CACHE_HOME", "RUNTIME_DIR"):
        monkeypatch.delenv(f"XDG_{kind}", raising=False)


def roots(layout: Layout) -> tuple[str, ...]:
    return tuple(str(path) for path in (layout.data, layout.runtime, layout.config, layout.cache))


def test_root_uses_the_systems_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_DATA_HOME", "/elsewhere")  # sudo -E brings a user's along
    assert roots(Layout.from_environment()) == ("/var/lib/berth", "/run/berth", "/etc/berth", "/var/cache/berth")


def test_a_user_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert roots(Layout.from_environment()) == (
        "/home/me/.local/share/berth", "/run/user/1000/berth", "/home/me/.config/berth", "/home/me/.cache/berth",
    )  # fmt: skip
    monkeypatch.setenv("XDG_DATA_HOME", "/d")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/c")
    monkeypatch.setenv("XDG_CACHE_HOME", "/k")
    assert roots(Layout.from_environment()) == ("/d/berth", "/run/user/1000/berth", "/c/berth", "/k/berth")


def test_a_user_without_a_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert str(Layout.from_environment().runtime) == "/tmp/berth-54321"


@pytest.mark.parametrize("kind", KINDS)
def test_each_root_can_be_overridden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    monkeypatch.setenv(f"BERTH_{kind}_DIR", str(tmp_path))
    assert getattr(Layout.from_environment(), kind.lower()) == tmp_path


def test_an_override_may_be_relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BERTH_DATA_DIR", "here")
    assert Layout.from_environment().data == tmp_path / "here"


def test_an_empty_override_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("BERTH_DATA_DIR", "")
    assert str(Layout.from_environment().data) == "/var/lib/berth"


def all_paths(layout: Layout) -> dict[str, Path]:
    """Call everything that gives a path."""
    paths: dict[str, Path] = {}
    for name, value in vars(Layout).items():
        if isinstance(value, property):
            paths[name] = getattr(layout, name)
        elif inspect.isfunction(value) and not name.startswith("_"):
            argument = "sha256:abc" if "digest" in inspect.signature(value).parameters else NAME
            paths[name] = value(layout, argument)
    return paths


def test_every_path_is_below_a_root_and_none_is_shared(tmp_path: Path) -> None:
    base = Path(f"/{tmp_path.name[:8]}")
    layout = Layout(base / "d", base / "r", base / "c", base / "k")
    paths = all_paths(layout)
    assert {"images", "templates", "machines", "bundle", "live", "agent_socket", "agents"} <= paths.keys()
    for name, path in paths.items():
        assert any(path.is_relative_to(root) for root in dataclasses.astuple(layout)) or name == "hub_hosts", name
    assert len(set(paths.values())) == len(paths)


def test_a_digest_becomes_a_file_name(tmp_path: Path) -> None:
    layout = Layout(tmp_path, tmp_path, tmp_path, tmp_path)
    assert layout.template("sha256:ab").name == "sha256-ab"


def test_a_socket_path_that_is_too_long_is_refused_with_a_way_out(tmp_path: Path) -> None:
    long = Layout(tmp_path, Path("/" + "x" * 90), tmp_path, tmp_path)
    with pytest.raises(InvalidArgumentError, match="longer than 103 bytes") as caught:
        long.agent_socket(NAME)
    assert "BERTH_RUNTIME_DIR" in (caught.value.hint or "")


def test_the_longest_name_fits_into_the_usual_directories() -> None:
    name = MachineName("n" * 63)
    for runtime in ("/run/berth", "/tmp/berth-4294967294"):
        layout = Layout(Path("/d"), Path(runtime), Path("/c"), Path("/k"))
        assert len(os.fsencode(layout.agent_socket(name))) <= 103


def test_the_fast_path_says_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`fastpath` spells some of these paths as strings, for `berth run`."""
    for kind in KINDS:
        monkeypatch.setenv(f"BERTH_{kind}_DIR", str(tmp_path / kind))
    layout = Layout.from_environment()
    assert fastpath.live("dev") == str(layout.live(NAME))
    assert fastpath.agent_socket("dev") == str(layout.agent_socket(NAME))
    layout.data.mkdir(parents=True)
    layout.default_machine.write_text("dev\n")
    assert fastpath.find_default_machine() == "dev"


def test_machines_kept_elsewhere_run_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two data roots may have machines of one name: their sockets and networks must not meet."""
    monkeypatch.delenv("BERTH_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("BERTH_DATA_DIR", raising=False)
    usual = Layout.from_environment().runtime
    found: set[Path] = {usual}
    for folder in ("one", "two", "one/../one"):
        monkeypatch.setenv("BERTH_DATA_DIR", str(tmp_path / folder))
        found.add(Layout.from_environment().runtime)
    assert len(found) == 3
    assert {path.parent for path in found} == {usual.parent}
