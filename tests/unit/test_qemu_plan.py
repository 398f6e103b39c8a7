"""How QEMU is started, against golden files: a change of it is to be seen in a diff."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from pathlib import Path

import pytest

from berth.engine.qemu.plan import (
    MAX_SHARES,
    Nic,
    Share,
    UserNetwork,
    Vm,
    kernel_command_line,
    qemu_command,
    qemu_program,
    reader_command,
)
from berth.units import GIB, MIB
from qemuplans import CASES, READER

_GOLDEN = Path(__file__).parents[1] / "golden"


def rows(argv: tuple[str, ...]) -> str:
    """Write an option and its value on one line."""
    lines: list[str] = []
    for word in argv:
        if word.startswith("-") or not lines or " " in lines[-1] or not lines[-1].startswith("-"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_the_command_is_the_golden_one(case: str) -> None:
    check_golden(case, rows(qemu_command(CASES[case])))


def check_golden(case: str, text: str) -> None:
    golden = _GOLDEN / f"qemu-{case}.txt"
    if os.environ.get("BERTH_TEST_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("case", CASES)
def test_every_descriptor_that_is_named_is_inherited_and_no_other(case: str) -> None:
    vm = CASES[case]
    text = " ".join(qemu_command(vm)).replace(vm.cmdline, "")
    named = [int(number) for number in re.findall(r"(?:\bfd=|/proc/self/fd/|addr\.str=)(\d+)", text)]
    assert sorted(named) == sorted(vm.inherited_fds)
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("case", CASES)
def test_no_two_things_have_one_name_or_place(case: str) -> None:
    text = " ".join(qemu_command(CASES[case]))
    for pattern in (r"\bid=([\w-]+)", r"node-name=([\w-]+)", r"\baddr=([0-9a-f.]+)", r"\bset=(\d+)"):
        found = re.findall(pattern, text)
        assert len(set(found)) == len(found), pattern


@pytest.mark.parametrize("case", CASES)
def test_qemu_is_given_no_path_and_no_listener(case: str) -> None:
    vm = CASES[case]
    text = " ".join(qemu_command(vm)).replace(vm.cmdline, "")
    paths = [
        path for path in re.findall(r"/[a-z][\w/]*", text) if not path.startswith(("/proc/self/fd/", "/dev/fdset/"))
    ]
    assert [path for path in paths if path != "/22"] == []
    for word in ("tcp:", "vnc", "hostfwd", "gdb", "path=/tmp"):
        assert word not in text


def test_a_reader_has_three_disks_and_no_way_out() -> None:
    text = rows(reader_command(READER))
    check_golden("reader", text)
    named = [int(number) for number in re.findall(r"(?:\bfd=|/proc/self/fd/)(\d+)", text)]
    assert sorted(named) == sorted(READER.inherited_fds)
    for word in ("netdev", "virtio-net", "virtiofs", "9p", "socket,", "-mon "):
        assert word not in text.replace(READER.cmdline, "")
    for pattern in (r"\bid=([\w-]+)", r"node-name=([\w-]+)", r"\baddr=([0-9a-f.]+)", r"\bset=(\d+)"):
        found = re.findall(pattern, text)
        assert len(set(found)) == len(found), pattern


BASE = CASES["amd64-tcg-user"]


def word_after(vm: Vm, option: str) -> str:
    argv = qemu_command(vm)
    return argv[argv.index(option) + 1]


@pytest.mark.parametrize(
    ("arch", "accel", "virtualization", "processor"),
    [
        ("amd64", "kvm", False, "host,vmx=off,svm=off"),
        ("amd64", "kvm", True, "host"),
        ("amd64", "tcg", False, "max,erms=off,fsrm=off,vmx=off,svm=off"),
        ("arm64", "kvm", False, "host"),
        ("arm64", "tcg", False, "max,pauth=off"),
    ],
)
def test_the_processor(arch: str, accel: str, virtualization: bool, processor: str) -> None:
    vm = dataclasses.replace(BASE, arch=arch, accel=accel, virtualization=virtualization)  # type: ignore[arg-type]
    assert word_after(vm, "-cpu") == processor


@pytest.mark.parametrize(
    ("arch", "host_arch", "threads"),
    [
        ("amd64", "amd64", "multi"),
        ("arm64", "arm64", "multi"),
        ("arm64", "amd64", "multi"),
        ("amd64", "arm64", "single"),
    ],
)
def test_threads_only_where_the_hosts_memory_is_ordered_enough(arch: str, host_arch: str, threads: str) -> None:
    vm = dataclasses.replace(BASE, arch=arch, host_arch=host_arch)  # type: ignore[arg-type]
    assert f"thread={threads}," in word_after(vm, "-accel")


@pytest.mark.parametrize(
    ("is_pvh", "has_qboot", "arch", "uses"),
    [
        (True, True, "amd64", True),
        (True, False, "amd64", False),
        (False, True, "amd64", False),
        (True, True, "arm64", False),
    ],
)
def test_qboot_is_for_uncompressed_kernels(is_pvh: bool, has_qboot: bool, arch: str, uses: bool) -> None:
    vm = dataclasses.replace(BASE, kernel_is_pvh=is_pvh, has_qboot=has_qboot, arch=arch)  # type: ignore[arg-type]
    assert ("-bios" in qemu_command(vm)) == uses


def test_memory_is_in_whole_mebibytes() -> None:
    vm = dataclasses.replace(BASE, memory=GIB + MIB - 1)
    assert word_after(vm, "-m") == "1024M"
    assert "size=1024M," in word_after(vm, "-object")


@pytest.mark.parametrize(("cpus", "queues"), [(1, 1), (3, 3), (64, 4)])
def test_disk_queues_follow_the_cpus(cpus: int, queues: int) -> None:
    text = " ".join(qemu_command(dataclasses.replace(BASE, cpus=cpus)))
    assert f"serial=root,num-queues={queues}," in text


def test_as_many_shares_as_fit_have_places_of_their_own() -> None:
    numbers = itertools.count(100)
    shares = tuple(Share(f"share{number}", next(numbers)) for number in range(MAX_SHARES))
    text = " ".join(qemu_command(dataclasses.replace(BASE, shares=shares)))
    places = re.findall(r"\baddr=([0-9a-f]{2}\.[0-7])\b", text)
    assert len(set(places)) == len(places)
    assert max(places) == "1e.7"


def test_nothing_that_is_not_there() -> None:
    vm = dataclasses.replace(BASE, nic=None, modules_fd=None, shares=())
    text = " ".join(qemu_command(vm))
    assert "-netdev" not in text
    assert "virtio-net" not in text
    assert "modules" not in text


@pytest.mark.parametrize("nic", [Nic("02::1", "tap"), Nic("02::1", "stream"), Nic("02::1", "user")])
def test_half_a_network_interface_is_a_mistake(nic: Nic) -> None:
    with pytest.raises(TypeError, match="not a network interface"):
        qemu_command(dataclasses.replace(BASE, nic=nic))


def test_the_user_network_has_the_machines_addresses() -> None:
    nic = Nic("02::1", "user", user=UserNetwork("10.209.0.0/22", "10.209.0.1", "10.209.0.3"))
    argv = qemu_command(dataclasses.replace(BASE, nic=nic))
    assert "user,id=net,ipv6=off,net=10.209.0.0/22,host=10.209.0.1,dns=10.209.0.3" in argv


def test_the_kernels_arguments() -> None:
    assert kernel_command_line("amd64", "kvm") == (
        "console=ttyS0 console=hvc0 quiet loglevel=3 panic=-1 random.trust_cpu=on cryptomgr.notests "
        "systemd.getty_auto=no systemd.show_status=yes net.ifnames=0 tsc=reliable no_timer_check"
    )
    assert kernel_command_line("amd64", "tcg").endswith(" mitigations=off")
    arm = kernel_command_line("arm64", "tcg")
    assert arm.startswith("console=ttyAMA0 console=hvc0 ")
    assert "tsc" not in arm


def test_each_architecture_has_its_program() -> None:
    assert (qemu_program("amd64"), qemu_program("arm64")) == ("qemu-system-x86_64", "qemu-system-aarch64")
