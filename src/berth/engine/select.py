"""Which engine realises which isolation: the only module that knows them all. Layer 3; called by `lifecycle`."""

from __future__ import annotations

from berth import host
from berth.config import Isolation
from berth.engine.base import Engine
from berth.engine.crun.engine import ContainerEngine
from berth.errors import InvalidArgumentError, UnsupportedError
from berth.layout import Layout


def choose_isolation(asked: str, platform: str, layout: Layout) -> tuple[Isolation, str | None]:
    """Turn what the user asked for (`auto`, `vm`, `container`) into an isolation, and a note that says why.

    platform: of the image (``linux/arm64``). Raises UnsupportedError for what this host can't do.
    """
    foreign = platform.split("/")[1] != host.architecture()
    match asked:
        case "container":
            if foreign:
                raise UnsupportedError(
                    f"a container shares this host's kernel, which does not run programs for {platform}",
                    hint="use --isolation vm",
                )
            return "container", None
        case "vm":
            return "vm", None
        case "auto":
            return ("vm", f"a VM, because the image is for {platform}") if foreign else _choose(layout)
        case _:
            raise InvalidArgumentError(f"invalid isolation '{asked}'", hint="choose auto, container or vm")


def _choose(layout: Layout) -> tuple[Isolation, str | None]:
    """Choose a VM where the hardware carries it and everything for it is installed."""
    from berth.engine.qemu.available import why_no_vm

    missing = why_no_vm(layout)
    return ("container", f"a container, because {missing}") if missing else ("vm", None)


def engine_for(isolation: Isolation, layout: Layout) -> Engine:
    """Return the engine of a machine."""
    if isolation == "container":
        return ContainerEngine(layout)
    from berth.engine.qemu.engine import VmEngine  # what a boot of a container need not wait for

    return VmEngine(layout)


def all_engines(layout: Layout) -> tuple[Engine, ...]:
    """Return every engine: for what is to be done though nobody knows any more whose it is."""
    return engine_for("container", layout), engine_for("vm", layout)
