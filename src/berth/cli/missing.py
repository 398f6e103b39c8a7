"""What to type when a machine lacks a program: the hint of exit status 127. `cli.run` calls it."""

from __future__ import annotations

from berth.adapt.facts import recall
from berth.bundle import Bundle, find_default
from berth.errors import BerthError
from berth.layout import Layout
from berth.names import parse_machine_name

# Package manager -> the words that install a package, in a machine whose lists may be old, or none yet.
_INSTALL = {
    "apt-get": "'apt-get update && apt-get install …'", "dnf": "dnf install …", "microdnf": "microdnf install …",
    "yum": "yum install …", "zypper": "zypper install …", "pacman": "pacman -Sy …", "apk": "apk add …",
    "xbps-install": "xbps-install -S …",
}  # fmt: skip


def install_hint(name: str, layout: Layout | None = None) -> str | None:
    """Say how the machine gets a program, by its image's package manager; None where that is not known at once."""
    layout = layout or Layout.from_environment()
    try:
        machine = parse_machine_name(name)
        facts = recall(layout, Bundle(layout, machine).load().image_digest)
    except (BerthError, OSError):
        return None
    words = next((_INSTALL[manager] for manager in facts.managers if manager in _INSTALL), None) if facts else None
    which = "" if machine == find_default(layout) else f"-n {machine} "
    return words and f"install it in the machine: berth run {which}--root {words}"
