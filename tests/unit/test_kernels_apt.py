"""Kernels from packages: what apt is told, what of its answers counts, what is taken out of packages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from berth.errors import BerthError, StateFormatError, UnsupportedError
from berth.kernels import apt, gather, running
from berth.kernels.apt import Package, configuration, parse_package, parse_status, resolve
from berth.kernels.gather import Gatherer
from berth.kernels.model import version_key
from berth.oci.aptsources import AptSource
from berth.proc import Completed
from berth.progress import Silent

STANZA = """\
Package: linux-image-cloud-amd64
Version: 6.1.192-2
Architecture: amd64
Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool
Description: Linux for x86-64 cloud
 Depends: not a field
Size: 1504

Package: another
"""


def show(**packages: str) -> dict[str, Package]:
    return {
        name.replace("_", "-"): Package(name.replace("_", "-"), "1", 10, tuple(needs.split()))
        for name, needs in packages.items()
    }


def test_a_stanza() -> None:
    package = parse_package(STANZA)
    assert package == Package(
        "linux-image-cloud-amd64", "6.1.192-2", 1504, ("linux-image-6.1.0-56-cloud-amd64", "initramfs-tools")
    )
    for text in ("", "Package: -o\nVersion: 1\n", "Package: ok\n", "Package: ok\nVersion: 1 2\n"):
        assert parse_package(text) is None, "nothing that apt could take for an option"


def test_debian() -> None:
    lists = show(linux_image_cloud="kmod linux-image-6.1", linux_image_6="x")
    lists["linux-image-6.1"] = Package("linux-image-6.1", "2", 5, ("kmod", "linux-base"))
    assert [package.name for package in resolve("linux-image-cloud", lists.get)] == ["linux-image-6.1"]


def test_ubuntu() -> None:
    lists = show(
        linux_image_virtual="linux-image-6.8-generic", linux_modules_6="",
        **{"linux_image_6.8_generic": "kmod linux-modules-6.8-generic", "linux_modules_6.8_generic": ""},
    )  # fmt: skip
    found = [package.name for package in resolve("linux-image-virtual", lists.get)]
    assert found == ["linux-image-6.8-generic", "linux-modules-6.8-generic"]


def test_what_is_not_whole_is_nothing() -> None:
    assert resolve("linux-image-cloud", show(linux_image_cloud="linux-image-6.1").get) == ()
    assert resolve("linux-image-cloud", show().get) == ()
    circle = show(linux_image_a="linux-image-b", linux_image_b="linux-image-a")
    assert resolve("linux-image-a", circle.get) == ()


def test_configuration() -> None:
    assert configuration(Path("/work"), "arm64", own_lists=True) == (
        "#clear APT::Update;\n"
        'APT::Architecture "arm64";\n'
        "#clear APT::Architectures;\n"
        'APT::Architectures { "arm64"; };\n'
        'APT::Get::AllowUnauthenticated "false";\n'
        'APT::Sandbox::User "root";\n'
        'Acquire::AllowInsecureRepositories "false";\n'
        'Acquire::Languages "none";\n'
        'Acquire::Retries "2";\n'
        'Acquire::http::Timeout "30";\n'
        'Acquire::https::Timeout "30";\n'
        'Dir::Cache "/work/cache";\n'
        'Dir::State "/work";\n'
        'Dir::State::lists "/work/lists";\n'
        'Dir::State::status "/work/status";\n'
        'Dir::Etc::sourcelist "/work/sources.list";\n'
        'Dir::Etc::sourceparts "/dev/null";\n'
        'Dir::Etc::preferences "/dev/null";\n'
        'Dir::Etc::preferencesparts "/dev/null";\n'
    )
    assert "Dir::State" not in configuration(Path("/work"), "amd64", own_lists=False)


@pytest.mark.parametrize(
    ("line", "done"),
    [("dlstatus:1:45.5:Retrieving file 1 of 2", 0.455), ("dlstatus:1:100:x", 1.0), ("pmstatus:x:50:y", 0.0), ("", 0.0)],
)
def test_status(line: str, done: float) -> None:
    assert parse_status(line) == pytest.approx(done)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("boot/vmlinuz-6.1", "image.packed"),
        ("usr/lib/modules/6.1/vmlinuz", "image.packed"),
        ("lib/modules/6.1/kernel/fs/ext4/ext4.ko", "lib/modules/6.1/kernel/fs/ext4/ext4.ko"),
        ("usr/lib/modules/6.1/updates/dkms/x.ko.zst", "lib/modules/6.1/updates/dkms/x.ko.zst"),
        ("lib/modules/6.1/modules.builtin.modinfo", "lib/modules/6.1/modules.builtin.modinfo"),
        ("sbin/e2fsck.static", "e2fsck"),
        ("lib/modules/6.1/kernel/../../../../../x.ko", None),
        ("lib/modules/../modules.dep", None),
        ("lib/modules/6.1/build/Makefile", None),
        ("lib/modules/6.1/vdso/vdso64.so", None),
        ("usr/lib/linux-image-6.1/a.dtb", None),
        ("boot/System.map-6.1", None),
        ("/boot/vmlinuz-6.1", None),
        ("boot/vmlinuz-.hidden", None),
    ],
)
def test_what_is_taken(path: str, target: str | None, scratch: Path) -> None:
    assert Gatherer(scratch).place(path) == (scratch / target if target else None)


def test_what_is_written(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gatherer = Gatherer(scratch)
    module, checker = gatherer.place("lib/modules/6.1/kernel/a.ko"), gatherer.place("sbin/e2fsck.static")
    assert module
    assert checker
    gatherer.write(module, [b"a", b"b"])
    gatherer.write(checker, [b"c"])
    assert module.read_bytes() == b"ab"
    assert [path.stat().st_mode & 0o777 for path in (module, checker, module.parent)] == [0o644, 0o755, 0o755]
    with pytest.raises(BerthError, match="twice"):
        gatherer.write(module, [b"x"])
    with pytest.raises(BerthError, match="no kernel"):
        gatherer.version()
    monkeypatch.setattr(gather, "_TOTAL_MAX", 4)
    with pytest.raises(StateFormatError, match="larger"):
        gatherer.write(scratch / "b.ko", [b"long"])


def test_the_running_kernel(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from berth import host

    release = host.facts().release
    modules = scratch / "root/lib/modules" / release
    (modules / "kernel").mkdir(parents=True)
    (modules / "kernel/a.ko").write_bytes(b"module")
    (modules / "build").symlink_to("/")
    (modules / "modules.dep").write_text("kernel/a.ko:\n")
    target = scratch / "target"
    target.mkdir()
    with pytest.raises(UnsupportedError, match="no package source") as caught:
        running.gather(host.architecture(), target, Silent(), root=scratch / "root")
    assert "--kernel" in (caught.value.hint or "")
    (modules / "vmlinuz").write_bytes(b"image")
    (scratch / "root/boot").mkdir()
    (scratch / f"root/boot/vmlinuz-{release}").write_bytes(b"image")
    found = running.gather(host.architecture(), target, Silent(), root=scratch / "root")
    assert found.version == release
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == sorted(["image.packed", f"lib/modules/{release}/kernel/a.ko", f"lib/modules/{release}/modules.dep"])
    monkeypatch.setattr(host, "architecture", lambda: "riscv64")
    with pytest.raises(UnsupportedError):
        running.gather("amd64", target, Silent(), root=scratch / "root")


def test_the_newest() -> None:
    versions = ["6.1.0-9-amd64", "6.1.0-56-amd64", "6.12-rc1", "6.12.1", "5.15.0"]
    assert sorted(versions, key=version_key) == ["5.15.0", "6.1.0-9-amd64", "6.1.0-56-amd64", "6.12-rc1", "6.12.1"]


def test_a_mirror_that_does_not_answer(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get update calls that a success: it must not end as 'there is no kernel'."""
    source = AptSource("http://mirror.example/debian", "stable", ("main",))
    asked: list[object] = []

    def run(argv: Sequence[str], **options: object) -> Completed:
        asked.append((argv[-3:], options["env"]))
        return Completed(0, b"", b"W: Failed to fetch http://mirror.example/x: Could not connect\nW: more\n")

    monkeypatch.setattr(apt, "run", run)
    told = apt.Apt(scratch / "own", "amd64", [source])
    with pytest.raises(BerthError, match=r"can't be had: Failed to fetch .* Could not connect") as caught:
        told.update()
    assert "mirror" in (caught.value.hint or "")
    assert asked == [(["apt-get", "-q", "update"], {"APT_CONFIG": str(scratch / "own/apt.conf")})]
    assert (scratch / "own/sources.list").read_text() == "deb http://mirror.example/debian stable main\n"
    (scratch / "own/lists/mirror_Packages").touch()
    told.update()
