"""What the scripts in script/ share: the list of packages, quoting, the search for Python. Nothing gets installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from berth import proc
from berth.check.packages import rows
from support import ROOT


def shell(script: str, *arguments: str, path: str | None = None) -> str:
    """Run a line of bash with script/common.sh sourced; return its output."""
    text = f'set -euo pipefail; . "{ROOT}/script/common.sh"; {script}'
    env = {"PATH": path} if path else None
    return proc.run(["bash", "-c", text, "bash", *arguments], env=env, timeout_s=60).stdout.decode()


@pytest.mark.parametrize("use", ["run", "test", "option"])
def test_scripts_and_checks_read_the_same_list(use: str) -> None:
    wanted = sorted({row.packages["apt"] for row in rows() if use in row.use.split(",")} - {"-"})
    assert shell('packages_for "$1"', use).split() == wanted


def test_uses_add_up() -> None:
    both = shell("packages_for run test").split()
    assert set(both) == set(shell("packages_for run").split()) | set(shell("packages_for test").split())
    assert len(both) == len(set(both))


@pytest.mark.parametrize(
    ("words", "line"),
    [(["berth", "run", "a b"], "berth run 'a b'"), (["", "*", "$HOME"], "'' '*' '$HOME'"), (["it's"], "'it'\\''s'")],
)
def test_commands_are_shown_as_one_would_type_them(words: list[str], line: str) -> None:
    assert shell('quoted "$@"', *words) == line
    assert shell(f'printf "%s\\n" {line}').splitlines() == words


def test_python_is_found() -> None:
    assert Path(shell("find_python").strip()).exists()


def test_an_old_python_is_not_taken(scratch: Path) -> None:
    for name in ("python3", "python3.12", "python3.11", "python3.13", "python3.14"):
        (scratch / name).write_text("#!/bin/sh\nexit 1\n")
        (scratch / name).chmod(0o755)
    assert shell("find_python || echo none", path=f"{scratch}:/usr/bin:/bin") == "none\n"


def test_a_newer_python_beside_an_old_one_is_taken(scratch: Path) -> None:
    for name, status in (("python3", 1), ("python3.14", 1), ("python3.13", 1), ("python3.12", 0)):
        (scratch / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (scratch / name).chmod(0o755)
    assert shell("find_python", path=f"{scratch}:/usr/bin:/bin") == f"{scratch}/python3.12\n"


def test_without_apt_nothing_is_missing(scratch: Path) -> None:
    for name in ("bash", "dirname", "awk", "sort"):
        (scratch / name).symlink_to(proc.require_program(name, package=name))
    text = f'set -euo pipefail; . "{ROOT}/script/common.sh"; missing_packages run'
    bash = str(scratch / "bash")
    done = proc.run(["env", "-i", f"PATH={scratch}", bash, "-c", text], timeout_s=60)
    assert done.stdout == b""


def test_quickstart_says_what_root_must_type() -> None:
    """Where sudo can't be had: the very commands, and a failure."""
    script = (ROOT / "script/quickstart").read_text()
    assert 'tell_root "apt-get update" "$command"' in script
    functions = script[script.index("tell_root() {") :].partition("\n}\n")[0] + "\n}"
    text = f'. "{ROOT}/script/common.sh"; {functions}\ntell_root "apt-get update" "apt-get install crun"'
    done = proc.run(["bash", "-c", text], success=(1,), timeout_s=60)
    assert b"    apt-get update\n    apt-get install crun\n" in done.stderr
