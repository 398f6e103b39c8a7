"""Real services: nginx and PostgreSQL, installed with apt, serving, surviving a stop."""

from __future__ import annotations

import pytest

from person import Person, fetch
from support import need


@pytest.mark.container("emulated, it takes five minutes: a VM's own test has nginx alone")
def test_nginx_and_postgresql(person: Person, debian: str) -> None:
    need("mirror")
    install = "apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends"
    person.berth(
        "run", "-n", debian, "--root", "--", "sh", "-c", f"{install} nginx-light postgresql", timeout_s=600
    )  # fmt: skip
    _check(person, debian, "nginx", "postgresql")
    query = "psql -Atc 'create table kept (x int); insert into kept values (42)'"
    person.berth("run", "-n", debian, "-u", "postgres", "-w", "/", "--", "sh", "-c", query)
    person.berth("stop", debian)
    _check(person, debian, "nginx", "postgresql")
    answer = person.berth("run", "-n", debian, "-u", "postgres", "-w", "/", "--", "psql", "-Atc", "select x from kept")
    assert answer.strip() == "42"


@pytest.mark.vm
@pytest.mark.only("user-vm")  # emulated, it takes a minute and a half: once is enough
@pytest.mark.timeout(600)
def test_nginx(person: Person, debian: str) -> None:
    need("mirror")
    install = "apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends"
    person.berth("run", "-n", debian, "--root", "--", "sh", "-c", f"{install} nginx-light", timeout_s=500)
    _check(person, debian, "nginx")
    person.berth("stop", debian, "-t", "30")
    _check(person, debian, "nginx")


def _check(person: Person, machine: str, *units: str) -> None:
    person.berth("start", machine)
    person.berth("wait", machine, "--for", "init", "--timeout", "100")
    for unit in units:
        assert person.run(machine, "systemctl", "is-active", unit).strip() == "active"
    address = str(person.inspect(machine)["ipAddress"])
    assert b"nginx" in fetch(address, 80 if person.is_root else 8080)
