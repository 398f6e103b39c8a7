"""Fixtures of the integration tests: real machines, as root and as an ordinary user, through the command line.

Machines are shared by all tests of a session (`debian`, `alpine`): a test leaves them as it found them, or makes its
own with `machine`.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from berth import host, proc
from enemies import SOURCE
from hatch_build import find_go
from ordinary import Ordinary
from person import Person, as_ordinary, as_root
from support import ROOT, need

SHARED_IMAGES = Path("/work/shared/images")
_numbers = itertools.count(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out of the VM's runs what is about containers, or about neither (its marker says why); and the reverse.

    What is marked ``only`` is left out of the runs of all persons but one.
    """
    doomed = [item for item in items if _is_foreign(item)]
    config.hook.pytest_deselected(items=doomed)
    items[:] = [item for item in items if item not in set(doomed)]


def _is_foreign(item: pytest.Item) -> bool:
    only = item.get_closest_marker("only")
    if only is not None and _person(item) != only.args[0]:
        return True
    return item.get_closest_marker("container" if _wants_vm(item) else "vm") is not None


def _wants_vm(item: pytest.Item) -> bool:
    return _person(item).endswith("-vm")


def _person(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("person", "")) if callspec else ""


@pytest.fixture(scope="session", params=["root", "user", "root-vm", "user-vm"])
def person(request: pytest.FixtureRequest, session: Path, agent_binary: Path) -> Generator[Person]:
    """Who runs berth: root, and an ordinary user; machines in containers, then in VMs, with the same images.

    Everything of theirs is taken down at the end.
    """
    del agent_binary  # built before anybody starts a machine
    who, _, isolation = str(request.param).partition("-")
    for feature in ("crun", "net", *(["qemu", "mirror"] if isolation == "vm" else [])):
        need(feature)
    if who == "root":
        need("root")
        someone = as_root(session / "root", isolation or "container")
    else:
        ordinary: Ordinary = request.getfixturevalue("ordinary_user")
        someone = as_ordinary(ordinary, isolation or "container")
    yield someone
    someone.take_down()


@pytest.fixture(scope="session")
def debian(person: Person, debian_tar: Path) -> str:
    """A running Debian 12 machine (systemd) that all tests share."""
    person.berth("create", f"rootfs:{debian_tar}", "--name", "debian", timeout_s=180)
    person.berth("wait", "debian", "--for", "init", "--timeout", "60")
    return "debian"


@pytest.fixture(scope="session")
def alpine_tar() -> Path:
    path = SHARED_IMAGES / "alpine-minirootfs-3.20.3-x86_64.tar.gz"
    if not path.exists():
        path = Path(__file__).parents[3] / "shared/images" / path.name
    if not path.exists():
        pytest.skip(f"needs the Alpine root file system {path}")
    return path


@pytest.fixture(scope="session")
def alpine(person: Person, alpine_tar: Path) -> str:
    """A running Alpine machine (busybox init) that all tests share."""
    person.berth("create", f"rootfs:{alpine_tar}", "--name", "alpine")
    return "alpine"


@pytest.fixture
def machine(person: Person, alpine: str, alpine_tar: Path) -> Generator[Callable[..., str]]:
    """Make machines of the test's own (from the Alpine image, already unpacked), removed afterwards."""
    del alpine
    made: list[str] = []

    def make(*options: str) -> str:
        name = f"own-{next(_numbers)}"
        made.append(name)
        person.berth("create", f"rootfs:{alpine_tar}", "--name", name, *options)
        return name

    yield make
    for name in made:
        person.try_berth("rm", "--force", name)


@pytest.fixture(scope="session")
def weapons(session: Path) -> dict[str, Path]:
    """The attacking program, for this host and, as `386`, for its 32-bit half."""
    need("go")
    go = find_go()
    assert go is not None
    found: dict[str, Path] = {}
    folder = session / "enemy"
    for arch in (host.architecture(), *(["386"] if host.architecture() == "amd64" else [])):
        target = folder / arch
        env = {"CGO_ENABLED": "0", "GO111MODULE": "off", "GOARCH": arch, "GOFLAGS": ""}
        env["GOCACHE"] = os.environ.get("BERTH_GOCACHE", str(ROOT / "build/go-cache"))
        proc.run([str(go), "build", "-o", str(target), "."], cwd=SOURCE, env=env, timeout_s=250)
        found[arch] = target
    folder.chmod(0o755)
    return found


@pytest.fixture(scope="session")
def weapon(weapons: dict[str, Path]) -> Path:
    return weapons[host.architecture()]


@pytest.fixture
def project(person: Person) -> Generator[Path]:
    """A folder with a file in the person's home."""
    folder = person.home / f"berth test {os.getpid()}"
    folder.mkdir()
    (folder / "hello.txt").write_text("hello from the host\n")
    for path in (folder, folder / "hello.txt"):
        os.chown(path, person.uid, -1)
    yield folder
    shutil.rmtree(folder)
