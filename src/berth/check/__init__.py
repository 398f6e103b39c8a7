"""Says what berth needs or can use on this host, what is there, and how to get what is not. Layer 3; only cli calls it.

Each check tries the real thing where it can, in milliseconds, under a deadline, and leaves nothing behind. A check
that fails in a way nobody foresaw is a warning of its own: the list is always whole.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

from berth.check import cgroups, kernel, tools, users, vm
from berth.check.model import Check, Place, Probe, Status
from berth.errors import BerthError
from berth.layout import Layout

__all__ = ["Check", "Place", "Status", "run_checks"]

_PROBES: tuple[Probe, ...] = (*kernel.PROBES, *users.PROBES, *cgroups.PROBES, *tools.PROBES, *vm.PROBES)
_AT_ONCE = 4  # most of the time goes by waiting for programs that print their version


def run_checks(layout: Layout | None = None) -> list[Check]:
    """Check everything, in the order in which people should read it. Never raises."""
    place = Place.here(layout or Layout.from_environment())
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(functools.partial(_run, place), _PROBES))


def _run(place: Place, probe: Probe) -> Check:
    try:
        return probe(place)
    except (BerthError, OSError, ValueError) as error:
        name = probe.__name__.removeprefix("check_").replace("_", "-")
        return Check(name, "warning", None, f"could not be checked: {error}", affects="unknown", fix=None)
