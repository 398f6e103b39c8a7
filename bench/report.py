"""The results as tables for a terminal, as JSON, and as the generated part of docs/performance.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.facts import Facts
from bench.goals import YARDSTICK, Goal, Part, Result, spread

PEERS: Mapping[Part, tuple[str, ...]] = {
    "container": ("podman", "lxc", "systemd-nspawn"), "vm": (YARDSTICK,), "image": ("skopeo", "podman"),
}  # fmt: skip
BEGIN = "<!-- bench: begin (bench/run --docs writes what follows) -->"
END = "<!-- bench: end -->"
_SCHEMA = 2
_LEGEND = (
    "Each cell: the median, ± the median distance from it, in brackets the least and the most, × how many were taken. "
    "The last column but one is berth's median by the best peer's of those the goal names, else of all."
)
_TITLES: Mapping[tuple[Part, str], str] = {
    ("container", "root"): "Containers, as root", ("container", "user"): "Containers, as an ordinary user",
    ("vm", "root"): "VMs, as root", ("vm", "user"): "VMs, as an ordinary user",
    ("image", "root"): "Images, as root", ("image", "user"): "Images, as an ordinary user",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """A whole run. notes: who was left out, and why; what was not as it should be."""

    facts: Facts
    results: list[Result]
    notes: list[str]

    def to_json(self) -> str:
        return json.dumps({"schema": _SCHEMA, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        document: dict[str, Any] = json.loads(text)
        if document.get("schema") != _SCHEMA:
            raise ValueError(f"not a report of this version of bench/run (schema {document.get('schema')})")
        results = [_result(one) for one in document["results"]]
        return cls(Facts(**document["facts"]), results, list(document["notes"]))


def _result(document: Mapping[str, Any]) -> Result:
    result = Result(**document)
    goal: dict[str, Any] | None = document["goal"]
    result.goal = None if goal is None else _goal(goal)
    return result


def _goal(document: Mapping[str, Any]) -> Goal:
    members: dict[str, Any] = {**document, "below": tuple(document["below"])}
    return Goal(**members)


def head(part: Part) -> list[str]:
    """Return the first row of a part's tables."""
    return ["what", "goal", "berth", *PEERS[part], "unit", "berth ÷ best peer", ""]


def cells(result: Result) -> list[str]:
    """Return the row of one result: the columns of `head`."""
    goal = result.goal.text(result.unit) if result.goal else ""
    values = [_cell(result, name) for name in ("berth", *PEERS[result.part])]
    return [result.what, goal, *values, result.unit, result.ratio(), result.verdict()]


def _cell(result: Result, name: str) -> str:
    return spread(result.samples[name]) if name in result.samples else "-"


def _tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    """Return the title and the rows of each table that has any; the first row is its head."""
    found: list[tuple[str, list[list[str]]]] = []
    for (part, person), title in _TITLES.items():
        rows = [cells(one) for one in report.results if (one.part, one.person) == (part, person)]
        if rows:
            found.append((title, [head(part), *rows]))
    return found


def terminal_table(report: Report) -> str:
    """Lay the tables out in columns."""
    lines: list[str] = []
    for title, rows in _tables(report):
        widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
        lines += ["", title]
        lines += [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    return "\n".join([*lines, "", *_footnotes(report, bullet="  ")]) + "\n"


def markdown(report: Report) -> str:
    """Write the generated part of docs/performance.md, markers included."""
    lines = [BEGIN, "", *_circumstances(report.facts), "", _LEGEND]
    for title, (first, *rows) in _tables(report):
        lines += ["", f"### {title}", "", "| " + " | ".join(first) + " |", "|---" * len(first) + "|"]
        lines += ["| " + " | ".join(_emphasise(row)) + " |" for row in rows]
    lines += ["", "### Goals that were missed", "", *_missed(report)]
    lines += ["", "### Notes", "", *_footnotes(report, bullet="- "), "", END]
    return "\n".join(lines)


def _emphasise(row: Sequence[str]) -> list[str]:
    return [*row[:-1], f"**{row[-1]}**" if row[-1] == "missed" else row[-1]]


def _circumstances(facts: Facts) -> list[str]:
    tools = ", ".join(f"{name} {version}" for name, version in facts.tools.items())
    pythons = ", ".join(f"{person}: Python {version}" for person, version in facts.pythons.items())
    made = (
        f"Made by `{facts.command}` on {facts.date}: {facts.cores} cores ({facts.processor}), "
        f"{facts.memory_gib:g} GiB, Linux {facts.kernel}, {facts.system}; {tools}; berth {facts.berth} ({pythons}); "
        f"load average before the start {facts.load:g}."
    )
    lines = [made]
    if facts.load > 0.7:
        lines.append("**Other programs were running**: take the proportions, not the numbers.")
    return lines


def _missed(report: Report) -> list[str]:
    """Say of each goal that was missed by how much, and why; alike whys of root and user are one item."""
    reasons: dict[str, list[str]] = {}
    for result in report.results:
        for miss in result.misses():
            against = "the goal" if miss.against == "limit" else miss.against
            where = f"{result.what} ({_where(result)}) against {against}: {miss.by}"
            reasons.setdefault(miss.why or "no reason is known yet", []).append(where)
    if not reasons:
        return ["Every goal was met."]
    lines: list[str] = []
    for why, places in reasons.items():
        lines.append(f"- {'; '.join(places)}. Why: {why}.")
    return lines


def _footnotes(report: Report, *, bullet: str) -> list[str]:
    lines = [
        f"{result.what} ({_where(result)}): {result.extra.rstrip('; ')}" for result in report.results if result.extra
    ]
    absent: dict[tuple[str, str, str], list[str]] = {}
    for result in report.results:
        for name, why in result.absent.items():
            absent.setdefault((result.person, name, why), []).append(result.key)
    for (person, name, why), keys in absent.items():
        lines.append(f"{name} ({person}) has no number for {', '.join(dict.fromkeys(keys))}: {_short(why)}")
    return [bullet + line for line in [*lines, *(_short(note) for note in report.notes)]]


def _where(result: Result) -> str:
    return f"{result.part}, {result.person}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:150]} … {line[-140:]}"


def write_docs(path: Path, report: Report) -> None:
    """Replace the generated part of `path`. Raises ValueError when the markers are not there."""
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no place for the table: {BEGIN} … {END}")
    path.write_text(before + markdown(report) + after)
