"""docs/internals.md tells the truth: it names, in backticks, every path that layout.py and bundle.py make."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from support import ROOT

INTERNALS = ROOT / "docs/internals.md"
SOURCES = [ROOT / "src/berth" / name for name in ("layout.py", "bundle.py")]


def path_names(path: Path) -> set[str]:
    """Find the names of files and folders that a module joins: the text constants on the right of a ``/``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            names.add(str(node.right.value))
    return names


def constants(path: Path) -> set[str]:
    """Find the file names that a module keeps as constants: ``CONFIG = "config.json"``."""
    found: set[str] = set()
    for node in ast.parse(path.read_bytes()).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        value = node.value if isinstance(node, ast.Assign) else None
        text = value.value if targets and isinstance(value, ast.Constant) else None
        if isinstance(text, str) and re.fullmatch(r"[\w.-]+\.(?:json|lock|sock|log)", text):
            found.add(text)
    return found


def documented() -> set[str]:
    """Find the last part of each path in backticks: ``m/NAME/agent.sock`` documents `agent.sock` and `m`."""
    spans = re.findall(r"`([^`\n]+)`", INTERNALS.read_text())
    return {part for span in spans for part in re.split(r"[/\s]", span) if part}


NAMES = sorted(
    {(source.name, name) for source in SOURCES if source.exists() for name in path_names(source) | constants(source)}
)


def test_there_are_names_to_check() -> None:
    assert ("layout.py", "agent.sock") in NAMES


@pytest.mark.parametrize(("source", "name"), NAMES)
def test_internals_lists_every_path(source: str, name: str) -> None:
    if not INTERNALS.exists():
        pytest.skip("docs/internals.md is not written yet")
    tails = set(Path(name).parts) - {"/"}
    assert tails <= documented(), f"docs/internals.md does not name `{name}`, which {source} makes"


def test_internals_names_the_environment() -> None:
    if not INTERNALS.exists():
        pytest.skip("docs/internals.md is not written yet")
    for kind in ("DATA", "RUNTIME", "CONFIG", "CACHE"):
        assert f"BERTH_{kind}_DIR" in INTERNALS.read_text()


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target and not target.startswith("mailto:"):
                assert (document.parent / target).exists(), f"{document}: a link to {target}, which does not exist"


def test_security_names_tests_that_there_are() -> None:
    named = set(re.findall(r"`((?:test_|Test|Fuzz)\w+)`", (ROOT / "docs/security.md").read_text()))
    sources = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "guest").rglob("*_test.go")]
    there = {name for path in sources for name in re.findall(r"^(?:def|func) (\w+)\(", path.read_text(), re.MULTILINE)}
    assert len(named) > 30
    assert not named - there


def test_packages_file_is_well_formed() -> None:
    rows = [
        line.split() for line in (ROOT / "src/berth/packages.txt").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    assert all(len(row) == 6 for row in rows)
    assert all(set(row[1].split(",")) <= {"run", "test", "option"} for row in rows)
    programs = [row[0] for row in rows]
    assert len(programs) == len(set(programs))
