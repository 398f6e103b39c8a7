"""How the run's minutes are shared out, and how often something is measured. Pure but for the clock. Used by all.

A quiet machine needs the weights' sum of seconds; a slower one measures fewer rounds of each, down to `Rounds.least`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, slots=True)
class Rounds:
    """How often: `most` rounds as long as `seconds` last; `least` if they take no more than twice that; one anyway."""

    least: int
    most: int
    seconds: float


class Budget:
    """What is left of the run's seconds. weights: what each item takes on a quiet machine, in seconds."""

    def __init__(self, seconds: float, weights: Mapping[str, float], clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._weights = dict(weights)

    def begin(self, item: str) -> float:
        """Return the seconds that `item` may take: of what is left its share among the items that were not begun.

        An item that was skipped should be begun, too, so that the others get its share. 0: the time is over.
        """
        waiting = sum(self._weights.values())
        weight = self._weights.pop(item)
        return max(0.0, self._end - self._clock()) * weight / waiting
