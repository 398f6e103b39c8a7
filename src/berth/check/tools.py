"""Checks of programs: there, of which version, recent enough? And of the room for what they make."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from berth.check.model import Check, Place, Probe
from berth.check.packages import install_command
from berth.errors import BerthError
from berth.host import compare_version, tool_version
from berth.proc import find_program
from berth.units import GIB, format_size

_LITTLE_SPACE = 5 * GIB


@dataclasses.dataclass(frozen=True, slots=True)
class Tool:
    """A program and what works without it. needed_by: `all`, or only `root` or `user`: the other one does without."""

    program: str
    version_argument: str
    affects: str
    minimum: tuple[int, ...] = ()
    needed_by: str = "all"
    required: bool = False
    optional: bool = False


_TOOLS = (
    Tool("crun", "--version", "without it no container machine runs", minimum=(1, 5), required=True),
    Tool("nsenter", "--version", "without it no container machine runs", required=True),
    Tool("ip", "-V", "without it machines have no network of their own"),
    Tool("nft", "--version", "without it machines reach neither the internet nor their published ports"),
    Tool("dnsmasq", "--version", "without it machines do not find each other by name"),
    Tool("pasta", "--version", "without it an ordinary user's machines reach nothing outside", needed_by="user"),
    Tool("mmdebstrap", "--version", "without it bootstrap: images can't be made; all others can be used"),
    Tool("zstd", "--version", "without it images with zstd layers can't be unpacked; all others can"),
    Tool("buildah", "--version", "without it 'berth build' does not work; everything else does"),
    Tool("skopeo", "--version", "nothing needs it: it reads and copies the image store from outside", optional=True),
)


def check_tool(tool: Tool, place: Place) -> Check:
    """Find a program, ask it for its version, compare."""
    path = find_program(tool.program)
    if path is None:
        if tool.needed_by not in ("all", "root" if place.is_root else "user"):
            return Check(
                tool.program, "ok", None, f"not installed; {_whose(place)} machines do without", "nothing", None
            )
        fix = install_command(tool.program, place)
        kind = {"required": tool.required, "optional": tool.optional}
        return Check(tool.program, "missing", None, "not installed", tool.affects, fix, **kind)
    return _judge(tool, path, place)


def _judge(tool: Tool, path: Path, place: Place) -> Check:
    try:
        version = tool_version((str(path), tool.version_argument))
    except BerthError as error:
        return Check(
            tool.program, "warning", None, f"{path} does not work: {error}", tool.affects, None, required=tool.required
        )
    if tool.minimum and version and not compare_version(version, tool.minimum):
        wanted = ".".join(str(number) for number in tool.minimum)
        fix = install_command(tool.program, place)
        return Check(
            tool.program,
            "warning",
            version,
            f"{path} is older than {wanted}",
            tool.affects,
            fix,
            required=tool.required,
        )
    return Check(tool.program, "ok", version, str(path), tool.affects, None, required=tool.required)


def _tool_probe(tool: Tool) -> Probe:
    def probe(place: Place) -> Check:
        return check_tool(tool, place)

    probe.__name__ = f"check_{tool.program}"
    return probe


def check_disk_space(place: Place) -> Check:
    """Measure what is free where images and machines are kept."""
    folder = existing_parent(place.layout.data)
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    detail = f"{format_size(free)} free at {folder}"
    affects = "an image needs 0.2 to 1 GiB, a machine what it writes"
    if free >= _LITTLE_SPACE:
        return Check("disk-space", "ok", None, detail, affects, None)
    detail += "; or set BERTH_DATA_DIR to a larger file system"
    return Check("disk-space", "warning", None, detail, affects, "berth system prune")


def existing_parent(path: Path) -> Path:
    """Find the nearest folder above (or at) `path` that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _whose(place: Place) -> str:
    return "root's" if place.is_root else "an ordinary user's"


PROBES: tuple[Probe, ...] = (*(_tool_probe(tool) for tool in _TOOLS), check_disk_space)
