"""How long work tells about itself. Owns the seam only: `cli` shows it, everyone else reports to it; layer 1."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where long work reports. Every method returns at once and never raises."""

    def step(self, text: str) -> None:
        """Say that a step begins: ``unpacking debian:12``. It ends when the next begins."""

    def advance(self, done: int, total: int | None) -> None:
        """Say how far the step is, in bytes; `total` is None when nobody knows it."""

    def note(self, text: str) -> None:
        """Say one line that the person should read and that stays on the screen."""


class Silent:
    """Reports to nobody: the API's default."""

    def step(self, text: str) -> None: ...

    def advance(self, done: int, total: int | None) -> None: ...

    def note(self, text: str) -> None: ...
