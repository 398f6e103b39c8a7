"""Images against the world: skopeo and umoci as other readers and writers, GNU tar beside our unpacking, user
namespaces, full disks, the package mirror. What needs no more than files is in tests/unit/test_oci_*.py.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from berth import proc, userns
from berth.errors import BerthError
from berth.images import Images, StoredImage
from berth.layout import Layout
from berth.oci import spec
from berth.oci.layer import UnpackReport
from berth.oci.unpack import unpack_layers
from ordinary import Ordinary
from support import need
from tars import END, directory, file_of, listing, member, rootfs, unpack


@pytest.fixture
def images(layout: Layout) -> Images:
    return Images(layout)


@pytest.fixture
def policy() -> list[str]:
    need("skopeo")
    return ["skopeo", "--insecure-policy"]


def skopeo(policy: list[str], *argv: str) -> bytes:
    return proc.run([*policy, *argv]).stdout


def unpacked(images: Images, image: StoredImage, target: Path) -> UnpackReport:
    target.mkdir()
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with images.opened_layers(image) as layers:
            return unpack_layers(fd, layers, devices="skip")
    finally:
        os.close(fd)


def everything(root: Path) -> dict[str, tuple[object, ...]]:
    """What a tree holds, but for what is below dev: types, modes, owners, sizes, times, targets, links, attributes."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            shown = os.path.relpath(path, root)
            if shown.startswith("dev/"):
                continue
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            found[shown] = (
                status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns // 10**9,
                (status.st_size, status.st_nlink) if stat.S_ISREG(status.st_mode) else 0,
                os.readlink(path) if stat.S_ISLNK(status.st_mode) else "", attributes,
            )  # fmt: skip
    return found


# Other programs


def test_skopeo_reads_the_store_and_berth_what_skopeo_writes(
    images: Images, layout: Layout, scratch: Path, alpine_tar: Path, policy: list[str]
) -> None:
    image = images.import_(alpine_tar, "alpine:3.20")
    source = f"oci:{layout.images}:docker.io/library/alpine:3.20"
    shown = json.loads(skopeo(policy, "inspect", source))
    assert (shown["Digest"], shown["Architecture"]) == (image.digest, "amd64")
    skopeo(policy, "copy", source, f"docker-archive:{scratch}/docker.tar:host:5000/alpine:docker")
    skopeo(policy, "copy", source, f"oci-archive:{scratch}/oci.tar:docker.io/library/alpine:oci")
    skopeo(policy, "copy", source, f"oci:{scratch}/layout:tag")
    skopeo(policy, "copy", "--dest-compress", "--dest-compress-format=zstd", source, f"dir:{scratch}/zstd")
    assert images.load(scratch / "docker.tar") == ["host:5000/alpine:docker"]
    assert images.load(scratch / "oci.tar") == ["docker.io/library/alpine:oci"]
    for number, reference in enumerate(("host:5000/alpine:docker", "alpine:oci", f"oci:{scratch}/layout:tag")):
        unpacked(images, images.ensure(reference), scratch / f"root{number}")
        assert (scratch / f"root{number}/etc/alpine-release").read_text() == "3.20.3\n"
        assert os.readlink(scratch / f"root{number}/sbin/init") == "/bin/busybox"
    assert everything(scratch / "root0") == everything(scratch / "root1") == everything(scratch / "root2")


def test_skopeo_reads_what_berth_saves(images: Images, scratch: Path, alpine_tar: Path, policy: list[str]) -> None:
    image = images.import_(alpine_tar, "alpine:3.20")
    images.save(["alpine:3.20"], scratch / "a.tar")
    shown = json.loads(skopeo(policy, "inspect", f"oci-archive:{scratch}/a.tar:docker.io/library/alpine:3.20"))
    assert shown["Digest"] == image.digest


