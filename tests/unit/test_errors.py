"""The error tree: codes, exit statuses, what a failed program's error says."""

from __future__ import annotations

import inspect
import re

import pytest

from berth import errors
from berth.errors import AgentError, BerthError, CommandError, InvalidArgumentError

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, BerthError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_the_drawing_names_every_class_and_code(kind: type[BerthError]) -> None:
    assert errors.__doc__
    line = next((line for line in errors.__doc__.splitlines() if re.search(rf"\b{kind.__name__}\b", line)), None)
    assert line, f"{kind.__name__} is missing from the drawing"
    if "code" in vars(kind) and kind is not AgentError:
        assert f'"{kind.code}"' in line


@pytest.mark.parametrize("kind", CLASSES)
def test_codes_are_words_and_statuses_are_small(kind: type[BerthError]) -> None:
    assert re.fullmatch(r"[a-z_]+", kind.code)
    assert kind.exit_status in (1, 2)


def test_message_and_hint_are_kept() -> None:
    error = BerthError("machine 'dev' is running", hint="berth stop dev")
    assert (str(error), error.message, error.hint) == ("machine 'dev' is running",) * 2 + ("berth stop dev",)
    assert BerthError("x").hint is None


def test_wrong_usage_exits_with_2() -> None:
    assert InvalidArgumentError("x").exit_status == 2


def test_agent_error_keeps_the_agents_word() -> None:
    error = AgentError("not_executable", "no")
    assert (error.code, error.agent_code) == ("agent", "not_executable")


def test_command_error_shows_the_last_line() -> None:
    error = CommandError(("crun", "run"), 1, "warning: x\nreal reason\n\n")
    assert error.message == "crun failed with status 1: real reason"
    assert (error.argv, error.status) == (("crun", "run"), 1)


def test_command_error_names_the_signal() -> None:
    assert CommandError(("crun",), -9).message == "crun was ended by signal 9"
