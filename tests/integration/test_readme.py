"""What README and guide print works as it is printed."""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path

import pytest

from person import Person
from support import ROOT

pytestmark = pytest.mark.container("the Python API is the same code, whatever the isolation")


@pytest.fixture
def stored(person: Person, debian: str, debian_tar: Path) -> Generator[None]:
    """The image debian:12 in the store, as after a first create."""
    del debian
    person.berth("image", "import", str(debian_tar), "debian:12")
    yield
    for name in person.berth("ls", "-q").split():
        if name == "dev":
            person.berth("rm", "--force", name)
    person.berth("image", "rm", "debian:12")


@pytest.mark.parametrize("document", ["README.md", "docs/guide.md"])
def test_the_python_example(person: Person, stored: None, document: str) -> None:
    del stored
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    said = person.script(example)
    assert said == ("0 dev\n\n" if document == "README.md" else "")
    assert "dev" not in person.berth("ls", "-q").split()
