"""Killed at any moment: whatever point a command ends at, the machines are whole and nothing is left (tests/faults.py).

Some points in each run, always the same; `--faults=300 --faults-seed=7` draws others, and more of them, and
`--faults-at=POINT,…` comes back to those that a failure has named.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from berth import proc
from berth.layout import Layout
from faults import BYSTANDER, NAME, SCENARIOS, Point, Struck, World, choose
from person import Person
from registries import docker_registry
from support import need

_SHORT = (
    "create:cli.rename:5", "create-fresh:@inside:60", "start:cli.mkdir=ENOSPC:1", "start:crun.mount:5",
    "start:cli.rename:4", "stop:cli.kill:1", "rm-force:cli.unlink:3", "import:cli.rename:3", "adapt:cli.fsync:21",
)  # fmt: skip
_SHORT_VM = ("start:@qemu:400", "run:cli.fsync:2")  # each takes two boots
_ALIKE = "it is about what both isolations have in common, and a VM takes a while to boot"
_RECIPE = """
schema = 1
version = 1
ids = ["alpine"]
managers = ["apk"]
packages = []
[[steps]]
say = "linking /sbin/init"
run = ["/bin/sh", "-c", "ln -s /bin/busybox /sbin/init"]
"""


_ROOMY = "size=256m,nr_inodes=100000"


@pytest.fixture
def apart(person: Person, scratch: Path) -> Generator[Person]:
    """The same person with directories of their own, so that nothing else of the session's is at stake."""
    home = scratch / "b"
    home.mkdir()
    os.chown(home, person.uid, -1)
    layout = Layout(home / "data", home / "run", home / "config", home / "cache")
    roots = {
        "BERTH_DATA_DIR": str(layout.data), "BERTH_RUNTIME_DIR": str(layout.runtime),
        "BERTH_CONFIG_DIR": str(layout.config), "BERTH_CACHE_DIR": str(layout.cache),
    }  # fmt: skip

    def command(argv: Sequence[str | bytes], env: Mapping[str, str], cwd: Path | None) -> list[str | bytes]:
        return person.command(argv, {**roots, **env}, cwd)

    someone = dataclasses.replace(person, layout=layout, command=command)
    recipes = layout.config / "recipes"
    someone.script(f"import pathlib; p = pathlib.Path({str(recipes)!r}); p.mkdir(parents=True); "
                   f"(p / 'alpine.toml').write_text({_RECIPE!r})")  # fmt: skip
    yield someone
    someone.take_down()


@pytest.fixture
def world(apart: Person, scratch: Path, alpine_tar: Path) -> Generator[World]:
    need("strace")
    tree = scratch / "tree"
    tree.mkdir()
    proc.run(["tar", "-xzf", str(alpine_tar), "-C", str(tree)])
    proc.run(["tar", "-cf", str(scratch / "fresh.tar"), "-C", str(tree), "."])
    (tree / "sbin/init").unlink()
    proc.run(["tar", "-cf", str(scratch / "noinit.tar"), "-C", str(tree), "."])
    shutil.rmtree(tree)
    context = scratch / "context"
    context.mkdir()
    (context / "Dockerfile").write_text("FROM local/base:1\nRUN echo built > /etc/built\n")
    apart.berth("image", "import", str(alpine_tar), "local/base:1")
    images = {
        "IMAGE": "local/base:1", "FRESHTAR": f"{scratch}/fresh.tar", "FRESH": f"rootfs:{scratch}/fresh.tar",
        "NOINIT": f"rootfs:{scratch}/noinit.tar", "CONTEXT": str(context),
    }  # fmt: skip
    with docker_registry(scratch / "registry") as served:
        apart.berth("image", "import", f"{scratch}/fresh.tar", "local/pushed:1")
        apart.berth("image", "push", "local/pushed:1", f"{served.host}/fresh:1")
        apart.berth("image", "rm", "local/pushed:1")
        images["REGISTRY"] = served.host
        yield World(apart, scratch / "faults", images)


def points(config: pytest.Config, world: World) -> Iterable[Point]:
    """Say which points this run is about."""
    at, rounds, seed = (config.getoption(f"--faults{name}") for name in ("-at", "", "-seed"))
    if rounds:
        return choose(int(str(seed)), int(str(rounds)), _scenarios(config), world.record)
    few = _SHORT_VM if world.person.isolation == "vm" else _SHORT
    return [Point.parse(text) for text in (str(at).split(",") if at else few)]


@pytest.mark.timeout(0)
def test_a_command_that_is_killed(world: World, request: pytest.FixtureRequest) -> None:
    told: list[str] = []
    for point in points(request.config, world):
        started = time.monotonic()
        world.prepare(point)
        struck = world.strike(point)
        found = world.problems(struck)
        last = struck.said.strip().splitlines()[-1:]
        print(f"{time.monotonic() - started:.1f} s {point}: {struck.status} {last} {found or ''}", flush=True)  # noqa: T201 (pytest -s)
        told += [f"--faults-at={point}  {problem}" for problem in found]
    assert not told, "\n".join(told)


@pytest.mark.container(_ALIKE)
@pytest.mark.parametrize("number", [0, 2], ids=["while-they-run", "while-one-starts"])
def test_a_reboot(world: World, number: int) -> None:
    """All processes are gone, and all that is not on a disk: what the next commands find."""
    point = Point("start", "cli.vfork", number)
    world.prepare(point)
    if number:
        world.strike(point)
    else:
        world.berth("start", NAME)
    world.reboot()
    listed = json.loads(world.berth("ls", "--format", "json"))
    assert {item["name"]: item["status"] for item in listed} == {NAME: "stopped", BYSTANDER: "stopped"}
    world.berth("start", BYSTANDER)
    world.bystander_is_new()
    assert world.problems(Struck(0, "")) == []


