"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from registries import FakeRegistry


@pytest.fixture
def registry() -> Generator[FakeRegistry]:
    """A registry on loopback that does as the test says."""
    with FakeRegistry().serving() as found:
        yield found
