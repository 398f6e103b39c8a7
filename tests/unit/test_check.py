"""`system check`: the judgements on real text and made-up hosts, and one true run on this host."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from pathlib import Path

import pytest

from berth import check
from berth.check import cgroups, kernel, packages, tools, users, vm
from berth.check.model import Check, Place
from berth.engine.qemu import accel
from berth.engine.qemu.accel import Accelerator
from berth.engine.qemu.plan import qemu_program
from berth.engine.qemu.virtiofsd import Virtiofsd
from berth.errors import BerthError, UnsupportedError
from berth.host import Host
from berth.layout import Layout
from berth.userns import next_free_range

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
UNIFIED = "24 22 0:21 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def host(distribution: str = "debian", like: tuple[str, ...] = (), version: str = "12") -> Host:
    return Host("linux", "amd64", (6, 1), "6.1.0", distribution, like, version, "A Distribution", None)


def place(tmp_path: Path, uid: int = 1000, distribution: Host | None = None) -> Place:
    roots = (tmp_path / "data", tmp_path / "run", tmp_path / "config", tmp_path / "cache")
    return Place(distribution or host(), uid, uid, "me" if uid else "root", Layout(*roots))


def test_this_host_is_checked_whole_and_quickly(layout: Layout) -> None:
    start = time.monotonic()
    found = check.run_checks(layout)
    assert time.monotonic() - start < 10
    names = [entry.name for entry in found]
    assert len(names) == len(set(names))
    assert {
        "kernel",
        "user-namespaces",
        "overlayfs",
        "cgroups",
        "subuid",
        "crun",
        "pasta",
        "tun",
        "kvm",
        "qemu",
    } <= set(names)
    for entry in found:
        assert entry.status in ("ok", "warning", "missing")
        assert entry.detail
        assert entry.affects
        assert "could not be checked" not in entry.detail, entry


def test_a_check_that_fails_is_a_warning_not_a_crash(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_this_thing(_place: Place) -> Check:
        raise BerthError("it broke")

    monkeypatch.setattr(check, "_PROBES", (check_this_thing,))
    (entry,) = check.run_checks(layout)
    assert (entry.name, entry.status) == ("this-thing", "warning")
    assert "it broke" in entry.detail


def test_a_check_can_be_shown_as_json() -> None:
    entry = Check("a", "ok", "1", "detail", "affects", None)
    keys = {"name", "status", "version", "detail", "affects", "fix", "required", "optional"}
    assert set(dataclasses.asdict(entry)) == keys


@pytest.mark.parametrize(
    ("distribution", "command"),
    [
        (host("debian"), "sudo apt-get install uidmap"),
        (host("ubuntu", ("debian",), "24.04"), "sudo apt-get install uidmap"),
        (host("linuxmint", ("ubuntu", "debian")), "sudo apt-get install uidmap"),
        (host("fedora"), "sudo dnf install shadow-utils"),
        (host("rocky", ("rhel", "centos", "fedora")), "sudo dnf install shadow-utils"),
        (host("arch"), "sudo pacman -S shadow"),
        (host("opensuse-leap", ("suse", "opensuse")), "sudo zypper install shadow"),
        (host("plan9"), None),
    ],
)
def test_the_install_command_is_the_distributions(tmp_path: Path, distribution: Host, command: str | None) -> None:
    assert packages.install_command("newuidmap", place(tmp_path, distribution=distribution)) == command


def test_root_types_no_sudo(tmp_path: Path) -> None:
    assert packages.install_command("crun", place(tmp_path, uid=0)) == "apt-get install crun"
    assert place(tmp_path, uid=0).set_sysctl("a.b_c", 1) == (
        "echo 'a.b_c = 1' | tee /etc/sysctl.d/60-berth-b-c.conf && sysctl -p /etc/sysctl.d/60-berth-b-c.conf"
    )


@pytest.mark.parametrize(
    ("distribution", "version", "package"),
    [
        ("debian", "12", "qemu-system-common"), ("debian", "13", "virtiofsd"), ("debian", "", "virtiofsd"),
        ("ubuntu", "22.04", "qemu-system-common"), ("ubuntu", "24.04", "virtiofsd"),
    ],
)  # fmt: skip
def test_virtiofsd_moved(tmp_path: Path, distribution: str, version: str, package: str) -> None:
    where = place(tmp_path, distribution=host(distribution, (), version))
    assert packages.install_command("virtiofsd", where) == f"sudo apt-get install {package}"


def test_every_program_that_is_checked_has_a_package() -> None:
    listed = {row.program for row in packages.rows()}
    assert {tool.program for tool in tools._TOOLS} <= listed
    programs = {qemu_program("amd64"), qemu_program("arm64"), "qemu-img", "mke2fs", "virtiofsd"}
    assert programs <= listed


def test_a_missing_tool(tmp_path: Path) -> None:
    tool = tools.Tool("no-such-program", "--version", "nothing works", required=True)
    entry = tools.check_tool(tool, place(tmp_path))
    assert (entry.status, entry.version, entry.required) == ("missing", None, True)


def test_a_tool_that_only_the_other_kind_of_user_needs_is_not_missing(tmp_path: Path) -> None:
    tool = tools.Tool("no-such-program", "--version", "nothing works", needed_by="user")
    assert tools.check_tool(tool, place(tmp_path, uid=0)).status == "ok"
    assert tools.check_tool(tool, place(tmp_path, uid=1000)).status == "missing"


def fake_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> tools.Tool:
    path = tmp_path / "bin/fake-tool"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    return tools.Tool("fake-tool", "--version", "nothing works", minimum=(1, 5))


@pytest.mark.parametrize(
    ("script", "status", "version"),
    [
        ("echo fake-tool version 1.8.1", "ok", "1.8.1"),
        ("echo fake-tool version 1.4.5", "warning", "1.4.5"),
        ("echo unknown version", "ok", None),
        ("echo fake-tool 2.0 >&2; exit 3", "ok", "2.0"),
    ],
)
def test_a_tools_version_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: str, version: str | None
) -> None:
    entry = tools.check_tool(fake_tool(tmp_path, monkeypatch, script), place(tmp_path))
    assert (entry.status, entry.version) == (status, version)


def test_a_tool_that_can_not_start_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = fake_tool(tmp_path, monkeypatch, "")
    (tmp_path / "bin/fake-tool").write_text("#!/no/such/interpreter\n")
    assert tools.check_tool(tool, place(tmp_path)).status == "warning"


@pytest.mark.parametrize(
    ("mountinfo", "layout", "unified", "legacy"),
    [
        (HYBRID, "hybrid", "/sys/fs/cgroup/unified", {"cpu", "memory", "pids"}),
        (UNIFIED, "v2", "/sys/fs/cgroup", set[str]()),
        (HYBRID.replace("cgroup2", "tmpfs"), "v1", None, {"cpu", "memory", "pids"}),
        ("", "none", None, set[str]()),
        ("garbage\n1 2 3 - x\n- - -\n", "none", None, set[str]()),
    ],
)
def test_control_group_mounts(mountinfo: str, layout: str, unified: str | None, legacy: set[str]) -> None:
    mounts = cgroups.parse_mounts(mountinfo)
    assert mounts.layout == layout
    assert mounts.unified == (Path(unified) if unified else None)
    assert set(mounts.legacy) == legacy


def test_our_own_control_group() -> None:
    assert cgroups.parse_own("9:name=systemd:/\n4:memory:/x\n0::/user.slice/a b\n") == "/user.slice/a b"
    assert cgroups.parse_own("4:memory:/x\n") is None


def groups(
    *, writable: bool = False, manager: bool = False, controllers: str = "", mountinfo: str = UNIFIED
) -> cgroups.Groups:
    mounts = cgroups.parse_mounts(mountinfo)
    return cgroups.Groups(mounts, mounts.unified, writable, manager, frozenset(controllers.split()))


@pytest.mark.parametrize(
    ("uid", "found", "status"),
    [
        (0, groups(), "ok"),
        (0, groups(mountinfo=HYBRID), "ok"),
        (1000, groups(manager=True), "ok"),
        (1000, groups(writable=True), "ok"),
        (1000, groups(), "missing"),
        (1000, groups(mountinfo=HYBRID), "missing"),
        (1000, groups(mountinfo=""), "missing"),
    ],
)
def test_who_can_have_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, found: cgroups.Groups, status: str
) -> None:
    monkeypatch.setattr(cgroups, "look", lambda _place: found)
    assert cgroups.check_cgroups(place(tmp_path, uid)).status == status


def test_lost_limits_are_named_with_the_way_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "look", lambda _place: groups(manager=True, controllers="memory pids"))
    entry = cgroups.check_limits(place(tmp_path))
    assert entry.status == "warning"
    assert "not enforced: --cpus" in entry.detail
    assert "Delegate=cpu" in (entry.fix or "")
    monkeypatch.setattr(cgroups, "look", lambda _place: groups(controllers="cpu memory pids"))
    assert cgroups.check_limits(place(tmp_path)).status == "ok"


@pytest.mark.parametrize(
    ("text", "start"), [("", 100000), ("a:100000:65536\n", 165536), ("a:1:1\nb:165536:65536\nbad\nc:x:y\n", 231072)]
)
def test_the_next_free_range(tmp_path: Path, text: str, start: int) -> None:
    (tmp_path / "subuid").write_text(text)
    assert next_free_range(tmp_path / "subuid", tmp_path / "absent") == start


def test_a_user_without_ids_is_told_what_to_type(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs a user id without a range")
    entry = users.check_subuid(dataclasses.replace(place(tmp_path), uid=65534, gid=65534))
    assert entry.status == "missing"
    assert "usermod --add-subuids" in (entry.fix or "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kernel.apparmor_restrict_unprivileged_userns", "1"),
        ("kernel.unprivileged_userns_clone", "0"),
        ("user.max_user_namespaces", "0"),
    ],
)
def test_what_forbids_user_namespaces_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.setattr(kernel, "_sysctl", lambda asked: value if asked == key else "")
    detail, fix = kernel._why_forbidden(place(tmp_path), "Operation not permitted")
    assert detail
    assert fix
    assert fix.startswith(f"echo '{key} = ")
    assert "sudo tee /etc/sysctl.d/60-berth-" in fix


@pytest.mark.parametrize(("value", "status"), [("128", "warning"), ("512", "ok"), ("", "ok")])
def test_inotify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, status: str) -> None:
    monkeypatch.setattr(kernel, "_sysctl", lambda _key: value)
    assert kernel.check_inotify(place(tmp_path)).status == status


def test_an_old_kernel(tmp_path: Path) -> None:
    old = dataclasses.replace(host(), kernel=(5, 10))
    assert kernel.check_kernel(place(tmp_path, distribution=old)).status == "missing"
    assert kernel.check_kernel(place(tmp_path)).status == "ok"


def test_the_overlay_probe_leaves_nothing(tmp_path: Path) -> None:
    entry = kernel.check_overlayfs(place(tmp_path, os.geteuid()))
    assert entry.status in ("ok", "warning", "missing")
    assert os.listdir(tmp_path) == []


def test_little_space_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_LITTLE_SPACE", 1 << 62)
    entry = tools.check_disk_space(place(tmp_path))
    assert entry.status == "warning"
    assert str(tmp_path) in entry.detail


@pytest.mark.parametrize("uid", [0, 1000])
def test_fixes_are_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    """Every fix that is a command can be split by a shell's rules and starts with a program."""
    monkeypatch.setattr(cgroups, "look", lambda _place: groups(mountinfo=HYBRID))
    fixes = [cgroups.check_cgroups(place(tmp_path, uid)).fix, kernel.check_inotify(place(tmp_path, uid)).fix]
    for fix in fixes:
        if fix:
            assert shlex.split(fix, comments=True)[0] in ("sudo", "echo")