@pytest.mark.container(_ALIKE)
def test_many_commands_at_once(world: World) -> None:
    """Each ends well or says in one line why not, and what holds after one command holds after all of them."""
    create, remove = f"create IMAGE --name {NAME} --no-boot", f"rm --force {NAME}"
    world.berth(*create.replace("IMAGE", "local/base:1").split())
    told: list[str] = []
    for commands in (
        [create, remove] * 5,
        [f"start {NAME}", f"stop -f {NAME}", f"run -n {NAME} -- true", f"set -n {NAME} cpus=1", f"restart -f {NAME}",
         "ls", f"start {NAME}", f"stop -t 1 {NAME}", f"run -n {NAME} -- true", f"set -n {NAME} cpus=none",
         f"inspect {NAME}", f"commit {NAME} local/many:1"],
        [*(f"create FRESH --name {NAME}-{number} --no-boot" for number in range(4)),
         *["system prune", "image prune --all"] * 3],
        [*(f"rm {NAME}-{number}" for number in range(4)), f"create IMAGE --name {NAME}", "system prune", remove, "ls"],
    ):  # fmt: skip
        told += world.storm(commands)
    found = world.problems(Struck(0, ""))
    assert told + found == []


@pytest.fixture
def small(apart: Person) -> Generator[Callable[[str], None]]:
    """Put the person's data on a file system of its own, and change its mount options."""
    data = apart.layout.data
    data.mkdir(mode=0o700, exist_ok=True)
    gid = pwd.getpwuid(apart.uid).pw_gid  # without it, root of the user's namespace could not look in
    os.chown(data, apart.uid, gid)
    mode = f"mode=700,uid={apart.uid},gid={gid},{_ROOMY}"
    proc.run([*map(str, apart.beside(["mount", "-t", "tmpfs", "-o", mode, "berth-test", str(data)]))])
    yield lambda options: void(proc.run([*map(str, apart.beside(["mount", "-o", f"remount,{options}", str(data)]))]))
    apart.take_down()
    proc.run([*map(str, apart.beside(["umount", str(data)]))])


def void(_result: object) -> None: ...


@pytest.mark.container(_ALIKE)
@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_full_disk(apart: Person, small: Callable[[str], None], alpine_tar: Path, what: str) -> None:
    """With room for a little more each time: one error that says so, nothing half, and room can be made."""
    apart.berth("image", "import", str(alpine_tar), "local/base:1")
    apart.berth("create", "local/base:1", "--name", "old", "--no-boot")
    seen: set[int] = set()
    create = ["create", "local/base:1", "--name", "new", "--no-boot"]
    for room in (0, 3, 30):
        _limit(apart, small, what, room)
        for command in (["start", "old"], ["stop", "-f", "old"], ["set", "-n", "old", f"cpus={room + 1}"], create):
            done = apart.try_berth(*command)
            said = done.stderr.decode()
            assert "Traceback" not in said, said
            assert "internal error" not in said, said
            lines = [line for line in said.splitlines() if line.startswith("berth: ")]
            assert len(lines) == (done.status != 0), said
            assert done.status == 0 or "space left" in said, said
            seen.add(done.status)
        listed = {item["name"]: item for item in json.loads(apart.berth("ls", "--format", "json"))}
        assert listed["old"]["status"] == "stopped"
        assert not listed["old"]["problems"], listed
        if "new" in listed:  # what is there is whole, and can be removed though nothing can be written
            _limit(apart, small, what, 0)
            apart.berth("rm", "new")
    assert seen == {0, 1}
    _limit(apart, small, what, 0)
    apart.berth("rm", "old")
    small(_ROOMY)
    apart.berth("system", "prune")
    assert os.listdir(Path(f"/proc/{apart.namespace or 'self'}/root{apart.layout.machines}")) == []


def _limit(person: Person, small: Callable[[str], None], what: str, room: int) -> None:
    """Leave so much room: pages, or files."""
    small(_ROOMY)
    status = os.statvfs(f"/proc/{person.namespace or 'self'}/root{person.layout.data}")
    if what == "bytes":
        small(f"size={(status.f_blocks - status.f_bfree + room) * status.f_frsize}")
    else:
        small(f"nr_inodes={status.f_files - status.f_ffree + room}")


@pytest.mark.container(_ALIKE)
def test_a_read_only_disk(apart: Person, small: Callable[[str], None], alpine_tar: Path) -> None:
    apart.berth("image", "import", str(alpine_tar), "local/base:1")
    apart.berth("create", "local/base:1", "--name", "old", "--no-boot")
    before = apart.berth("ls", "--format", "json")
    small("ro")
    for command in (
        "create local/base:1 --name new", "start old", "set -n old cpus=2", "rm old", "stop old", "run -n old -- true",
        f"image import {alpine_tar} local/new:1", "image rm local/base:1", "system prune", "commit old local/own:1",
    ):  # fmt: skip
        done = apart.try_berth(*command.split())
        said = done.stderr.decode()
        assert "Traceback" not in said, said
        assert "internal error" not in said, said
        assert done.status != 0, command
        lines = [line for line in said.splitlines() if line.startswith("berth: ")]
        assert len(lines) == 1, said
        assert "ead-only file system" in lines[0], f"{command}: {said}"
    assert apart.berth("ls", "--format", "json") == before
    apart.berth("image", "ls")
    small("rw")
    assert apart.run("old", "echo", "whole") == "whole\n"
    apart.berth("rm", "-f", "old")


def _scenarios(config: pytest.Config) -> list[str]:
    chosen = str(config.getoption("--faults-of"))
    return chosen.split(",") if chosen else list(SCENARIOS)