def test_skopeo_writes_into_the_store(
    images: Images, layout: Layout, scratch: Path, alpine_tar: Path, policy: list[str]
) -> None:
    image = images.import_(alpine_tar, "alpine:3.20")
    images.save(["alpine:3.20"], scratch / "a.tar")
    skopeo(policy, "copy", f"oci-archive:{scratch}/a.tar", f"oci:{layout.images}:docker.io/me/theirs:1")
    theirs = images.find("me/theirs:1")
    assert theirs.problem == ""
    assert theirs.platform == image.platform
    images.remove(["alpine:3.20"], dict[str, list[str]])
    unpacked(images, theirs, scratch / "root")
    assert (scratch / "root/etc/alpine-release").exists()


@pytest.mark.root
def test_layers_that_umoci_makes(images: Images, scratch: Path, alpine_tar: Path, policy: list[str]) -> None:
    """umoci writes whiteouts and opaque directories by the book."""
    if proc.find_program("umoci") is None:
        pytest.skip("needs umoci")
    images.import_(alpine_tar, "alpine:3.20")
    images.save(["alpine:3.20"], scratch / "a.tar")
    layout = scratch / "umoci"
    skopeo(policy, "copy", f"oci-archive:{scratch}/a.tar", f"oci:{layout}:base")
    (scratch / "new").mkdir()
    (scratch / "new/file").write_text("new")
    for argv in (
        ["insert", "--image", f"{layout}:base", "--tag", "one", str(scratch / "new"), "/opt/new"],
        ["insert", "--image", f"{layout}:one", "--tag", "two", "--whiteout", "/etc/motd"],
        ["insert", "--image", f"{layout}:two", "--tag", "three", "--opaque", str(scratch / "new"), "/etc/apk"],
    ):
        proc.run(["umoci", *argv])
    image = images.ensure(f"oci:{layout}:three")
    report = unpacked(images, image, scratch / "root")
    assert report.layers == 4
    assert listing(scratch / "root/etc/apk") == {"file": "new"}
    assert listing(scratch / "root/opt/new") == {"file": "new"}
    assert not (scratch / "root/etc/motd").exists()
    assert (scratch / "root/etc/passwd").exists()
    proc.run(["umoci", "unpack", "--image", f"{layout}:three", str(scratch / "bundle")])
    ours, theirs = everything(scratch / "root"), everything(scratch / "bundle/rootfs")
    assert {name: entry[:3] for name, entry in ours.items()} == {name: entry[:3] for name, entry in theirs.items()}


@pytest.mark.root
def test_a_debian_is_unpacked_as_gnu_tar_unpacks_it(images: Images, scratch: Path, debian_tar: Path) -> None:
    image = images.import_(debian_tar, "debian:tar")
    unpacked(images, image, scratch / "ours")
    (scratch / "theirs").mkdir()
    options = ["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf"]
    proc.run(["tar", "-C", str(scratch / "theirs"), *options, str(debian_tar)])
    assert everything(scratch / "ours") == everything(scratch / "theirs")
    assert os.listdir(scratch / "ours/dev") == []


def test_a_directory_makes_the_same_image_as_its_archive(images: Images, scratch: Path, alpine_tar: Path) -> None:
    unpacked(images, images.ensure(f"rootfs:{alpine_tar}"), scratch / "root")
    unpacked(images, images.ensure(f"rootfs:{scratch}/root"), scratch / "again")
    assert everything(scratch / "again") == everything(scratch / "root")


# What only root, or root of a namespace, may