def accelerator(monkeypatch: pytest.MonkeyPatch, found: Accelerator | BerthError) -> None:
    def probe(_layout: Layout, _arch: str, *, fresh: bool) -> Accelerator:
        assert fresh
        if isinstance(found, BerthError):
            raise found
        return found

    monkeypatch.setattr(accel, "probe", probe)


@pytest.mark.parametrize(
    ("found", "uid", "status", "detail", "fix"),
    [
        (Accelerator("kvm", "KVM runs guest code"), 1000, "ok", "KVM runs guest code", None),
        (Accelerator("tcg", "far too slowly"), 1000, "warning", "far too slowly", None),
        (Accelerator("tcg", "may not open", "sudo usermod"), 1000, "missing", "may not open", "sudo usermod"),
        (Accelerator("tcg", "may not open", "sudo usermod"), 0, "missing", "may not open", "usermod"),
        (
            Accelerator("tcg", "there is none", "see the firmware"),
            1000,
            "missing",
            "there is none: see the firmw",
            None,
        ),
        (UnsupportedError("qemu is not installed"), 1000, "warning", "can't be tried: qemu is not installed", None),
    ],
)
def test_kvm_is_judged_by_the_guest_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Accelerator | BerthError, uid: int, status: str,
    detail: str, fix: str | None,
) -> None:  # fmt: skip
    accelerator(monkeypatch, found)
    entry = vm.check_kvm(place(tmp_path, uid))
    assert (entry.status, entry.fix) == (status, fix)
    assert detail in entry.detail
    assert "emulated in software" in entry.affects


