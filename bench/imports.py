"""Reads what ``python -X importtime`` writes. Pure; used by measures and by the tests."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

# Source: docs.python.org, "Command line and environment", -X importtime: self, cumulative (microseconds), name.
_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| *(\S+)\s*$")


@dataclasses.dataclass(frozen=True, slots=True)
class Import:
    """One imported module. self_us: its own microseconds, without what it imports in turn."""

    name: str
    self_us: int
    cumulative_us: int


def parse_importtime(text: str) -> list[Import]:
    """Read the lines of -X importtime, in the order of the imports' ends; other lines are skipped."""
    found = (_LINE.match(line) for line in text.splitlines())
    return [Import(match[3], int(match[1]), int(match[2])) for match in found if match]


def own_imports(rows: Collection[Import], known: Collection[str]) -> list[Import]:
    """Leave out the modules that the bare interpreter imports, too."""
    return [row for row in rows if row.name not in known]
