"""A VM whose root has taken the agent's place, and speaks with the host's keeper over the serial port as it likes.

tests/enemy/port.go has the manners. test_enemy.py does the same to a container, where the command line meets the false
agent itself; here the keeper is between, and is to stay alive, small, and of no harm to anybody else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from enemies import MOST_MEMORY, arm, assert_one_error, peak
from person import Person

pytestmark = [
    pytest.mark.vm("in a container there is no channel"),
    pytest.mark.only("user-vm"),  # root's keeper is the same program, and this takes a minute
]

_MANNERS = ("garbage", "huge", "forged", "opens", "ports", "stderr", "endless", "refuse", "noise", "deaf")
_ENDED = ("endless", "refuse")  # `run` is told something, and need not wait a minute for a greeting
_KEEPER_MEMORY = 48  # MiB that the keeper may ever have had; it has about 10
_KEEPER_THREADS = 100
_IN_TIME_S = 15.0


@dataclasses.dataclass(frozen=True, slots=True)
class Hostage:
    """A VM whose agent was replaced. orders: the folder of the host's in which the false agent finds them."""

    person: Person
    name: str
    orders: Path

    def order(self, manner: str) -> None:
        (self.orders / "manner").write_text(manner)

    def meet(self, manner: str) -> None:
        """Have the keeper meet a manner of the false agent's."""
        self.order(manner)
        met = self.orders / "manner.met"
        until(lambda: met.exists() and met.read_text() == manner, f"the keeper met {manner}")


@pytest.fixture
def hostage(person: Person, machine: Callable[..., str], weapon: Path, scratch: Path) -> Generator[Hostage]:
    orders = scratch / "orders"
    orders.mkdir()
    orders.chmod(0o777)
    name = machine("--home-mount", "none", "--mount", f"{orders}:/srv/orders")
    arm(person, name, weapon)
    made = Hostage(person, name, orders)
    made.order("silence")
    with busy_ssh_agent(scratch / "agent") as path:
        person.berth("run", "-n", name, "--", "true", env={"SSH_AUTH_SOCK": str(path)})
        person.try_berth("run", "-n", name, "--root", "-d", "--", "/den/enemy", "be-port", "/srv/orders/manner")
        until((orders / "manner.ready").exists, "the agent was replaced")
        yield made


@contextlib.contextmanager
def busy_ssh_agent(path: Path) -> Generator[Path]:
    """Have an SSH agent that is never done with its first client: whoever else connects has to wait."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen(0)
        yield path


def test_a_false_agent_in_a_vm_harms_itself_alone(hostage: Hostage, alpine: str) -> None:
    person, name = hostage.person, hostage.name
    keeper = person.pids(name)["keeper"]
    for manner in _MANNERS:
        hostage.meet(manner)
        status, stdout, stderr, memory = peak(
            person, "wait", name, "--for", "init", "--timeout", "1", timeout_s=_IN_TIME_S
        )
        assert memory < MOST_MEMORY, manner
        if manner != "noise":
            assert (status, stdout) == (1, b""), manner
        if status:
            assert_one_error(stderr)
        if manner in _ENDED:
            assert_a_command_ends_in_words(hostage)
        facts = of_process(keeper)
        assert facts["Threads"] < _KEEPER_THREADS, manner
        assert facts["VmHWM"] >> 10 < _KEEPER_MEMORY, manner
        assert person.run(alpine, "echo", "unharmed") == "unharmed\n", manner
    assert {name, alpine} <= set(person.berth("ls", "-q", timeout_s=_IN_TIME_S).split())
    assert person.pids(name)["keeper"] == keeper, "it is the one that met them all"
    hostage.order("silence")
    person.berth("stop", name, "-t", "0.5", timeout_s=_IN_TIME_S)
    assert person.inspect(name)["status"] == "stopped"
    until(lambda: not is_running(keeper), "the keeper ended")
    person.berth("rm", name, timeout_s=_IN_TIME_S)


def assert_a_command_ends_in_words(hostage: Hostage) -> None:
    """Nobody reads its output: what is sent without credit must not be taken for ever."""
    with hostage.person.popen("run", "-n", hostage.name, "--", "true") as process:
        try:
            assert process.wait(_IN_TIME_S) == 125
        finally:
            process.kill()
        assert process.stderr is not None
        assert_one_error(process.stderr.read())


def until(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def of_process(pid: int) -> dict[str, int]:
    """Read the numbers of /proc/PID/status; sizes are in KiB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
