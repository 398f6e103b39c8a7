"""Berth in a berth machine: an ordinary user of a host that systemd runs, with cgroup version 2 alone.

The machine is that host: what this test machine itself is not. It also shows that people can live in a machine.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from person import Person
from support import ROOT, need

_PACKAGES = "crun uidmap passt dbus-user-session libpam-systemd python3 nftables dnsmasq-base iproute2"
_INSTALL = f"""
apt-get -q update
DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends {_PACKAGES}
useradd -m -s /bin/bash kid
loginctl enable-linger kid
# overlayfs needs another file system below: this folder is a plain one in every machine.
install -d -o kid /var/lib/docker/kid
chmod 755 /var/lib/docker
"""
_LIVE = """
set -e
export XDG_RUNTIME_DIR=/run/user/$(id -u) BERTH_DATA_DIR=/var/lib/docker/kid/berth PYTHONPATH=/opt/nested
cd "$HOME"
until [ -S "$XDG_RUNTIME_DIR/bus" ]; do sleep 0.1; done
berth="python3 -m berth"
$berth create rootfs:/opt/nested/debian.tar --name inner --memory 300M
$berth wait inner --for init --timeout 60
$berth run -n inner -- systemctl is-system-running
$berth run -n inner -- id -un
read_pid='import json, sys; print(json.load(sys.stdin)["pids"]["init"])'
cat /proc/$($berth inspect inner | python3 -c "$read_pid")/cgroup
$berth stop inner
$berth run -n inner -- echo again
$berth rm --force inner
"""


@pytest.mark.container("it is about containers below systemd; a VM in a VM needs hardware virtualization")
def test_an_ordinary_user_below_systemd(person: Person, debian: str, debian_tar: Path) -> None:
    if not person.is_root:
        pytest.skip("needs root's machine: a user's has no ids left for users of its own")
    need("mirror")
    person.berth("run", "-n", debian, "--root", "--", "sh", "-ec", _INSTALL, timeout_s=300)
    _copy_in(person, debian, debian_tar)
    done = person.try_berth("run", "-n", debian, "-u", "kid", "--", "bash", "-c", _LIVE, timeout_s=200)
    said = done.stdout.decode()
    assert done.status == 0, f"{said}\n{done.stderr.decode()}"
    lines = said.splitlines()
    assert "running" in lines
    assert "kid" in lines
    assert "again" in lines
    # It runs in a scope that the user's systemd made, in a cgroup delegated to it.
    assert any(line.startswith("0::/") and "user@" in line and "/berth-" in line for line in lines), said
    person.berth("run", "-n", debian, "--root", "--", "sh", "-c", "loginctl disable-linger kid; rm -rf /opt/nested")


def _copy_in(person: Person, machine: str, tar: Path) -> None:
    """Bring berth and a root file system into the machine by its standard input."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as out:
        out.add(ROOT / "src/berth", "berth", filter=lambda item: None if "__pycache__" in item.name else item)
        out.add(tar, "debian.tar")
    script = "mkdir -p /opt/nested && tar -x -C /opt/nested && chmod -R a+rX /opt/nested"
    person.berth("run", "-n", machine, "--root", "--", "sh", "-c", script, input=archive.getvalue())