@pytest.mark.parametrize(("text", "status"), [("Y", "ok"), ("N", "missing"), (None, "missing")])
def test_nested_virtualization_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, status: str
) -> None:
    path = tmp_path / "nested"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("berth.host.architecture", lambda: "amd64")
    monkeypatch.setattr(accel, "NESTED", (path,))
    entry = vm.check_nested_virtualization(place(tmp_path))
    assert entry.status == status
    assert ("nested=1" in (entry.fix or "")) == (text == "N")


@pytest.mark.parametrize(("kind", "word"), [("rust", "Rust"), ("c", "in C")])
def test_which_virtiofsd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, word: str) -> None:
    daemon = Virtiofsd(Path("/usr/libexec/virtiofsd"), kind, "1.13.2")  # type: ignore[arg-type]
    monkeypatch.setattr(vm, "find_virtiofsd", lambda: daemon)
    entry = vm.check_virtiofsd(place(tmp_path))
    assert (entry.status, entry.version) == ("ok", "1.13.2")
    assert word in entry.detail
    monkeypatch.setattr(vm, "find_virtiofsd", lambda: None)
    entry = vm.check_virtiofsd(place(tmp_path))
    assert (entry.status, entry.fix) == ("missing", "sudo apt-get install qemu-system-common")


@pytest.mark.parametrize(("version", "note"), [("1.46.5", True), ("1.47.0", False)])
def test_an_old_mke2fs_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, note: bool
) -> None:
    found = Check("mke2fs", "ok", version, "/sbin/mke2fs", "disks", None)
    monkeypatch.setattr(vm, "check_tool", lambda _tool, _place: found)
    entry = vm.check_mke2fs(place(tmp_path))
    assert entry.status == "ok"
    assert ("faster" in entry.detail) == note


def test_a_kernel_can_be_fetched(tmp_path: Path) -> None:
    entry = vm.check_vm_kernel(place(tmp_path))
    assert (entry.status, entry.fix) == ("missing", "berth system kernel fetch")


def test_no_vms_on_other_processors(tmp_path: Path) -> None:
    riscv = dataclasses.replace(host(), architecture="riscv64")
    assert vm.check_qemu(place(tmp_path, distribution=riscv)).detail == "there are no VMs on riscv64"
