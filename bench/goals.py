"""What good means, in numbers: the goals of container isolation, and what to say where one is missed. Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

Unit = Literal["ms", "s", "MiB", "MB/s", "%", "KiB", "of 20"]


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """at_most, at_least: in the result's unit. below: peers that berth's median must be under.

    why: what to say where it is missed, by the peer's name or "limit".
    """

    at_most: float | None = None
    at_least: float | None = None
    below: tuple[str, ...] = ()
    why: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def text(self, unit: Unit) -> str:
        parts: list[str] = []
        if self.at_most is not None:
            parts.append(f"≤ {self.at_most:g} {unit}")
        if self.at_least is not None:
            parts.append(f"≥ {self.at_least:g} {unit}")
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
    """One row of the table. person: `root` or `user`. samples: by contender, in `unit`. absent: who could not be
    measured, and why. extra: more words for the row.
    """

    key: str
    person: str
    what: str
    unit: Unit
    goal: Goal | None = None
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict[str, list[float]])
    absent: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    extra: str = ""

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
        unseen = [peer for peer in self.goal.below if peer not in self.samples]
        return f"met (without {', '.join(unseen)})" if unseen else "met"

    def ratio(self) -> str:
        """Say how berth stands to the best peer (of those that the goal names, if any): below 1 is less."""
        ours = self.median("berth")
        rivals = (self.goal.below if self.goal else ()) or [name for name in self.samples if name != "berth"]
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
    """Print a median, and behind it the quartiles where there are enough values."""
    middle = number(statistics.median(values))
    if len(values) < 4:
        return middle
    low, _, high = statistics.quantiles(values, n=4)
    return f"{middle} ({number(low)}-{number(high)})"
