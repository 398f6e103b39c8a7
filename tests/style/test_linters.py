"""Linters and type checkers, as tests: what is missing is skipped at home and a failure in CI (BERTH_REQUIRE)."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path

import pytest

from berth import proc
from berth.errors import CommandError
from support import ROOT, need

_DEADLINE_S = 600.0
# What only ever runs on Linux, and so need not be right for a Mac: below src/berth.
LINUX_ONLY = (
    "engine/crun/", "engine/qemu/", "engine/running.py", "net/", "check/", "userns.py",
    "inside.py", "syscalls.py", "rooted.py", "oci/layer.py", "oci/bootstrap.py", "oci/unpack.py", "oci/diff.py",
    "buildroom.py", "adapt/",
)  # fmt: skip
SCRIPTS = sorted(path for folder in ("script", ".ci") for path in (ROOT / folder).glob("*"))
# Names of places where packages are fetched from, in two halves so that this file does not name them either: what
# berth needs is found through the machine's own configuration.
REGISTRIES = [
    re.compile(r"\b" + head + r"\." + tail + r"\b")
    for head, tail in (
        ("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "(?:org|com)"), ("crates", "io"), ("golang", "org"),
        ("rubygems", "org"), ("goproxy", "(?:io|cn)"), ("yarnpkg", "com"),
    )
]  # fmt: skip


def tool(name: str) -> str:
    """Find a tool of this environment, else one on PATH; skip where there is none."""
    beside = Path(sysconfig.get_path("scripts")) / name
    if beside.exists():
        return str(beside)
    found = proc.find_program(name)
    if found is None:
        if os.environ.get("BERTH_REQUIRE"):
            pytest.fail(f"{name} is not installed: pip install -e '.[test]'", pytrace=False)
        pytest.skip(f"{name} is not installed: pip install -e '.[test]'")
    return str(found)


def check(argv: list[str], env: dict[str, str] | None = None) -> None:
    """Run a tool on the sources; fail with all that it says."""
    done = proc.run(argv, cwd=ROOT, env=env, timeout_s=_DEADLINE_S, success=range(-64, 256))
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert done.status == 0, f"{' '.join(argv)}\n{said}"


def test_ruff_check() -> None:
    check([tool("ruff"), "check", "--no-cache", "."])


def test_ruff_format() -> None:
    check([tool("ruff"), "format", "--no-cache", "--check", "."])


def test_pyright() -> None:
    check([tool("pyright"), "--pythonpath", sys.executable])


def test_mypy_for_linux() -> None:
    check([tool("mypy"), "--platform", "linux", "src", "tests", "hatch_build.py"])


def test_mypy_for_macos() -> None:
    """The rest is to run on a Mac one day; what it imports from the Linux side is only followed for its types."""
    package = ROOT / "src/berth"
    names = [str(path.relative_to(package)) for path in sorted(package.rglob("*.py"))]
    portable = [f"src/berth/{name}" for name in names if not name.startswith(LINUX_ONLY)]
    check([tool("mypy"), "--platform", "darwin", "--follow-imports", "silent", *portable])


@pytest.mark.shellcheck
def test_shellcheck() -> None:
    need("shellcheck")
    check(["shellcheck", "--external-sources", *(str(path) for path in SCRIPTS)])


@pytest.mark.parametrize("path", [path for path in SCRIPTS if not path.suffix], ids=lambda path: path.name)
def test_scripts_are_strict_and_executable(path: Path) -> None:
    assert os.access(path, os.X_OK)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


def tracked_files() -> list[Path]:
    """List the files of the repository, as git does; without git (an sdist) all that are text by their ending."""
    try:
        names = (
            proc.run(["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"], cwd=ROOT).stdout.decode().split("\0")
        )
    except CommandError:
        endings = {".py", ".md", ".toml", ".go", ".sh", ".txt"}
        return [path for path in ROOT.rglob("*") if path.suffix in endings and ".venv" not in path.parts]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.git
def test_no_registry_is_named() -> None:
    found: list[str] = []
    for path in tracked_files():
        text = path.read_bytes().decode(errors="replace")
        found += [f"{path}: {match[0]}" for pattern in REGISTRIES for match in pattern.finditer(text)]
    assert not found


def test_files_are_not_too_long() -> None:
    long = [path for path in (ROOT / "src").rglob("*.py") if len(path.read_bytes().splitlines()) > 650]
    assert not long, "split these by what they own"


def test_modules_say_what_they_own() -> None:
    for path in (ROOT / "src/berth").rglob("*.py"):
        text = path.read_text()
        assert not text.strip() or text.startswith('"""'), f"{path} has no docstring"


def test_python_is_new_enough() -> None:
    assert sys.version_info >= (3, 11)
