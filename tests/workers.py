"""Which worker of pytest-xdist takes which tests: machines in containers and in VMs side by side. Used by conftest.py.

All tests of a row share the machines of one worker (tests/integration/conftest.py), so a row is never divided.
"""

from __future__ import annotations

import re

from xdist.scheduler import LoadScopeScheduling  # pyright: ignore[reportMissingTypeStubs]

_INTEGRATION = "tests/integration/"
_OF_VMS = re.compile(r"/test_(vm|qemu_.*|kernels)\.py::|\[(root|user)-vm\b")


def row(nodeid: str) -> str | None:
    """Say to which row a test belongs; None: it may run anywhere."""
    if not nodeid.startswith(_INTEGRATION):
        return None
    return "vm" if _OF_VMS.search(nodeid) else "host"


def turn(nodeid: str) -> int:
    """Order tests: the two long rows begin at once, the others fill up."""
    return ("vm", "host", None).index(row(nodeid))


class Rows(LoadScopeScheduling):
    """A row is a scope. (The scheduler that xdist has for groups does nothing with pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        return row(nodeid) or nodeid
