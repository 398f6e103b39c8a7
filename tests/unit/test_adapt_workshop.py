"""What the throw-away machine tells when a step of it fails."""

from __future__ import annotations

from berth.adapt.recipes import Step
from berth.adapt.workshop import StepError, _Notes
from berth.progress import Silent


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_why_there_is_no_internet_is_told_at_once_and_kept_for_the_error() -> None:
    heard = Heard()
    notes = _Notes(heard)
    notes.note("memory can't be limited: no cgroup")
    assert (heard.notes, notes.handicap) == ([], None)
    notes.note("no internet in machines: pasta is not installed (sudo apt-get install passt)")
    assert heard.notes == [notes.handicap]
    error = StepError(
        Step("getting the package lists", ("apt-get", "update")), "ended with status 100", "E: no", hint=notes.handicap
    )
    assert error.hint == notes.handicap
    assert error.message == "getting the package lists failed (apt-get ended with status 100): E: no"
