"""What good means, in numbers: goals, rows of results, and what to say where a goal is missed. Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

Unit = Literal["ms", "s", "MiB", "MB/s", "%", "KiB", "of 20"]
Part = Literal["container", "vm", "image"]
# What runs no machine but is a measure for one, as in "1.5 times the bare kernel's boot".
YARDSTICK = "bare kernel"


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """at_most, at_least: in the result's unit. below: peers that berth's median must be under. times: peers, and how
    often their median berth's may be.

    why: what to say where it is missed, by the peer's name or "limit".
    """

    at_most: float | None = None
    at_least: float | None = None
    below: tuple[str, ...] = ()
    times: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    why: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def text(self, unit: Unit) -> str:
        parts: list[str] = []
        if self.at_most is not None:
            parts.append(f"≤ {self.at_most:g} {unit}")
        if self.at_least is not None:
            parts.append(f"≥ {self.at_least:g} {unit}")
        parts += [f"≤ {times:g} × {peer}" for peer, times in self.times.items()]
        if self.below:
            parts.append("below " + ", ".join(self.below))
        return "; ".join(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class Miss:
    """One part of a goal that was not reached: against what, by how much, and why."""

    against: str
    by: str
    why: str


@dataclasses.dataclass(slots=True)
class Result:
    """One row of a table. person: `root` or `user`. samples: by contender, in `unit`. absent: who could not be
    measured, and why. extra: more words for the row. part: the table that it belongs to.
    """

    key: str
    person: str
    what: str
    unit: Unit
    goal: Goal | None = None
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict[str, list[float]])
    absent: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    extra: str = ""
    part: Part = "container"

    def median(self, contender: str) -> float | None:
        values = self.samples.get(contender)
        return statistics.median(values) if values else None

    def misses(self) -> list[Miss]:
        """Compare berth's median with the goal; empty when it is met."""
        if self.goal is None:
            return []
        ours = self.median("berth")
        if ours is None:
            return [Miss("limit", "it could not be measured", self.absent.get("berth", ""))]
        found: list[Miss] = []
        if self.goal.at_most is not None and ours > self.goal.at_most:
            found.append(self._miss("limit", ours, self.goal.at_most))
        if self.goal.at_least is not None and ours < self.goal.at_least:
            found.append(self._miss("limit", ours, self.goal.at_least))
        for peer in self.goal.below:
            theirs = self.median(peer)
            if theirs is not None and ours >= theirs:
                found.append(self._miss(peer, ours, theirs))
        for peer, times in self.goal.times.items():
            theirs = self.median(peer)
            if theirs is not None and ours > theirs * times:
                found.append(self._miss(peer, ours, theirs * times))
        return found

    def _miss(self, against: str, ours: float, wanted: float) -> Miss:
        assert self.goal is not None
        times = f" ({ours / wanted:.1f} ×)" if wanted else ""
        by = f"{number(ours)} {self.unit} where {number(wanted)} was wanted{times}"
        return Miss(against, by, self.goal.why.get(against, ""))

    def verdict(self) -> str:
        if self.goal is None:
            return ""
        if self.misses():
            return "missed"
        unseen = [peer for peer in self._rivals() if peer not in self.samples]
        return f"met (without {', '.join(unseen)})" if unseen else "met"

    def _rivals(self) -> tuple[str, ...]:
        return (*self.goal.below, *self.goal.times) if self.goal else ()

    def ratio(self) -> str:
        """Say how berth stands to the best peer (of those that the goal names, if any): below 1 is less."""
        ours = self.median("berth")
        rivals = self._rivals() or [name for name in self.samples if name != "berth"]
        theirs = [value for name in rivals if (value := self.median(name))]
        if ours is None or not theirs or self.unit == "of 20":
            return ""
        best = max(theirs) if self.unit == "MB/s" else min(theirs)
        return f"{ours / best:.2f}"


def number(value: float) -> str:
    """Print a number with three digits, none of them idle."""
    if value >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: Sequence[float]) -> str:
    """Print a median, the median distance from it, the range, and of how many values: ``20.1 ±0.4 (19-31) ×40``."""
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{number(middle)} ×1"
    far = statistics.median(abs(value - middle) for value in values)
    return f"{number(middle)} ±{number(far)} ({number(min(values))}-{number(max(values))}) ×{len(values)}"
