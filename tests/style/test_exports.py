"""What `import berth` promises: every name in __all__ is there, and nothing else is public."""

from __future__ import annotations

import importlib
import types

import berth
from berth import errors

# A name may be added; taking one away, or giving it another meaning, breaks somebody's program.
PROMISED = {"BerthError", "Image", "Machine"}


def exported() -> list[str]:
    names = getattr(berth, "__all__", None)
    return list(names) if names is not None else []


def test_all_names_exist() -> None:
    for name in exported():
        assert hasattr(berth, name), f"berth.__all__ names {name}, which is not there"


def test_all_is_sorted_and_whole() -> None:
    names = exported()
    if not names:  # the API is not written yet
        return
    assert names == sorted(names)
    assert set(names) >= PROMISED


def test_nothing_else_is_public() -> None:
    names = exported()
    if not names:
        return
    modules = {name for name, value in vars(berth).items() if isinstance(value, types.ModuleType)}
    public = {name for name in vars(berth) if not name.startswith("_")} - modules - {"annotations", "TYPE_CHECKING"}
    assert public <= set(names)


def test_every_error_is_exported() -> None:
    names = exported()
    if not names:
        return
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert tree <= set(names)


def test_import_is_cheap() -> None:
    """`import berth` must not load what only some commands need."""
    importlib.import_module("berth")
    assert "asyncio" not in vars(berth)
