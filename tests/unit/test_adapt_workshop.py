"""What the throw-away machine tells when a step of it fails."""

from __future__ import annotations

from berth.adapt.recipes import Step
from berth.adapt.workshop import StepError


def test_why_there_is_no_internet_is_the_hint() -> None:
    why = "no internet in machines: pasta is not installed (sudo apt-get install passt)"
    error = StepError(Step("getting lists", ("apt-get", "update")), "ended with status 100", "E: no", hint=why)
    assert error.hint == why
    assert error.message == "getting lists failed (apt-get ended with status 100): E: no"
