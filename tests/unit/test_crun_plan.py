"""What the container engine plans, against golden files: a change of it is to be seen in a diff."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from berth import userns
from berth.bundle import Bundle
from berth.config import BootConfig, HostUser, MachineConfig, Mount
from berth.engine.base import Machine
from berth.engine.crun import cgroups
from berth.engine.crun.plan import container_id, plan_binds, plan_launch
from berth.engine.crun.spec import runtime_spec
from berth.engine.running import boot_document
from berth.layout import Layout
from berth.names import MachineName
from berth.net.addresses import Address
from berth.userns import Extent, IdMap

_GOLDEN = Path(__file__).parents[1] / "golden/crun-config.json"
_EXTENTS = (Extent(0, 100000, 1000), Extent(1000, 1000, 1), Extent(1001, 101000, 64535))
_IDMAP = IdMap(_EXTENTS, _EXTENTS)
_DIGEST = "sha256:" + "ab" * 32


def _machine(tmp_path: Path, boot: BootConfig) -> Machine:
    home = tmp_path / "home/ann"
    home.mkdir(parents=True, exist_ok=True)
    layout = Layout(tmp_path / "data", tmp_path / "run", tmp_path / "config", tmp_path / "cache")
    user = HostUser("ann", 1000, 1000, "ann", str(home), "/bin/bash")
    config = MachineConfig(
        MachineName("dev"), "0123456789abcdef" * 2, "docker.io/library/debian:12", _DIGEST, "linux/amd64",
        "container", "2026-11-22T14:16:00Z", user,
    )  # fmt: skip
    address = Address("10.209.0.2", 22, "10.209.0.1", "02:be:0a:d1:00:02", "bth0ad10002", "127.104.0.2")
    return Machine(Bundle(layout, config.name), config, boot, address)


def test_the_runtime_spec_is_the_golden_one() -> None:
    spec = runtime_spec(
        rootfs="/run/user/1000/berth/m/dev/rootfs", hostname="dev", idmap=_IDMAP.nested(),
        bounding_set=0x1FFFEFFFFFF, devices=["/dev/fuse"], cgroup=True, architecture="amd64",
    )  # fmt: skip
    if os.environ.get("BERTH_TEST_WRITE_GOLDEN"):
        _GOLDEN.write_text(json.dumps(spec, indent=2) + "\n")
    assert spec == json.loads(_GOLDEN.read_text())


def _spec_of(*, bounding_set: int) -> dict[str, object]:
    return runtime_spec(
        rootfs="/r", hostname="h", idmap=_IDMAP, bounding_set=bounding_set, devices=[], cgroup=False,
        architecture="amd64",
    )  # fmt: skip


def test_capabilities_are_those_of_the_bounding_set_without_the_hollow_ones() -> None:
    spec = _spec_of(bounding_set=0b11)
    process = spec["process"]
    assert isinstance(process, dict)
    assert process["capabilities"]["bounding"] == ["CAP_CHOWN", "CAP_DAC_OVERRIDE"]
    everything = _spec_of(bounding_set=-1)
    assert "CAP_SYS_MODULE" not in str(everything)
    assert "cgroup2" not in str(everything)
    assert "/sys/fs/cgroup" not in str(everything)


def test_the_order_of_mounts_is_home_mounts_covers(tmp_path: Path) -> None:
    machine = _machine(
        tmp_path, BootConfig(mounts=(Mount("/usr/share", "/srv/b"), Mount("/etc", "/srv/a", read_only=True)))
    )
    home = tmp_path / "home/ann"
    (home / ".ssh").mkdir()
    (home / ".netrc").touch()
    binds = plan_binds(machine, idmapped=False)
    assert [bind["target"] for bind in binds] == [
        str(home), "/srv/a", "/srv/b", f"{home}/.netrc", f"{home}/.ssh", "/var/lib/docker", "/var/lib/containers",
    ]  # fmt: skip
    by_target = {bind["target"]: bind for bind in binds}
    assert by_target["/srv/a"]["read_only"]
    assert not by_target["/srv/b"]["read_only"]
    assert by_target[f"{home}/.ssh"]["source"] == str(machine.bundle.private / ".ssh")
    assert by_target[f"{home}/.netrc"] == {
        "source": str(machine.bundle.private / ".netrc"), "target": f"{home}/.netrc", "directory": False,
        "read_only": True, "idmapped": False,
    }  # fmt: skip


@pytest.mark.parametrize(("mode", "read_only"), [("rw", False), ("ro", True)])
def test_the_home_follows_its_setting(tmp_path: Path, mode: str, read_only: bool) -> None:
    bind = plan_binds(_machine(tmp_path, BootConfig(home_mount=mode)), idmapped=True)[0]  # type: ignore[arg-type]
    assert (bind["read_only"], bind["idmapped"]) == (read_only, True)


def test_no_home(tmp_path: Path) -> None:
    machine = _machine(tmp_path, BootConfig(home_mount="none"))
    assert [bind["target"] for bind in plan_binds(machine, idmapped=False)] == [
        "/var/lib/docker",
        "/var/lib/containers",
    ]
    document = boot_document(machine, nameserver_text="", init=["/sbin/init"])
    assert '"homeIsOwn": true' in json.dumps(document)


def _launch(tmp_path: Path, holder: int | None) -> dict[str, object]:
    machine = _machine(tmp_path, BootConfig(home_mount="none"))
    placement = cgroups.Placement("/sys/fs/cgroup/x", ("/sys/fs/cgroup/memory/x",), (("file", "text"),))
    idmap = userns.plan_idmap(0, 0) if holder is None else _IDMAP
    plan = plan_launch(
        machine, agent=Path("/agent"), holder=holder, idmap=idmap, placement=placement, boot_document="{}",
        bounding_set=1,
    )  # fmt: skip
    assert json.loads(json.dumps(plan)) == plan  # it crosses to another process
    return dict(plan)


def test_an_ordinary_users_plan(tmp_path: Path) -> None:
    plan = _launch(tmp_path, 4242)
    assert plan["holder"] == 4242
    assert plan["root"] == 0
    assert plan["rootfs"] == str(tmp_path / "run/m/dev/rootfs")
    template = "templates/sha256-" + "ab" * 32
    folder = "machines/dev/container"
    assert plan["overlay"] == f"lowerdir={template}/rootfs,upperdir={folder}/upper,workdir={folder}/work,userxattr"
    spec = plan["spec"]
    assert isinstance(spec, dict)
    assert spec["linux"]["uidMappings"][1] == {"containerID": 1000, "hostID": 1000, "size": 1}


def test_roots_plan(tmp_path: Path) -> None:
    plan = _launch(tmp_path, None)
    assert plan["holder"] is None
    assert plan["root"] == userns.ROOT_BASE
    assert str(plan["overlay"]).endswith(",redirect_dir=on")
    spec = plan["spec"]
    assert isinstance(spec, dict)
    assert spec["linux"]["uidMappings"] == [{"containerID": 0, "hostID": userns.ROOT_BASE, "size": 1 << 20}]


def test_the_boot_document(tmp_path: Path) -> None:
    machine = _machine(tmp_path, BootConfig(env=("A=1",), ssh_agent=False))
    document = boot_document(machine, nameserver_text="nameserver 10.209.0.1\n", init=["/sbin/init"])
    assert document == {
        "schema": 1,
        "instance": "0123456789abcdef" * 2,
        "hostname": "dev",
        "hosts": "127.0.0.1 localhost\n10.209.0.2 dev\n::1 localhost ip6-localhost ip6-loopback\n"
        "ff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n",
        "resolv": "nameserver 10.209.0.1\n",
        "twin": {
            "name": "ann", "uid": 1000, "gid": 1000, "group": "ann", "home": str(tmp_path / "home/ann"),
            "shell": "/bin/bash", "homeIsOwn": False,
        },
        "sshAgent": False,
        "env": ["A=1"],
        "init": ["/sbin/init"],
    }  # fmt: skip
    assert container_id(machine) == "berth-0123456789ab"


def test_cgroup_limits_in_the_words_of_version_2() -> None:
    writes, missing = cgroups._v2_writes(Path("/c"), cgroups.Limits(2, 1 << 30), {"memory", "cpu"})
    assert writes == [("/c/memory.max", "1073741824"), ("/c/cpu.max", "200000 100000")]
    assert missing == ["pids"]
    assert cgroups._words(missing) == (
        "the number of processes can't be limited: the cgroup controller 'pids' is not given to us",
    )


def test_cgroup_limits_in_the_words_of_version_1() -> None:
    assert cgroups._v1_writes(cgroups.Limits(2, 1 << 20)) == {
        "memory": [("memory.limit_in_bytes", "1048576")],
        "cpu": [("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "200000")],
        "pids": [("pids.max", str(cgroups.TASKS_MAX))],
    }
    assert cgroups._v1_writes(cgroups.Limits(None, None))["memory"] == []


def test_only_what_bears_the_name_is_swept(tmp_path: Path) -> None:
    inside = tmp_path / "berth/berth-0123456789ab-1/system.slice/x.service"
    inside.mkdir(parents=True)
    other = tmp_path / "berth/other"
    other.mkdir()
    cgroups.remove([str(tmp_path / "berth/berth-0123456789ab-1")])
    assert not inside.parents[1].exists()
    assert other.exists()
