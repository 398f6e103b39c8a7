"""Other Debians and other inits: trixie and sid with systemd, bookworm with sysvinit and with OpenRC, busybox."""

from __future__ import annotations

import pytest

from images import SYSTEMD, bootstrap
from person import Person
from support import need

_ENOUGH = pytest.mark.container("emulated, one more systemd and one other init have to be enough")
_PLAIN = ("dbus", "iproute2", "procps", "passwd", "login", "netbase")


@pytest.mark.parametrize(
    ("suite", "packages", "system"),
    [
        ("trixie", SYSTEMD, "systemd"),
        pytest.param("sid", SYSTEMD, "systemd", marks=_ENOUGH),
        pytest.param("bookworm", ("sysvinit-core", *_PLAIN), "sysvinit", marks=_ENOUGH),
        ("bookworm", ("openrc", "sysvinit-core", *_PLAIN), "openrc"),
    ],
)
def test_it_boots_runs_and_stops(person: Person, suite: str, packages: tuple[str, ...], system: str) -> None:
    need("mirror")
    tar = bootstrap(suite, packages)
    name = f"{suite}-{system}"
    person.berth("create", f"rootfs:{tar}", "--name", name, timeout_s=180)
    try:
        state = person.berth("wait", name, "--for", "init", "--timeout", "60")
        if system == "systemd":
            assert person.run(name, "systemctl", "is-system-running").strip() == "running", state
        assert person.run(name, "id", "-un").strip() == person.name
        person.berth("run", "-n", name, "--root", "--", "sh", "-c", "echo kept > /var/kept")
        person.berth("stop", name, "-t", "20")
        assert person.run(name, "cat", "/var/kept") == "kept\n"
    finally:
        person.berth("rm", "--force", name)


def test_busybox_boots_runs_and_stops(person: Person, alpine: str) -> None:
    assert "Alpine" in person.run(alpine, "cat", "/etc/os-release")
    assert person.run(alpine, "cat", "/proc/1/comm").strip() == "init"
    person.berth("stop", alpine, "-t", "20")
    assert person.run(alpine, "id", "-un").strip() == person.name
