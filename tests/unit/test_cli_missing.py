"""The hint for a program that a machine has not got."""

from __future__ import annotations

import pytest

from berth import bundle
from berth.adapt.facts import Facts
from berth.cli.missing import install_hint
from berth.config import BootConfig, HostUser, MachineConfig
from berth.files import make_private_directory, save_json
from berth.layout import Layout
from berth.names import MachineName

DIGEST = f"sha256:{'ab' * 32}"


@pytest.fixture
def machine(layout: Layout) -> MachineName:
    name = MachineName("dev")
    config = MachineConfig(
        name, "0" * 32, "alpine:3", DIGEST, "linux/amd64", "container", "2026-11-23T00:00:00Z", HostUser.current()
    )  # fmt: skip
    with bundle.create(layout, config, BootConfig()):
        pass
    return name


def know(layout: Layout, *managers: str) -> None:
    path = layout.inspection(DIGEST)
    make_private_directory(path.parent)
    save_json(path, Facts(has_init=True, has_shell=True, managers=managers).to_json(), schema=1)


@pytest.mark.parametrize(
    ("manager", "words"),
    [("apk", "apk add …"), ("dnf", "dnf install …"), ("apt-get", "'apt-get update && apt-get install …'")],
)
def test_it_is_the_machines_own_package_manager(layout: Layout, machine: MachineName, manager: str, words: str) -> None:
    know(layout, manager)
    assert install_hint(machine, layout) == f"install it in the machine: berth run -n dev --root {words}"
    bundle.set_default(layout, machine)
    assert install_hint(machine, layout) == f"install it in the machine: berth run --root {words}"


def test_nothing_is_said_where_nothing_is_known(layout: Layout, machine: MachineName) -> None:
    assert install_hint(machine, layout) is None
    know(layout)
    assert install_hint(machine, layout) is None
    know(layout, "another")
    assert install_hint(machine, layout) is None
    assert install_hint("gone", layout) is None
    assert install_hint("No Name", layout) is None
