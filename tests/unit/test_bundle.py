"""Bundles on disk: transactions, locks, and what happens to damaged ones."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import stat
import threading
from pathlib import Path

import pytest

from berth import bundle as bundles
from berth.bundle import Bundle
from berth.config import BootConfig, HostUser, MachineConfig
from berth.errors import ExistsError, NotFoundError, StateFormatError
from berth.layout import Layout
from berth.lifecycle import Machines
from berth.names import MachineName

DEV = MachineName("dev")
TEST = MachineName("test")


def config(name: str = "dev") -> MachineConfig:
    return MachineConfig(
        name=MachineName(name), id="0" * 32, image_reference="debian:12", image_digest=f"sha256:{'a' * 64}",
        platform="linux/amd64", isolation="container", created="2026-11-22T14:16:00Z",
        user=HostUser("ann", 1000, 1000, "ann", "/home/ann", "/bin/bash"),
    )  # fmt: skip


def make(layout: Layout, name: str = "dev", boot: BootConfig | None = None) -> Bundle:
    with bundles.create(layout, config(name), boot or BootConfig()):
        pass
    return Bundle(layout, MachineName(name))


def entries(layout: Layout) -> list[str]:
    return sorted(os.listdir(layout.machines))


class TestCreate:
    def test_a_bundle_is_there_when_the_block_has_ended(self, layout: Layout) -> None:
        bundle = Bundle(layout, DEV)
        with bundles.create(layout, config(), BootConfig(cpus=2)) as partial:
            assert not bundle.exists()
            (partial / "container/upper/mark").touch()
        assert bundle.load() == config()
        assert bundle.load_boot() == BootConfig(cpus=2)
        assert (bundle.upper / "mark").exists()
        assert entries(layout) == ["dev"]

    def test_modes(self, layout: Layout) -> None:
        old = os.umask(0o077)
        try:
            bundle = make(layout)
        finally:
            os.umask(old)
        assert stat.S_IMODE(bundle.path.stat().st_mode) == 0o700
        assert stat.S_IMODE(bundle.upper.stat().st_mode) == 0o755
        assert stat.S_IMODE((bundle.path / "config.json").stat().st_mode) == 0o600

    def test_name_taken(self, layout: Layout) -> None:
        make(layout, boot=BootConfig(cpus=2))
        with pytest.raises(ExistsError, match="machine 'dev' already exists"):
            make(layout)
        assert Bundle(layout, DEV).load_boot().cpus == 2

    def test_name_taken_while_it_was_made(self, layout: Layout) -> None:
        with pytest.raises(ExistsError), bundles.create(layout, config(), BootConfig(cpus=1)):
            make(layout, boot=BootConfig(cpus=2))
        assert Bundle(layout, DEV).load_boot().cpus == 2
        assert entries(layout) == ["dev"]

    def test_failure_leaves_nothing(self, layout: Layout) -> None:
        with pytest.raises(KeyboardInterrupt), bundles.create(layout, config(), BootConfig()):
            raise KeyboardInterrupt
        assert entries(layout) == []

    def test_failure_with_content_goes_to_the_trash(self, layout: Layout) -> None:
        def fail() -> None:
            with bundles.create(layout, config(), BootConfig()) as partial:
                (partial / "container/upper/file").touch()
                raise OSError(28, "full")

        with pytest.raises(OSError, match="full"):
            fail()
        assert [path.name.rpartition("-")[0] for path in bundles.trash(layout)] == [".trash-dev"]
        assert bundles.list_bundles(layout) == []

    def test_what_a_killed_create_left_is_swept(self, layout: Layout) -> None:
        child = multiprocessing.get_context("fork").Process(target=_die_while_creating, args=(layout,))
        child.start()
        child.join()
        assert any(".partial-" in name for name in entries(layout))
        make(layout)
        assert [name for name in entries(layout) if not name.startswith(".")] == ["dev"]

    def test_a_living_create_is_not_swept(self, layout: Layout) -> None:
        with bundles.create(layout, config(), BootConfig()):
            make(layout, "test")
            assert bundles.trash(layout) == []
        assert entries(layout) == ["dev", "test"]

    def test_a_throw_away_machine_is_read_like_any_other(self, layout: Layout) -> None:
        make(layout, ".adapt-0a1b2c3d")
        (hidden,) = bundles.list_hidden(layout)
        assert (hidden.problem, hidden.config) == (None, config(".adapt-0a1b2c3d"))
        assert bundles.list_bundles(layout) == []

    def test_many_at_once_one_wins(self, layout: Layout) -> None:
        results: list[str] = []

        def attempt(cpus: int) -> None:
            try:
                make(layout, boot=BootConfig(cpus=cpus))
                results.append("made")
            except ExistsError:
                results.append("taken")

        threads = [threading.Thread(target=attempt, args=(number,)) for number in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == ["made", *["taken"] * 7]
        assert entries(layout) == ["dev"]


def _die_while_creating(layout: Layout) -> None:
    with bundles.create(layout, config(), BootConfig()):
        os._exit(1)


class TestDelete:
    def test_the_name_goes_at_once(self, layout: Layout) -> None:
        make(layout)
        trash = bundles.delete(layout, DEV)
        assert not Bundle(layout, DEV).exists()
        assert bundles.trash(layout) == [trash]
        assert (trash / "config.json").exists()
        make(layout)

    def test_not_there(self, layout: Layout) -> None:
        with pytest.raises(NotFoundError, match="machine 'dev' not found"):
            bundles.delete(layout, DEV)

    def test_who_has_no_default_is_told_how_to_choose(self, layout: Layout) -> None:
        with pytest.raises(NotFoundError, match="no default machine found") as caught:
            Machines(layout).resolve(None)
        assert caught.value.hint == "berth create debian:12 --name dev"
        make(layout, "test")
        with pytest.raises(NotFoundError) as caught:
            Machines(layout).resolve(None)
        assert caught.value.hint == "berth set-default test"

    def test_the_default_is_forgotten(self, layout: Layout) -> None:
        make(layout)
        make(layout, "test")
        bundles.set_default(layout, DEV)
        bundles.delete(layout, TEST)
        assert bundles.find_default(layout) == DEV
        bundles.delete(layout, DEV)
        assert not layout.default_machine.exists()

    def test_a_file_in_a_bundles_place(self, layout: Layout) -> None:
        make(layout)
        (layout.machines / "odd").write_text("garbage")
        bundles.delete(layout, MachineName("odd"))
        assert [listed.name for listed in bundles.list_bundles(layout)] == ["dev"]


class TestEdit:
    def test_save(self, layout: Layout) -> None:
        bundle = make(layout)
        with bundle.edit() as lock:
            bundle.save_boot(lock, BootConfig(cpus=4))
        assert bundle.load_boot() == BootConfig(cpus=4)

    def test_another_bundles_lock_is_no_proof(self, layout: Layout) -> None:
        bundle, other = make(layout), make(layout, "test")
        with other.edit() as lock, pytest.raises(AssertionError):
            bundle.save_boot(lock, BootConfig())

    def test_not_there(self, layout: Layout) -> None:
        make(layout)
        with pytest.raises(NotFoundError), Bundle(layout, TEST).edit():
            pass

    def test_no_update_is_lost(self, layout: Layout) -> None:
        bundle = make(layout, boot=BootConfig(cpus=1))

        def grow() -> None:
            for _ in range(5):
                with bundle.edit() as lock:
                    boot = bundle.load_boot()
                    bundle.save_boot(lock, dataclasses.replace(boot, cpus=(boot.cpus or 0) + 1))

        threads = [threading.Thread(target=grow) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bundle.load_boot().cpus == 21
        assert not [name for name in os.listdir(bundle.path) if "partial" in name]


class TestDamage:
    def test_each_kind_is_listed_with_its_problem(self, layout: Layout) -> None:
        make(layout, "good")
        damaged = {
            "b-empty": b"", "b-bytes": bytes(range(256)), "b-list": b"[]", "b-deep": b"[" * 100_000,
            "b-member": b'{"schema": 1, "name": 7}', "b-schema": b'{"name": "x"}',
        }  # fmt: skip
        for name, data in damaged.items():
            (make(layout, name).path / "config.json").write_bytes(data)
        (make(layout, "b-boot").path / "boot-config.json").write_bytes(b"{")
        (make(layout, "b-gone").path / "config.json").unlink()
        (layout.machines / "b-file").write_text("x")
        (layout.machines / "b-hollow").mkdir()
        make(layout, "b-other").path.rename(layout.machines / "b-renamed")
        listed = {item.name: item for item in bundles.list_bundles(layout)}
        assert sorted(listed) == sorted(["good", *damaged, "b-boot", "b-gone", "b-file", "b-hollow", "b-renamed"])
        for name, item in listed.items():
            assert (item.problem is None) == (name == "good"), name
            if item.problem is not None:
                assert str(layout.machines / name) in item.problem.message
                assert "\n" not in item.problem.message
        assert listed[MachineName("b-boot")].config is not None

    def test_a_newer_berth_wrote_it(self, layout: Layout) -> None:
        bundle = make(layout)
        document = json.loads((bundle.path / "config.json").read_text())
        (bundle.path / "config.json").write_text(json.dumps({**document, "schema": 99, "new": True}))
        with pytest.raises(StateFormatError, match="written by a newer berth") as caught:
            bundle.load()
        assert caught.value.hint == "upgrade berth"

    def test_unreadable(self, layout: Layout) -> None:
        bundle = make(layout)
        (bundle.path / "config.json").unlink()
        (bundle.path / "config.json").mkdir()
        with pytest.raises(StateFormatError, match="can't be read"):
            bundle.load()

    def test_no_machines_at_all(self, layout: Layout) -> None:
        assert bundles.list_bundles(layout) == []
        with pytest.raises(NotFoundError, match="machine 'dev' not found"):
            Bundle(layout, DEV).load()

    def test_stray_files_are_no_machines(self, layout: Layout) -> None:
        make(layout)
        for name in ("Notes.txt", ".hidden", "dev.partial-00000000", "x" * 64):
            (layout.machines / name).mkdir()
        assert [item.name for item in bundles.list_bundles(layout)] == ["dev"]


class TestDefault:
    def test_set_and_find(self, layout: Layout) -> None:
        assert bundles.find_default(layout) is None
        make(layout)
        make(layout, "test")
        bundles.set_default_if_none(layout, DEV)
        bundles.set_default_if_none(layout, TEST)
        assert bundles.find_default(layout) == DEV
        bundles.set_default(layout, TEST)
        assert bundles.find_default(layout) == TEST

    def test_machine_not_found(self, layout: Layout) -> None:
        with pytest.raises(NotFoundError):
            bundles.set_default(layout, DEV)

    @pytest.mark.parametrize("content", [b"", b"\xff\xff", b"../../etc", b"gone\n", b"x" * 100_000])
    def test_garbage_is_no_default(self, layout: Layout, content: bytes) -> None:
        make(layout)
        Path(layout.default_machine).write_bytes(content)
        assert bundles.find_default(layout) is None
        bundles.set_default_if_none(layout, DEV)
        assert bundles.find_default(layout) == DEV

    def test_a_default_whose_deletion_was_killed_is_none(self, layout: Layout) -> None:
        bundles.set_default(layout, make(layout, "dev").name)
        layout.bundle(DEV).rename(layout.machines / ".trash-dev-00000000")
        assert bundles.find_default(layout) is None
        assert [path.name for path in bundles.trash(layout)] == [".trash-dev-00000000"]
        assert not layout.default_machine.exists()
