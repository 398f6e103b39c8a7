"""Real services: nginx and PostgreSQL, installed with apt, serving, surviving a stop."""

from __future__ import annotations

from person import Person, fetch
from support import need


def test_nginx_and_postgresql(person: Person, debian: str) -> None:
    need("mirror")
    install = "apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends"
    person.berth(
        "run", "-n", debian, "--root", "--", "sh", "-c", f"{install} nginx-light postgresql", timeout_s=600
    )  # fmt: skip
    _check(person, debian)
    query = "psql -Atc 'create table kept (x int); insert into kept values (42)'"
    person.berth("run", "-n", debian, "-u", "postgres", "-w", "/", "--", "sh", "-c", query)
    person.berth("stop", debian)
    _check(person, debian)
    answer = person.berth("run", "-n", debian, "-u", "postgres", "-w", "/", "--", "psql", "-Atc", "select x from kept")
    assert answer.strip() == "42"


def _check(person: Person, machine: str) -> None:
    person.berth("start", machine)
    person.berth("wait", machine, "--for", "init", "--timeout", "60")
    for unit in ("nginx", "postgresql"):
        assert person.run(machine, "systemctl", "is-active", unit).strip() == "active"
    address = str(person.inspect(machine)["ipAddress"])
    assert b"nginx" in fetch(address, 80 if person.is_root else 8080)
