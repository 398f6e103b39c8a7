"""What is shipped: the sdist holds the agent's sources, the wheel built from it the agents, ready to be executed."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from berth import proc
from berth.version import VERSION
from support import ROOT

pytestmark = pytest.mark.go
_DEADLINE_S = 600.0


def build(folder: Path, kind: str, output: Path) -> Path:
    """Build an sdist or a wheel of the sources in `folder`, with this environment's hatchling and Go."""
    cache = {"BERTH_GOCACHE": str(ROOT / "build/go")}  # only speeds it up: test_guest.py builds with an empty one
    argv = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(output)]
    proc.run(argv, cwd=folder, env=cache, timeout_s=_DEADLINE_S)
    (made,) = output.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return made


@pytest.fixture(scope="module")
def wheel(agents: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist gives, as `pip install berth-X.tar.gz` would build it."""
    del agents  # the cache is warm afterwards
    folder = tmp_path_factory.mktemp("package")
    (folder / "unpacked").mkdir()
    # By tar: a tarfile that wants a filter, one that knows none and one that warns are all within our Pythons.
    proc.run(["tar", "-xf", str(build(ROOT, "sdist", folder / "sdist")), "-C", str(folder / "unpacked")])
    (unpacked,) = (folder / "unpacked").iterdir()
    assert not (unpacked / "src/berth/_agent").exists(), "the sdist holds binaries"
    return build(unpacked, "wheel", folder / "wheel")


def test_the_wheel_is_for_every_platform(wheel: Path) -> None:
    assert wheel.name == f"berth-{VERSION}-py3-none-any.whl"


def test_the_wheel_carries_the_same_agents(wheel: Path, agents: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for arch, path in agents.items():
            info = archive.getinfo(f"berth/_agent/berth-agent-linux-{arch}")
            assert info.external_attr >> 16 & 0o777 == 0o755, "pip would not make it executable"
            assert archive.read(info) == path.read_bytes()


def test_the_wheel_holds_what_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"berth/py.typed", "berth/packages.txt", "berth/__main__.py"} <= names
    others = [name for name in names if not name.startswith(("berth/", f"berth-{VERSION}.dist-info/"))]
    assert others == [f"berth-{VERSION}.data/scripts/berth"]
    assert not [name for name in names if name.endswith((".pyc", "stamp.json", ".partial"))]


def test_pip_installs_our_launcher(wheel: Path, tmp_path: Path) -> None:
    # --ignore-installed: otherwise it first removes the berth that we run.
    options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed", "--prefix", str(tmp_path)]
    proc.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], timeout_s=_DEADLINE_S)
    launcher = tmp_path / "bin/berth"
    assert launcher.read_text().splitlines()[0] == f"#!{sys.executable}"
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    done = proc.run([str(launcher), "--version"], env={"PYTHONPATH": str(packages)})
    assert done.stdout.decode() == f"berth {VERSION}\n"


def test_berth_runs_from_the_wheel(wheel: Path) -> None:
    done = proc.run([sys.executable, "-P", "-m", "berth", "--version"], env={"PYTHONPATH": str(wheel)})
    assert done.stdout.decode() == f"berth {VERSION}\n"
