"""What carries VMs: the words for each case, what is kept, and the tiny guest program. No QEMU is started here."""

from __future__ import annotations

import fcntl
import getpass
import os
import stat
from pathlib import Path

import pytest

from berth import files, host
from berth.engine.qemu import accel
from berth.engine.qemu.accel import Accelerator, probe
from berth.errors import InvalidArgumentError
from berth.layout import Layout

WORKS = accel.Verdict(True, "KVM runs guest code")
SLOW = accel.Verdict(False, "too slow")


@pytest.fixture(autouse=True)
def amd64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "architecture", lambda: "amd64")
    monkeypatch.delenv("BERTH_ACCEL", raising=False)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "data", tmp_path / "run", tmp_path / "config", tmp_path / "cache")


@pytest.fixture
def kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /dev/kvm that opens and speaks our version, and a QEMU."""
    device = tmp_path / "kvm"
    device.touch(0o600)
    program = tmp_path / "qemu"
    program.write_text("7.2")
    monkeypatch.setattr(accel, "KVM", device)
    monkeypatch.setattr(fcntl, "ioctl", lambda _fd, _request: 12)
    monkeypatch.setattr(accel, "require_qemu", lambda _arch: program)
    return device


class Guest:
    """Stands for the run of the guest program; counts its runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, verdict: accel.Verdict) -> None:
        self.runs = 0
        self.verdict = verdict
        monkeypatch.setattr(accel, "run_guest", self._run)

    def _run(self, _program: Path, _arch: str) -> accel.Verdict:
        self.runs += 1
        return self.verdict


