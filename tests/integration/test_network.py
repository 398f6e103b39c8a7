"""Machines on the network: their addresses, their names, services in them, the way out."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from person import Person, fetch
from support import need

_SERVE = "while true; do printf 'HTTP/1.0 200 OK\\r\\nContent-Length: 6\\r\\n\\r\\nhello\\n' | nc -l -p {port}; done"


@pytest.mark.parametrize("port", [80, 8081])
def test_the_host_reaches_a_service(person: Person, machine: Callable[..., str], port: int) -> None:
    name = machine()
    person.berth("run", "-n", name, "--root", "-d", "--", "sh", "-c", _SERVE.format(port=port))
    address = str(person.inspect(name)["ipAddress"])
    # An ordinary user may not listen below 1024: such a port is forwarded 8000 higher.
    reached = port if person.is_root or port >= 1024 else port + 8000
    assert fetch(address, reached) == b"hello\n"
    if not person.is_root:
        assert reached in person.inspect(name)["ports"]  # type: ignore[operator]


def test_machines_reach_each_other_by_name(person: Person, debian: str, machine: Callable[..., str]) -> None:
    name = machine()
    person.berth("run", "-n", name, "--root", "-d", "--", "sh", "-c", _SERVE.format(port=8000))
    script = f"getent hosts {name}; exec 3<>/dev/tcp/{name}/8000; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    deadline = time.monotonic() + 20
    while b"hello" not in (said := person.try_berth("run", "-n", debian, "--", "bash", "-c", script).stdout):
        assert time.monotonic() < deadline, said
        time.sleep(0.3)


def test_the_address_stays(person: Person, machine: Callable[..., str]) -> None:
    name = machine()
    before = person.inspect(name)["ipAddress"]
    person.berth("restart", name)
    assert person.inspect(name)["ipAddress"] == before


@pytest.mark.container("a VM installs nginx over it, in test_services.py")
def test_the_way_out(person: Person, debian: str) -> None:
    """The package mirror is reached from inside, with the names that the host's resolver gives."""
    need("mirror")
    said = person.berth("run", "-n", debian, "--root", "--", "apt-get", "-q", "update", timeout_s=300)
    assert "Err:" not in said
