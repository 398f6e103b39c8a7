"""The machine's configuration: what people type, what the files hold, and the table of keys."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.config import (
    KEYS,
    BootConfig,
    HostUser,
    MachineConfig,
    Mount,
    apply_assignments,
    check_env,
    check_expose,
    check_mount_destination,
    parse_boolean,
    parse_cpus,
    parse_disk,
    parse_env,
    parse_home_mount,
    parse_kernel,
    parse_memory,
    parse_mount,
    parse_platform,
)
from berth.errors import InvalidArgumentError, NotFoundError, StateFormatError
from berth.names import MachineName
from berth.units import GIB, MIB

USER = HostUser("ann", 1000, 1000, "ann", "/home/ann", "/bin/bash")
CONFIG = MachineConfig(
    name=MachineName("dev"),
    id="0123456789abcdef" * 2,
    image_reference="docker.io/library/debian:12",
    image_digest=f"sha256:{'a' * 64}",
    platform="linux/amd64",
    isolation="container",
    created="2026-11-22T14:16:00Z",
    user=USER,
)
BOOT = BootConfig(
    cpus=2, memory=GIB, disk=8 * GIB, home_mount="ro", mounts=(Mount("/srv", "/data", read_only=True),),
    expose=(".ssh",), env=("A=1", "B=x=y"), kernel="/boot/vmlinuz", virtualization=True, autostart=True,
    ssh_agent=False,
)  # fmt: skip

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
paths = names.map(lambda text: "/" + text)
boots = st.builds(
    BootConfig,
    cpus=st.none() | st.integers(1, 1024),
    memory=st.none() | st.integers(16 * MIB, 64 * GIB),
    disk=st.none() | st.integers(64 * MIB, 2**60),
    home_mount=st.sampled_from(["rw", "ro", "none"]),
    mounts=st.lists(st.builds(Mount, paths, st.just("/mnt/x"), st.booleans()), max_size=3).map(tuple),
    expose=st.lists(st.sampled_from([".ssh", ".config/gcloud", "/etc/x"]), max_size=2).map(tuple),
    env=st.lists(st.sampled_from(["A=1", "B=", "C=a=b\nc", "D=ü"]), max_size=3).map(tuple),
    kernel=st.none() | paths,
    virtualization=st.booleans(),
    autostart=st.booleans(),
    ssh_agent=st.booleans(),
)


def through_text(document: dict[str, object]) -> Any:
    return json.loads(json.dumps(document))


class TestFiles:
    def test_machine_config_round_trip(self) -> None:
        assert MachineConfig.from_json(through_text(CONFIG.to_json()), where="f") == CONFIG

    @given(boots)
    def test_boot_config_round_trip(self, boot: BootConfig) -> None:
        assert BootConfig.from_json(through_text(boot.to_json()), where="f") == boot

    def test_defaults_round_trip(self) -> None:
        assert BootConfig.from_json(through_text(BootConfig().to_json()), where="f") == BootConfig()

    def test_paths_that_are_no_utf8_survive(self) -> None:
        boot = dataclasses.replace(BOOT, mounts=(Mount(os.fsdecode(b"/srv/\xff"), "/data"),))
        assert BootConfig.from_json(through_text(boot.to_json()), where="f") == boot

    @pytest.mark.parametrize(
        ("member", "value"),
        [
            ("name", "Dev"), ("name", 3), ("id", "xyz"), ("id", None), ("image", []), ("image", {"reference": "x"}),
            ("image", {"reference": "", "digest": f"sha256:{'a' * 64}"}),
            ("image", {"reference": "x", "digest": "sha256:b"}),
            ("platform", "amd64"), ("isolation", "jail"), ("created", "yesterday"), ("user", None), ("user", {}),
            ("user", {**USER.to_json(), "uid": -1}), ("user", {**USER.to_json(), "uid": True}),
            ("user", {**USER.to_json(), "home": "home"}), ("user", {**USER.to_json(), "name": "a\0b"}),
        ],
    )  # fmt: skip
    def test_damaged_machine_config(self, member: str, value: object) -> None:
        document = through_text(CONFIG.to_json())
        document[member] = value
        with pytest.raises(StateFormatError, match=r"/config\.json") as caught:
            MachineConfig.from_json(document, where="/x/config.json")
        assert member in caught.value.message

    @pytest.mark.parametrize(
        ("member", "value"),
        [
            ("cpus", 0), ("cpus", "2"), ("cpus", True), ("cpus", 1.5), ("memory", 1), ("memory", "1G"), ("disk", -1),
            ("homeMount", "full"), ("homeMount", None), ("mounts", {}), ("mounts", ["/srv"]),
            ("mounts", [{"source": "/srv", "destination": "/proc", "readOnly": False}]),
            ("mounts", [{"source": "srv", "destination": "/srv", "readOnly": False}]),
            ("mounts", [{"source": "/srv", "destination": "/srv", "readOnly": 0}]),
            ("expose", ["../x"]), ("expose", [1]), ("expose", "x"), ("env", ["A"]), ("env", ["=1"]), ("env", None),
            ("kernel", "vmlinuz"), ("virtualization", 1), ("autostart", "no"), ("sshAgent", None),
        ],
    )  # fmt: skip
    def test_damaged_boot_config(self, member: str, value: object) -> None:
        document = through_text(BOOT.to_json())
        document[member] = value
        with pytest.raises(StateFormatError, match=r"/boot-config\.json") as caught:
            BootConfig.from_json(document, where="/x/boot-config.json")
        assert member in caught.value.message

    @pytest.mark.parametrize("member", list(BOOT.to_json()))
    def test_missing_member(self, member: str) -> None:
        document = BOOT.to_json()
        del document[member]
        with pytest.raises(StateFormatError, match=f"'{member}' is missing"):
            BootConfig.from_json(document, where="f")

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
        )
    )
    def test_garbage_is_refused_and_never_crashes(self, document: object) -> None:
        for kind in (BootConfig, MachineConfig, HostUser, Mount):
            with pytest.raises(StateFormatError):
                kind.from_json(document, where="f")

    @given(
        st.sampled_from(list(BOOT.to_json())),
        st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()),
    )
    def test_garbage_in_one_member(self, member: str, value: object) -> None:
        document = {**BOOT.to_json(), member: value}
        with contextlib.suppress(StateFormatError):
            assert BootConfig.from_json(document, where="f").to_json()[member] == value


class TestValues:
    @pytest.mark.parametrize(("text", "count"), [("1", 1), ("64", 64), ("1024", 1024)])
    def test_cpus(self, text: str, count: int) -> None:
        assert parse_cpus(text) == count

    @pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "1025", "٣", "9" * 5000, " 2"])
    def test_bad_cpus(self, text: str) -> None:
        with pytest.raises(InvalidArgumentError, match="invalid number of CPUs"):
            parse_cpus(text)

    def test_sizes(self) -> None:
        assert parse_memory("512M") == 512 * MIB
        assert parse_disk("1.5G") == 3 * GIB // 2

    @pytest.mark.parametrize("text", ["512", "0", "x", "", "1K", "99999T"])
    def test_bad_memory(self, text: str) -> None:
        with pytest.raises(InvalidArgumentError, match="invalid memory size") as caught:
            parse_memory(text)
        assert caught.value.hint

    def test_home_mount(self) -> None:
        assert [parse_home_mount(text) for text in ("rw", "ro", "none")] == ["rw", "ro", "none"]
        with pytest.raises(InvalidArgumentError, match="invalid home mount 'x'"):
            parse_home_mount("x")

    def test_boolean(self) -> None:
        assert all(parse_boolean(text) for text in ("true", "Yes", "on", "1"))
        assert not any(parse_boolean(text) for text in ("false", "NO", "off", "0"))
        with pytest.raises(InvalidArgumentError):
            parse_boolean("maybe")

    def test_platform(self) -> None:
        assert parse_platform("linux/amd64") == "linux/amd64"
        assert parse_platform("aarch64") == "linux/arm64"
        assert parse_platform("linux/x86_64") == "linux/amd64"
        for bad in ("", "linux/", "a b/c", "/arm64"):
            with pytest.raises(InvalidArgumentError):
                parse_platform(bad)

    def test_kernel(self, tmp_path: Path) -> None:
        (tmp_path / "vmlinuz").touch()
        assert parse_kernel(str(tmp_path / "vmlinuz")) == str(tmp_path / "vmlinuz")
        with pytest.raises(InvalidArgumentError):
            parse_kernel(str(tmp_path))

    def test_env(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HERE", "a=b")
        monkeypatch.delenv("GONE", raising=False)
        assert parse_env("A=1") == "A=1"
        assert parse_env("A=") == "A="
        assert parse_env("HERE") == "HERE=a=b"
        for bad in ("GONE", "=1", "", "A B=1", "A=\0"):
            with pytest.raises(InvalidArgumentError):
                parse_env(bad)
        assert check_env("A=x\ny") == "A=x\ny"

    @pytest.mark.parametrize(
        ("text", "path"),
        [
            (".ssh", ".ssh"), ("~/.ssh", ".ssh"), (".config//gcloud/", ".config/gcloud"), ("/etc/x/", "/etc/x"),
            ("./.aws", ".aws"),
        ],
    )  # fmt: skip
    def test_expose(self, text: str, path: str) -> None:
        assert check_expose(text) == path

    @pytest.mark.parametrize("text", ["", "/", ".", "..", "../x", "a/../b", "~/", "a\0"])
    def test_bad_expose(self, text: str) -> None:
        with pytest.raises(InvalidArgumentError):
            check_expose(text)


class TestMounts:
    def test_forms(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = tmp_path / "src"
        source.mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        here = str(source)
        assert parse_mount(here) == Mount(here, here)
        assert parse_mount("src") == Mount(here, here)
        assert parse_mount("~/src") == Mount(here, here)
        assert parse_mount("src/../src/:/data") == Mount(here, "/data")
        assert parse_mount("src:ro") == Mount(here, here, read_only=True)
        assert parse_mount("src:/data:ro") == Mount(here, "/data", read_only=True)
        assert parse_mount("src:/data/:rw") == Mount(here, "/data")

    def test_printed_as_it_is_read(self, tmp_path: Path) -> None:
        for text in (f"{tmp_path}", f"{tmp_path}:ro", f"{tmp_path}:/data", f"{tmp_path}:/data:ro"):
            assert str(parse_mount(text)) == text

    @pytest.mark.parametrize(
        "text",
        ["", ":", ":/data", "/nonexistent-berth", "/:ro", ".:data", ".:/", ".:/a:b", ".:/a:/b:ro", ".:/a/../etc"],
    )
    def test_refused(self, text: str) -> None:
        with pytest.raises(InvalidArgumentError, match="invalid mount") as caught:
            parse_mount(text)
        assert caught.value.hint

    @pytest.mark.parametrize(
        "path", ["/", "//", "/proc", "/proc/x", "/sys/fs", "/dev", "/dev/shm", "/run/berth", "/etc", "/usr/", "/lib"]
    )
    def test_the_machines_own_places(self, path: str) -> None:
        with pytest.raises(InvalidArgumentError, match="the machine needs that place itself"):
            check_mount_destination(path)

    @pytest.mark.parametrize(
        "path", ["/srv", "/tmp/x", "/home/ann", "/etc/ssl/own", "/devel", "/procs", "/usr/local/src"]
    )
    def test_allowed(self, path: str) -> None:
        assert check_mount_destination(path) == path


class TestAssignments:
    def test_scalars(self) -> None:
        boot, changes = apply_assignments(BootConfig(), ["cpus=2", "memory=8G", "home-mount=none", "autostart=on"])
        assert boot == BootConfig(cpus=2, memory=8 * GIB, home_mount="none", autostart=True)
        assert [(change.key, change.when) for change in changes] == [
            ("cpus", "restart"), ("memory", "restart"), ("home-mount", "restart"), ("autostart", "now"),
        ]  # fmt: skip

    def test_only_what_differs_is_a_change(self) -> None:
        boot, changes = apply_assignments(BootConfig(cpus=2), ["cpus=2", "cpus=3", "cpus=2", "env="])
        assert boot == BootConfig(cpus=2)
        assert changes == []

    def test_back_to_no_limit(self) -> None:
        assert apply_assignments(BootConfig(cpus=2, memory=GIB), ["cpus=", "memory="])[0] == BootConfig()

    def test_spelling_of_keys(self) -> None:
        assert apply_assignments(BootConfig(), ["Home_Mount=ro"])[0].home_mount == "ro"

    def test_list_adds_replaces_and_empties(self, tmp_path: Path) -> None:
        boot, _ = apply_assignments(BootConfig(), ["env=A=1", "env+=B=2", "env+=A=3"])
        assert boot.env == ("A=3", "B=2")
        assert apply_assignments(boot, ["env-=A"])[0].env == ("B=2",)
        assert apply_assignments(boot, ["env="])[0].env == ()
        boot, _ = apply_assignments(
            BootConfig(), [f"mount+={tmp_path}:/a", f"mount+={tmp_path}:/b", f"mount={tmp_path}:/a:ro"]
        )
        assert [str(mount) for mount in boot.mounts] == [f"{tmp_path}:/a:ro", f"{tmp_path}:/b"]
        assert apply_assignments(boot, ["mount-=/a"])[0].mounts == boot.mounts[1:]
        assert apply_assignments(boot, [f"mount-={tmp_path}"])[0].mounts == ()
        assert apply_assignments(BootConfig(), ["expose+=.ssh", "expose+=~/.ssh"])[0].expose == (".ssh",)

    def test_a_vanished_source_can_be_taken_away(self) -> None:
        boot = BootConfig(mounts=(Mount("/gone", "/data"),))
        assert apply_assignments(boot, ["mount-=/gone:/data"])[0] == BootConfig()

    def test_a_disk_only_grows(self) -> None:
        assert apply_assignments(BootConfig(disk=GIB), ["disk=2G"])[0].disk == 2 * GIB
        with pytest.raises(InvalidArgumentError, match="can only grow"):
            apply_assignments(BootConfig(disk=2 * GIB), ["disk=1G"])

    @pytest.mark.parametrize(
        "text", ["cpu=2", "cpus", "=2", "", "cpus+=2", "cpus-=1", "cpus=x", "memory=1", "mount=", "a b=1"]
    )
    def test_all_or_nothing(self, text: str) -> None:
        boot = BootConfig(mounts=(Mount("/srv", "/srv"),))
        if text == "mount=":
            assert apply_assignments(boot, ["cpus=2", text])[0] == BootConfig(cpus=2)
            return
        with pytest.raises(InvalidArgumentError, match="invalid") as caught:
            apply_assignments(boot, ["cpus=2", text])
        assert caught.value.hint
        assert caught.value.exit_status == 2

    @pytest.mark.parametrize("text", ["env-=A", "mount-=/x", "expose-=.ssh"])
    def test_what_is_not_there_cannot_be_taken_away(self, text: str) -> None:
        with pytest.raises(NotFoundError, match="not found"):
            apply_assignments(BootConfig(), [text])

    def test_value_may_hold_anything(self) -> None:
        assert apply_assignments(BootConfig(), ["env=A=x=y\n+=z"])[0].env == ("A=x=y\n+=z",)

    @given(st.lists(st.text(), max_size=3))
    def test_never_crashes(self, texts: list[str]) -> None:
        with contextlib.suppress(InvalidArgumentError, NotFoundError):
            apply_assignments(BootConfig(), texts)


def test_the_table_fits_the_configuration() -> None:
    fields = {field.name for field in dataclasses.fields(BootConfig)}
    assert {key.field for key in KEYS} == fields
    assert len({key.name for key in KEYS}) == len(KEYS)
    assert all(key.help[0].islower() and not key.help.endswith(".") for key in KEYS)


class TestHostUser:
    def test_current(self) -> None:
        user = HostUser.current()
        assert user.uid == os.getuid()
        assert user.gid == os.getgid()
        assert HostUser.from_json(through_text(user.to_json()), where="f") == user

    def test_unknown_to_the_user_database(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "getuid", lambda: 4242424)
        monkeypatch.setattr(os, "getgid", lambda: 4242424)
        monkeypatch.setenv("HOME", "relative")
        monkeypatch.setenv("SHELL", "/bin/zsh")
        assert HostUser.current() == HostUser(
            "user4242424", 4242424, 4242424, "user4242424", "/home/user4242424", "/bin/zsh"
        )
