"""What of a machine becomes an image, and what berth refuses; on real uppers: tests/integration/test_commit.py."""

from __future__ import annotations

import pytest

from berth.commit import commit, left_out
from berth.config import BootConfig, HostUser, MachineConfig, Mount
from berth.errors import InvalidArgumentError, NotFoundError
from berth.layout import Layout
from berth.lifecycle import Machines
from berth.names import parse_machine_name

USER = HostUser(name="ada", uid=1000, gid=1000, group="ada", home="/home/ada", shell="/bin/bash")
CONFIG = MachineConfig(
    name=parse_machine_name("dev"), id="0" * 32, image_reference="docker.io/library/base:1",
    image_digest="sha256:" + "0" * 64, platform="linux/amd64", isolation="container",
    created="2026-01-01T00:00:00Z", user=USER,
)  # fmt: skip


def test_mounted_folders_are_not_in_the_image() -> None:
    boot = BootConfig(mounts=(Mount("/srv/data", "/data", read_only=False),))
    assert {"home/ada", "data"} <= set(left_out(CONFIG, boot))


def test_a_home_of_its_own_is_in_the_image() -> None:
    assert "home/ada" not in left_out(CONFIG, BootConfig(home_mount="none"))


def test_what_makes_a_machine_this_one_is_not_in_the_image() -> None:
    assert {"etc/hostname", "etc/machine-id", "etc/hosts", "etc/resolv.conf", "var/lib/berth", "var/lib/docker"} <= set(
        left_out(CONFIG, BootConfig())
    )


@pytest.mark.parametrize("reference", ["oci:/x", "Not A Name", "name@sha256:" + "0" * 64])
def test_a_bad_name_is_refused_first(layout: Layout, reference: str) -> None:
    with pytest.raises(InvalidArgumentError):
        commit(Machines(layout), "dev", reference)


def test_a_machine_that_is_not_there(layout: Layout) -> None:
    with pytest.raises(NotFoundError):
        commit(Machines(layout), "dev", "local/dev:1")
