"""Several transfers at once, in threads that end with their caller. `pull` and `push` use it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

_TICK_S = 0.1
_JOIN_S = 5.0

T = TypeVar("T")


class Tally:
    """Bytes that threads have moved, for the one who shows it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.done = 0

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count


def in_parallel(
    work: Callable[[T], None], items: Sequence[T], *, threads: int, tick: Callable[[], None], stop: Callable[[], None]
) -> None:
    """Do `work` for every item, some at once. The first error, or an interruption, ends the others and is raised.

    tick: called by the calling thread, now and then and at the end. stop: makes work that waits end with an error.
    """
    waiting: queue.SimpleQueue[T] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)

    def labour() -> None:
        while True:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                work(item)
            except BaseException as error:  # raised again by the calling thread
                outcomes.put(error)
                return
            outcomes.put(None)

    # Daemons: whoever is interrupted twice must not wait for them.
    crew = [threading.Thread(target=labour, daemon=True) for _ in range(min(threads, len(items)))]
    try:
        for thread in crew:
            thread.start()
        _collect(outcomes, len(items), tick)
    except BaseException:
        while not waiting.empty():
            waiting.get()
        stop()
        raise
    finally:
        for thread in crew:
            thread.join(_JOIN_S)


def _collect(outcomes: queue.SimpleQueue[BaseException | None], count: int, tick: Callable[[], None]) -> None:
    while count:
        try:
            outcome = outcomes.get(timeout=_TICK_S)
        except queue.Empty:
            tick()
            continue
        if outcome is not None:
            raise outcome
        count -= 1
    tick()
