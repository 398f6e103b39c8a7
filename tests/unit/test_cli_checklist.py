"""The screen of `berth system check`: what it says of made-up hosts, and that it is one screen."""

from __future__ import annotations

import subprocess

import pytest

from berth.check import Check, Status
from berth.cli import checklist


def check(name: str, status: Status = "ok", fix: str | None = None, **kind: bool) -> Check:
    return Check(name, status, None, "found so", "without it less", fix, **kind)


HOST = [check(name) for name in ("kernel", "crun", "qemu", "qemu-img", "mke2fs", "kvm", "cgroups")]


def but(*others: Check) -> list[Check]:
    """A host where everything is there, but for these."""
    return [*(item for item in HOST if item.name not in {other.name for other in others}), *others]


@pytest.mark.parametrize(
    ("checks", "sentence"),
    [
        (HOST, "Containers run here, and VMs with hardware virtualization."),
        (but(check("kvm", "warning")), "Containers run here, and VMs emulated in software."),
        (but(check("qemu", "missing")), "Containers run here; VMs do not."),
        (but(check("cgroups", "missing"), check("kvm", "warning")),
         "Containers without services run here, and VMs emulated in software."),
        (but(check("crun", "missing", required=True)), "No machine runs here yet."),
    ],
)  # fmt: skip
def test_the_first_line_says_what_runs(checks: list[Check], sentence: str) -> None:
    assert checklist.summary(checks) == sentence


def test_all_fixes_are_one_command_that_a_shell_reads() -> None:
    parts, then = checklist.join_fixes([
        "sudo apt-get install crun", "sudo apt-get install uidmap", "sudo apt-get install crun",
        "sudo chmod 0666 /dev/net/tun", "sudo usermod -aG kvm me  # then log in again",
        "echo 'a = 0' | sudo tee /etc/x && sudo sysctl -p /etc/x",
    ])  # fmt: skip
    assert parts == [
        "sudo apt-get install crun uidmap", "sudo chmod 0666 /dev/net/tun", "sudo usermod -aG kvm me",
        "echo 'a = 0' | sudo tee /etc/x && sudo sysctl -p /etc/x",
    ]  # fmt: skip
    assert then == ["then log in again"]
    subprocess.run(["bash", "-n", "-c", " &&\n    ".join(parts)], check=True)


def test_a_bare_host_is_one_screen(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten things missing, ten there: no more than 40 lines of 80 columns, and every fix is in the command."""
    monkeypatch.setenv("COLUMNS", "80")
    bad = [check(f"tool{number}", "missing", f"sudo apt-get install tool{number}") for number in range(10)]
    checklist.show([*HOST, *bad, check("wish", "missing", "wish for it", optional=True)])
    out = capfd.readouterr().out
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines()[:-8])) <= 80
    assert "sudo apt-get install tool0 tool1 tool2" in out
    assert "wish for it" not in out
    assert "wish: berth system check --all" in out


def test_a_host_that_lacks_nothing_needs_no_command(capfd: pytest.CaptureFixture[str]) -> None:
    checklist.show(HOST)
    out = capfd.readouterr().out
    assert "missing" not in out
    assert "type" not in out
