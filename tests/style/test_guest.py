"""The guest agent's own checks and tests (Go), and its build: the same bytes wherever it is made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import hatch_build
from berth import host, proc
from berth.version import VERSION
from support import ROOT

pytestmark = pytest.mark.go
GUEST = ROOT / "guest"
_DEADLINE_S = 900.0


def go(*arguments: str, arch: str | None = None, env: dict[str, str] | None = None) -> str:
    """Run the Go command on the agent; return what it said, fail with it when it fails."""
    found = hatch_build.find_go()
    assert found
    environment = hatch_build.go_environment(hatch_build.go_cache(ROOT / "build"), arch)
    done = proc.run(
        [str(found), *arguments],
        cwd=GUEST, env={**environment, **(env or {})}, timeout_s=_DEADLINE_S, success=range(-64, 256),
    )  # fmt: skip
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert done.status == 0, f"go {' '.join(arguments)}\n{said}"
    return said


def test_gofmt() -> None:
    found = hatch_build.find_go()
    assert found
    gofmt = shutil.which("gofmt", path=f"{found.parent}:{os.environ.get('PATH', '')}")
    assert gofmt, f"there is no gofmt beside {found}"
    unformatted = proc.run([gofmt, "-l", str(GUEST), str(ROOT / "tests/enemy")], timeout_s=60).stdout.decode()
    assert not unformatted, f"gofmt -w {unformatted}"


@pytest.mark.parametrize("arch", hatch_build.ARCHITECTURES)
def test_go_vet(arch: str) -> None:
    go("vet", "./...", arch=arch)


def test_go_test() -> None:
    go("test", "-count=1", "-timeout=300s", "./...")


def test_only_the_standard_library() -> None:
    assert "require" not in (GUEST / "go.mod").read_text()
    assert not (GUEST / "go.sum").exists()


def test_agent_is_static(agents: dict[str, Path]) -> None:
    for arch, path in agents.items():
        data = path.read_bytes()
        assert data.startswith(b"\x7fELF"), arch
        # Source: elf(5): PT_INTERP names the dynamic loader; a static program has none.
        assert b"/lib64/ld-linux" not in data, arch
        assert b"/lib/ld-linux" not in data, arch


def test_agent_knows_nothing_of_where_it_was_built(agents: dict[str, Path]) -> None:
    for path in agents.values():
        data = path.read_bytes()
        for trace in (str(ROOT), str(Path.home()) + "/", str(hatch_build.find_go())):
            assert len(trace) < 8 or trace.encode() not in data, f"{path} holds {trace}"


def test_build_is_reproducible(agents: dict[str, Path], scratch: Path) -> None:
    """The same sources in another folder, with an empty cache and another home, give the same bytes."""
    shutil.copytree(GUEST, scratch / "elsewhere/guest")
    again = _build(scratch / "elsewhere/guest", scratch / "target", scratch)
    for arch, path in agents.items():
        assert again[arch].read_bytes() == path.read_bytes(), arch


def _build(guest: Path, target: Path, work: Path) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BERTH_GOCACHE", raising=False)
        return hatch_build.build_agents(guest, target, version=VERSION, work=work)


def test_agent_says_its_version(agent_binary: Path) -> None:
    assert host.parse_version(proc.run([str(agent_binary), "version"]).stdout.decode()) == VERSION
