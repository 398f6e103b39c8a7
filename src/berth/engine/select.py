"""Which engine realises which isolation: the only module that knows them all. Layer 3; called by `lifecycle`."""

from __future__ import annotations

from berth.config import Isolation
from berth.engine.base import Engine
from berth.engine.crun.engine import ContainerEngine
from berth.errors import InvalidArgumentError, UnsupportedError
from berth.layout import Layout


def choose_isolation(asked: str) -> Isolation:
    """Turn what the user asked for (`auto`, `vm`, `container`) into an isolation.

    Raises UnsupportedError for what this host, or this berth, can't do.
    """
    match asked:
        case "auto" | "container":
            return "container"
        case "vm":
            raise UnsupportedError(
                "isolation 'vm' is not built yet in this version of berth", hint="use --isolation container"
            )
        case _:
            raise InvalidArgumentError(f"invalid isolation '{asked}'", hint="choose auto, container or vm")


def engine_for(isolation: Isolation, layout: Layout) -> Engine:
    """Return the engine of a machine. Raises UnsupportedError for a machine made by a berth that can more."""
    if isolation == "container":
        return ContainerEngine(layout)
    raise UnsupportedError(f"this version of berth can't run machines with isolation '{isolation}'")