@pytest.mark.root
def test_root_makes_devices_and_capabilities(scratch: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep, as in /bin/ping
    unpack(
        scratch / "root",
        member("null", kind=b"3", device=(1, 3), mode=0o666, uid=5, gid=6)
        + member("sda", kind=b"4", device=(8, 0x12345))
        + member("ping", b"x", uid=7, gid=8, mode=0o4755, pax={"SCHILY.xattr.security.capability": capability}),
        devices="make",
    )  # fmt: skip
    null, disk, ping = (os.lstat(scratch / "root" / name) for name in ("null", "sda", "ping"))
    assert (null.st_rdev, stat.S_IMODE(null.st_mode), null.st_uid, null.st_gid) == (os.makedev(1, 3), 0o666, 5, 6)
    assert stat.S_ISBLK(disk.st_mode)
    assert disk.st_rdev == os.makedev(8, 0x12345)
    assert (ping.st_uid, ping.st_gid, stat.S_IMODE(ping.st_mode)) == (7, 8, 0o4755)
    assert os.getxattr(scratch / "root/ping", "security.capability") == capability


@pytest.mark.root
def test_unpacking_in_a_user_namespace(scratch: Path) -> None:
    """The files belong to the namespace's ids; what its root may not do is left out and counted."""
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    layer = (
        directory("./") + member("f", b"x", uid=0, gid=0, mode=0o4711) + member("u", b"x", uid=1000, gid=50)
        + member("c", kind=b"3", device=(1, 3), uid=0, gid=0)
        + member("cap", uid=0, gid=0, pax={"SCHILY.xattr.security.capability": capability})
        + member("t", uid=0, gid=0, pax={"SCHILY.xattr.trusted.x": "y"})
    )  # fmt: skip
    idmap = userns.plan_idmap(0, 0)
    root = scratch / "root"
    root.mkdir()
    os.chown(root, idmap.host_root(), idmap.host_root())
    target = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    told: list[int] = []
    packed = proc.run(["zstd", "-1cq"], input=layer + END).stdout
    with file_of(layer + END) as fd, file_of(packed) as packed_fd:
        arguments: dict[str, object] = {"target_fd": target, "devices": "skip"}
        arguments["layers"] = [[fd, spec.LAYER], [packed_fd, spec.LAYER_ZSTD]]
        result = userns.call(
            "berth.oci.unpack:unpack_inside", arguments, idmap=idmap, pass_fds=[target, fd, packed_fd],
            progress=lambda done, _total: told.append(done),
        )  # fmt: skip
    os.close(target)
    assert isinstance(result, dict)
    report = UnpackReport.from_json(result)  # pyright: ignore[reportUnknownArgumentType]
    base = idmap.host_root()
    assert [(root / name).stat().st_uid - base for name in ("f", "u")] == [0, 1000]
    assert (root / "u").stat().st_gid - base == 50
    assert stat.S_IMODE((root / "f").stat().st_mode) == 0o4711
    assert not (root / "c").exists()
    assert (report.layers, report.devices_skipped, report.xattrs_skipped) == (2, 2, {"trusted.x": 2})
    # The kernel notes whose root the capability is good for.
    assert os.getxattr(root / "cap", "security.capability")[-4:] == base.to_bytes(4, "little")
    assert told[-1] == len(layer + END) + len(packed)


@pytest.mark.root
def test_owners_that_the_namespace_does_not_have(scratch: Path) -> None:
    idmap = userns.plan_idmap(0, 0)
    os.chown(scratch, idmap.host_root(), idmap.host_root())
    target = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    with (
        file_of(member("f", uid=3_000_000_000, gid=0) + END) as fd,
        pytest.raises(BerthError, match="f belongs to 3000000000:0") as caught,
    ):
        userns.call(
            "berth.oci.unpack:unpack_inside",
            {"target_fd": target, "layers": [[fd, spec.LAYER]], "devices": "skip"}, idmap=idmap, pass_fds=[target, fd],
        )  # fmt: skip
    os.close(target)
    assert caught.value.hint
    assert "/etc/subuid" in caught.value.hint


# Full disks


@pytest.fixture
def small_disk(scratch: Path) -> Generator[Path]:
    """A file system of 8 MiB."""
    need("root")
    disk = scratch / "disk"
    disk.mkdir()
    proc.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=200", "berth-test", str(disk)])
    yield disk
    proc.run(["umount", str(disk)])


def test_a_full_disk_is_one_error_and_leaves_nothing(small_disk: Path, scratch: Path) -> None:
    images = Images(Layout(small_disk / "data", scratch, scratch, scratch))
    small = scratch / "small.tar"
    small.write_bytes(rootfs())
    kept = images.import_(small, "kept")
    before = sorted(path for path in small_disk.rglob("*") if path.is_file())
    big = scratch / "big.tar"
    big.write_bytes(rootfs()[:-1024] + member("big", os.urandom(16 << 20)) + END)
    actions: list[Callable[[], object]] = [
        lambda: images.import_(big, "big"), lambda: images.ensure(f"rootfs:{big}"), lambda: images.load(_zipped(big)),
    ]  # fmt: skip
    for act in actions:
        with pytest.raises(BerthError, match="No space left on device") as caught:
            act()
        assert str(small_disk) in caught.value.message
        assert caught.value.hint
    _fill(small_disk)
    for act in (lambda: images.save(["kept"], small_disk / "out.tar"), lambda: images.tag("kept", "full")):
        with pytest.raises(BerthError, match=rf"can't write {small_disk}/.*: No space left"):
            act()
    (small_disk / "filler").unlink()
    assert sorted(path for path in small_disk.rglob("*") if path.is_file()) == before
    assert images.list() == [kept]
    images.tag("kept", "again")


def _zipped(archive: Path) -> Path:
    path = archive.with_suffix(".tgz")
    path.write_bytes(gzip.compress(archive.read_bytes(), 1))
    return path


def _fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass


def test_unpacking_onto_a_full_disk_is_one_error(small_disk: Path) -> None:
    with pytest.raises(BerthError, match="can't unpack layer 1 of 1: big: No space left on device"):
        unpack(small_disk / "root", member("big", os.urandom(16 << 20)))
    shutil.rmtree(small_disk / "root")
    with pytest.raises(BerthError, match=r"can't unpack layer 1 of 1: f\d+: No space left on device"):
        unpack(small_disk / "root", b"".join(member(f"f{number}", b"x") for number in range(300)))


# Bootstrapping, from the host's own package mirror


@pytest.mark.mirror
@pytest.mark.mmdebstrap
@pytest.mark.root
def test_debian_is_bootstrapped(images: Images, scratch: Path) -> None:
    image = images.ensure("bootstrap:debian/bookworm?include=hello")
    assert image.annotations["dev.berth.bootstrap"] == "debian/bookworm"
    root = scratch / "root"
    unpacked(images, image, root)
    assert os.path.basename(os.readlink(root / "sbin/init")) == "systemd"
    for name in ("usr/bin/sudo", "usr/bin/ping", "usr/bin/curl", "usr/bin/hello", "usr/sbin/ip", "usr/bin/less"):
        assert (root / name).exists(), name
    assert (root / "etc/machine-id").read_text() == ""
    for name in ("etc/hostname", "etc/resolv.conf", "usr/sbin/policy-rc.d", "etc/apt/apt.conf.d/99mmdebstrap"):
        assert not os.path.lexists(root / name), name
    sources = (root / "etc/apt/sources.list").read_text()
    assert " bookworm main" in sources
    for keyring in {word.partition("=")[2].rstrip("]") for word in sources.split() if word.startswith("[signed-by=")}:
        assert (root / keyring.lstrip("/")).exists(), "the guest's apt needs the key"
    assert any((root / "var/lib/apt/lists").glob("*_Packages*")), "apt-get install works at once"


@pytest.mark.mirror
@pytest.mark.mmdebstrap
@pytest.mark.user
def test_an_ordinary_user_bootstraps(ordinary_user: Ordinary) -> None:
    script = (
        "from berth.images import Images; from berth.layout import Layout\n"
        "i = Images(Layout.from_environment()); m = i.ensure('bootstrap:debian/bookworm?init=sysvinit')\n"
        "print(m.platform, m.annotations['dev.berth.init']); i.remove([m.digest], dict)\n"
    )
    done = ordinary_user.run([str(ordinary_user.python), "-P", "-c", script], timeout_s=600)
    assert done.status == 0, done.stderr.decode()
    assert done.stdout.decode().split() == [str(spec.host_platform()), "sysvinit"]


@pytest.mark.mirror
@pytest.mark.mmdebstrap
@pytest.mark.root
def test_a_package_that_does_not_exist_is_one_error(images: Images) -> None:
    with pytest.raises(BerthError, match="bootstrapping debian/bookworm failed") as caught:
        images.ensure("bootstrap:debian/bookworm?include=no-such-package-as-this")
    assert caught.value.hint
    assert images.list() == []


def test_importing_the_images_module_is_quick() -> None:
    """`create` imports it; the fast path does not."""
    code = "import sys, berth.fastpath; assert not any(name.startswith('berth.oci') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
