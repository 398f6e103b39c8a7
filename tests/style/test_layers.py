"""Imports go downwards only; one module each may start programs or print. Read from the sources by `ast`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

SOURCES = ROOT / "src"
# From the bottom. A module may import its own layer and those below; `berth.oci` stands for all in the package, and a
# longer name goes before a shorter one.
LAYERS: dict[str, int] = {
    **dict.fromkeys(("errors", "units", "names", "version", "fastpath"), 0),
    **dict.fromkeys(
        (
            "host", "files", "locks", "proc", "layout", "log", "progress", "agentbinary", "userns", "syscalls",
            "inside", "idmapped", "rooted", "outputs", "signals", "trees",
        ),
        1,
    ),
    **dict.fromkeys(("config", "wire", "oci", "bundle", "machineinfo", "credentials", "dockerfile"), 2),
    **dict.fromkeys(
        ("agent", "session", "terminal", "kernels", "engine", "net", "check", "autostart", "consolelog"), 3
    ),
    **dict.fromkeys(("images", "adapt", "lifecycle", "api", "build", "buildroom", "commit"), 5),
    **dict.fromkeys(("cli", "", "__main__"), 6),
}  # fmt: skip


def modules() -> list[tuple[str, Path]]:
    """List every module of the package by its name below `berth`: `oci.store`; the package itself is the empty name."""
    found: list[tuple[str, Path]] = []
    for path in sorted((SOURCES / "berth").rglob("*.py")):
        parts = path.relative_to(SOURCES / "berth").with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def layer(name: str) -> int:
    """Say on which layer a module is."""
    while name not in LAYERS:
        assert name, "the empty name is in the table"
        shorter = name.rpartition(".")[0]
        assert shorter, f"berth.{name} is in no layer: give it one in tests/style/test_layers.py"
        name = shorter
    return LAYERS[name]


def imports(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of everything that a module imports, at its top or later."""
    known = {name for name, _path in modules()}
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full ({name})"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix("berth.")
                is_module = module.split(".")[0] == "berth" and inner in known
                yield node.lineno, f"{module}.{alias.name}" if is_module else module


def berth_imports(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Yield what a module imports from berth, by its name below `berth`."""
    for line, imported in imports(path, name):
        if imported == "berth" or imported.startswith("berth."):
            yield line, imported.removeprefix("berth").removeprefix(".")


MODULES = [pytest.param(name, path, id=name or "berth") for name, path in modules()]


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_imports_go_downwards(name: str, path: Path) -> None:
    for line, imported in berth_imports(path, name):
        assert layer(imported) <= layer(name), f"{path}:{line}: berth.{name} must not import berth.{imported}"


def test_no_import_cycles() -> None:
    """Also within a layer, in functions and for types: what needs each other is one module in several files."""
    graph = {name: {imported for _line, imported in berth_imports(path, name)} - {name} for name, path in modules()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle of imports: {' → '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for imported in sorted(graph.get(name, ())):
                visit(imported, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_internals_has_the_same_layers() -> None:
    """The table in docs/internals.md, by its rows: number, modules, what they are about."""
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", (ROOT / "docs/internals.md").read_text(), re.MULTILINE)
    told = {name: int(number) for number, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert told == {name: number for name, number in LAYERS.items() if name not in ("", "__main__")}


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_engines_do_not_know_each_other(name: str, path: Path) -> None:
    parts = name.split(".")
    if parts[0] != "engine" or len(parts) < 3:
        return
    for line, imported in berth_imports(path, name):
        other = imported.split(".")
        is_other_engine = other[0] == "engine" and (SOURCES / "berth/engine" / ".".join(other[1:2])).is_dir()
        assert not is_other_engine or len(other) == 1 or other[1] == parts[1], f"{path}:{line}: engine imports engine"


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_engines_are_hidden_behind_their_protocol(name: str, path: Path) -> None:
    """Above them nobody knows an engine; `check` looks at what one needs, and `select` chooses."""
    if name.split(".")[0] in ("engine", "check"):
        return
    for line, imported in berth_imports(path, name):
        is_inner = imported.startswith("engine.") and imported.count(".") > 1
        assert not is_inner, f"{path}:{line}: ask `Engine`, not berth.{imported}"


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_only_proc_imports_subprocess(name: str, path: Path) -> None:
    if name != "proc":
        for line, imported in imports(path, name):
            assert imported.split(".")[0] not in ("subprocess", "popen2"), f"{path}:{line}: use berth.proc"


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_only_cli_speaks(name: str, path: Path) -> None:
    if name.split(".")[0] in ("cli", "__main__"):
        return
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input", "exit"), f"{path}:{node.lineno}: only cli prints"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            spoken = node.attr in ("argv", "exit") and name not in _MAY_EXIT
            assert not spoken, f"{path}:{node.lineno}: only cli reads argv and exits"


# Programs of their own, which berth starts: their argv and exit are their interface.
_MAY_EXIT = {"inside"}


def test_everything_is_in_a_layer() -> None:
    for name, _path in modules():
        assert layer(name) in range(7)


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_every_module_says_what_it_is_for(name: str, path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_bytes())), f"{path}: berth.{name} has no docstring"
