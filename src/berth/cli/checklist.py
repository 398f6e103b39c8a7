"""How `berth system check` looks: one screen for people, or all there is to say. `cli` only."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from berth.cli.ending import colour_wanted
from berth.cli.output import emit, emit_table
from berth.cli.parser import width

if TYPE_CHECKING:
    from berth.check import Check

_VM = ("qemu", "qemu-img", "mke2fs")  # no VM runs without one of these
_COLOURS = {"works": "32", "missing": "31", "less than it could be": "33"}


def show(checks: Sequence[Check]) -> None:
    """Say what runs here, what works, what is missing, and the one command that puts it right."""
    emit(summary(checks))
    good = [item for item in checks if item.status == "ok"]
    _section("works", [", ".join(f"{item.name} {item.version}" if item.version else item.name for item in good)])
    for status, heading in (("missing", "missing"), ("warning", "less than it could be")):
        bad = [item for item in checks if item.status == status and not item.optional]
        _section(heading, [f"{item.name}: {item.detail}; {item.affects}" for item in bad])
    commands, then = join_fixes(item.fix for item in checks if item.status != "ok" and item.fix and not item.optional)
    if commands:
        emit("\nto put it right, type (it is one command):")
        emit("    " + " &&\n    ".join(commands))
        for word in then:
            emit(f"{word}")
    more = [item.name for item in checks if item.status != "ok" and item.optional]
    if more:
        _section("optional", [f"{', '.join(more)}: berth system check --all"])


def summary(checks: Iterable[Check]) -> str:
    """Say in a sentence which machines run here."""
    checks = list(checks)
    if any(item.required and item.status == "missing" for item in checks):
        return "No machine runs here yet."
    status = {item.name: item.status for item in checks}
    containers = "Containers" if status.get("cgroups") == "ok" else "Containers without services"
    if any(status.get(name) == "missing" for name in _VM):
        return f"{containers} run here; VMs do not."
    how = "with hardware virtualization" if status.get("kvm") == "ok" else "emulated in software"
    return f"{containers} run here, and VMs {how}."


def join_fixes(fixes: Iterable[str]) -> tuple[list[str], list[str]]:
    """Make one command of many: its parts, with the packages in one installation; and what there is to do then."""
    commands: dict[str, list[str]] = {}
    then: dict[str, None] = {}
    for fix in fixes:
        command, _, remark = fix.partition("  # ")
        begin, install, packages = command.partition(" install ")
        commands.setdefault(f"{begin}{install}".rstrip(), []).extend(packages.split())
        if remark:
            then[remark] = None
    return [" ".join([begin, *dict.fromkeys(packages)]) for begin, packages in commands.items()], list(then)


def show_all(checks: Sequence[Check]) -> None:
    """Show a row for each thing, and below what is the matter with those that are not there."""
    rows = [(item.name, item.status, item.version or "", item.detail) for item in checks]
    emit_table(("CHECK", "STATUS", "VERSION", "FOUND"), rows, coloured="STATUS")
    for item in checks:
        if item.status != "ok":
            emit("")
            emit(f"{item.name}: {item.affects}")
            if item.fix:
                emit(f"  fix: {item.fix}")


def _section(heading: str, paragraphs: Sequence[str]) -> None:
    """Show paragraphs below a heading, each after the first line indented once more; nothing when there are none."""
    if not paragraphs:
        return
    emit("")
    emit(f"\033[{_COLOURS[heading]}m{heading}\033[m" if heading in _COLOURS and colour_wanted(sys.stdout) else heading)
    for text in paragraphs:
        emit(textwrap.fill(text, width(), initial_indent="  ", subsequent_indent="    ",
                           break_on_hyphens=False, break_long_words=False))  # fmt: skip
