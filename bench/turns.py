"""Who is measured in one place, and in which order. Used by all that measures.

Contenders take turns (one round: everybody once), so that what else the machine does hits all alike; the first round of
each is thrown away. A contender that fails is named with its reason, and the others go on.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from bench.budget import Clock, Rounds
from bench.contenders import SETUP_S, Contender, NotOffered
from bench.goals import Part, Result
from bench.watch import BenchError
from bench.worlds import Installed

STEADY = "steady"
_LEAST = 3
_numbers = itertools.count(1)

Say = Callable[[str], None]


class Named(Protocol):
    """All that taking turns has to know of who takes part."""

    @property
    def name(self) -> str: ...


Someone = TypeVar("Someone", bound=Named)


@dataclasses.dataclass(slots=True)
class Place:
    """One person's contenders, berth first. shared: a folder that all machines see at /bench, with `bulk` in it.
    bulk_bytes: how much goes through `run`.

    seconds: what the present benchmark may take. steady: who has a settled machine of that name running.
    """

    person: str
    part: Part
    contenders: list[Contender]
    installed: Installed
    shared: Path
    bulk_bytes: int
    quick: bool
    say: Say
    seconds: float = 60.0
    steady: set[str] = dataclasses.field(default_factory=set[str])

    def rounds(self, full: int, quick: int, *, share: float = 1.0) -> Rounds:
        """Say how often a benchmark takes turns that may have `share` of its time."""
        return Rounds(min(_LEAST, quick), quick if self.quick else full, self.seconds * share)

    @property
    def bulk(self) -> Path:
        return self.shared / self._bulk_name

    @property
    def bulk_inside(self) -> str:
        return f"/bench/{self._bulk_name}"

    @property
    def _bulk_name(self) -> str:
        return f"bulk-{self.bulk_bytes}"

    @property
    def berth(self) -> Contender:
        return self.contenders[0]


def fresh_name(letter: str) -> str:
    """Return a machine's name that nobody had in this run."""
    return f"{letter}{next(_numbers)}"


def set_up(place: Place, tar: Path) -> dict[str, str]:
    """Store the root file system for everybody; drop who can't, and say why."""
    dropped: dict[str, str] = {}
    for contender in list(place.contenders):
        place.say(f"{place.person}: setting up {contender.name} ({place.part})")
        try:
            contender.setup(tar)
        except BenchError as error:
            if contender is place.berth:
                raise
            dropped[contender.name] = str(error)
            place.contenders.remove(contender)
    return dropped


def ensure_steady(place: Place, result: Result) -> list[Contender]:
    """Have a settled machine running for every contender; return those that have one."""
    for contender in place.contenders:
        if contender.name not in place.steady:
            try:
                steps = (*contender.launch(STEADY), *contender.settle(STEADY))
                contender.watch.time(*steps, deadline_s=SETUP_S)
                place.steady.add(contender.name)
            except BenchError as error:
                result.absent[contender.name] = str(error)
    return [contender for contender in place.contenders if contender.name in place.steady]


def finish(place: Place) -> None:
    """Stop the machines that the benchmarks shared."""
    for contender in place.contenders:
        if contender.name in place.steady:
            contender.watch.time(*contender.remove(STEADY))
    place.steady.clear()


def take_turns(
    result: Result,
    contenders: Sequence[Someone],
    rounds: Rounds,
    measure: Callable[[Someone], float],
    *,
    warm_up: bool = True,
    clock: Clock = time.monotonic,
) -> None:
    """Fill `result` with a value from each contender in every round, after one round that does not count (`warm_up`).

    A round that would end too late, going by those before it, is not begun.
    """
    going = list(contenders)
    began = clock()
    for turn in range(0 if warm_up else 1, rounds.most + 1):
        done = turn if warm_up else turn - 1
        spent = clock() - began
        limit = rounds.seconds * (1 if turn > rounds.least else 2)
        if turn > 1 and spent + spent / done > limit:
            return
        for contender in list(going):
            try:
                value = measure(contender)
            except (BenchError, NotOffered) as error:
                result.absent[contender.name] = str(error)
                result.samples.pop(contender.name, None)
                going.remove(contender)
                continue
            if turn:
                result.samples.setdefault(contender.name, []).append(value)