def test_a_foreign_architecture_is_emulated(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERTH_ACCEL", "kvm")
    found = probe(layout, "arm64")
    assert (found.kind, found.reason) == ("tcg", "this amd64 host can only emulate arm64")


@pytest.mark.parametrize("kind", ["kvm", "tcg"])
def test_the_environment_is_believed(layout: Layout, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("BERTH_ACCEL", kind)
    monkeypatch.setattr(accel, "KVM", Path("/nonexistent"))
    assert probe(layout, "amd64").kind == kind


def test_the_environment_must_make_sense(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERTH_ACCEL", "hvf")
    with pytest.raises(InvalidArgumentError, match="BERTH_ACCEL is 'hvf'"):
        probe(layout, "amd64")


def test_no_device(layout: Layout, kvm: Path) -> None:
    kvm.unlink()
    found = probe(layout, "amd64")
    assert (found.kind, found.reason) == ("tcg", f"there is no {kvm}")
    assert "firmware" in (found.hint or "")
    assert not found.nested


@pytest.mark.parametrize(
    ("uid", "mode", "gid", "hint"),
    [
        (1000, 0o660, 4_000_000, "sudo usermod -aG 4000000 ann  # then log in again"),
        (1000, 0o600, 4_000_000, "sudo chmod 0666 KVM"), (1000, 0o660, 0, "sudo chmod 0666 KVM"), (0, 0o660, 0, None),
    ],
)  # fmt: skip
def test_no_permission(
    layout: Layout, kvm: Path, monkeypatch: pytest.MonkeyPatch, uid: int, mode: int, gid: int, hint: str | None
) -> None:
    monkeypatch.setattr(Path, "stat", lambda _self: os.stat_result((stat.S_IFCHR | mode, 0, 0, 1, 0, gid, 0, 0, 0, 0)))

    def refuse(_path: object, _flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(getpass, "getuser", lambda: "ann")
    assert probe(layout, "amd64") == Accelerator(
        "tcg",
        f"this user may not open {kvm}",
        hint and hint.replace("KVM", str(kvm)),
        nested_reason="VMs are emulated in software here",
    )


def test_something_else_than_kvm(layout: Layout, kvm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del kvm
    monkeypatch.undo()
    monkeypatch.setattr(host, "architecture", lambda: "amd64")
    monkeypatch.setattr(accel, "KVM", Path("/dev/null"))
    assert probe(layout, "amd64").reason == "/dev/null is not KVM: ENOTTY"


def test_another_version(layout: Layout, kvm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda _fd, _request: 13)
    assert probe(layout, "amd64").reason == f"{kvm} speaks version 13, not 12"


@pytest.mark.parametrize(("verdict", "kind"), [(WORKS, "kvm"), (SLOW, "tcg")])
def test_it_is_found_out_once(
    layout: Layout, kvm: Path, monkeypatch: pytest.MonkeyPatch, verdict: accel.Verdict, kind: str
) -> None:
    del kvm
    guest = Guest(monkeypatch, verdict)
    first, second = probe(layout, "amd64"), probe(layout, "amd64")
    assert first == second
    assert (first.kind, first.reason, guest.runs) == (kind, verdict.reason, 1)
    probe(layout, "amd64", fresh=True)
    assert guest.runs == 2


@pytest.mark.parametrize("change", ["boot", "device", "qemu"])
def test_it_is_found_out_again_when_something_changed(
    layout: Layout, kvm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    guest = Guest(monkeypatch, SLOW)
    probe(layout, "amd64")
    if change == "boot":
        (tmp_path / "boot").write_text("another\n")
        monkeypatch.setattr(accel, "_BOOT_ID", tmp_path / "boot")
    elif change == "device":
        kvm.chmod(0o666)
    else:
        (tmp_path / "qemu").write_text("10.0.2")
    guest.verdict = WORKS
    assert probe(layout, "amd64").kind == "kvm"
    assert guest.runs == 2


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"schema": 1}', '{"schema": 2, "works": true}', "\udcff",
        '{"schema": 1, "key": {}, "works": true, "reason": "x"}', '{"schema": 1, "key": 7, "works": "yes"}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_ignored_and_replaced(
    layout: Layout, kvm: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    del kvm
    layout.cache.mkdir(mode=0o700)
    layout.accelerators.write_bytes(os.fsencode(text))
    guest = Guest(monkeypatch, SLOW)
    assert probe(layout, "amd64").kind == "tcg"
    assert files.load_json(layout.accelerators, schema=accel.SCHEMA)["works"] is False
    probe(layout, "amd64")
    assert guest.runs == 1


def test_where_nothing_can_be_kept_it_is_found_out_each_time(
    layout: Layout, kvm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del kvm
    layout.cache.write_text("a file where the folder should be")
    guest = Guest(monkeypatch, WORKS)
    assert [probe(layout, "amd64").kind for _ in range(2)] == ["kvm", "kvm"]
    assert guest.runs == 2


@pytest.mark.parametrize(
    ("text", "nested", "reason"),
    [("Y", True, ""), ("1", True, ""), ("N", False, "forbids it"), (None, False, "neither kvm_intel nor kvm_amd")],
)
def test_nested_virtualization_is_the_modules_to_allow(
    layout: Layout,
    kvm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str | None,
    nested: bool,
    reason: str,
) -> None:
    del kvm
    Guest(monkeypatch, WORKS)
    if text is not None:
        (tmp_path / "nested").write_text(f"{text}\n")
    monkeypatch.setattr(accel, "NESTED", (tmp_path / "absent", tmp_path / "nested"))
    found = probe(layout, "amd64")
    assert found.nested == nested
    assert reason in found.nested_reason


@pytest.mark.parametrize(
    ("status", "said", "works", "words"),
    [
        (0x21, b"B", True, "KVM runs guest code"),
        (0x21, b"", False, "status 33"),  # something else ended it so
        (0, b"", False, "status 0"),  # a triple fault
        (0, b"B", False, "status 0"),
        (1, b"x: warning: y\nqemu: error: failed to set MSR 0x10a\n", False, "failed to set MSR 0x10a"),
        (-6, b"\xff\xfe", False, "status -6"),
        (None, b"B", False, "far too slowly"),
        (None, b"", False, "does not run on it"),
    ],
)
def test_the_verdict(status: int | None, said: bytes, works: bool, words: str) -> None:
    verdict = accel._judge("amd64", status, said, is_dead=True)
    assert verdict.works == works
    assert words in verdict.reason


def test_what_can_not_be_killed_is_said() -> None:
    assert "can't be killed" in accel._judge("amd64", None, b"B", is_dead=False).reason


def test_the_programs_are_what_their_machines_load() -> None:
    firmware = accel.guest_program("amd64")
    assert len(firmware) == 0x10000  # PCs map firmware in blocks of 64 KiB
    assert firmware[0xFFF0:0xFFF5] == b"\xea\x00\xff\x00\xf0"  # jmp far f000:ff00
    assert firmware[0xFF00] == 0xFA
    # The far jump leads behind itself.
    jump = firmware.index(b"\x66\xea")
    assert int.from_bytes(firmware[jump + 2 : jump + 6], "little") == 0xF0000 + jump + 8
    assert len(accel.guest_program("arm64")) % 4 == 0
