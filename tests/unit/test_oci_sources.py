"""Images out of files and directories: what other tools write, and what nobody should. As any user, below tmp_path."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from berth.errors import BerthError, ImageFormatError, InvalidArgumentError, NotFoundError
from berth.images import Images, StoredImage
from berth.layout import Layout
from berth.oci import spec
from berth.oci.rootfs import architecture_of
from berth.oci.spec import host_platform
from berth.proc import find_program
from tars import (
    LayoutWriter,
    descriptor,
    digest,
    directory,
    elf,
    encode,
    hardlink,
    member,
    named,
    platform,
    rootfs,
    symlink,
    tar_of,
)

ONE, TWO = member("one", b"1") + bytes(1024), member("two", b"2") + bytes(1024)
OTHER = "arm64" if host_platform().architecture == "amd64" else "amd64"
HOST = host_platform().architecture


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(Layout(*(tmp_path / name for name in ("data", "run", "config", "cache"))))


def contents(images: Images, image: StoredImage) -> list[bytes]:
    """The layers, decompressed."""
    found: list[bytes] = []
    with images.opened_layers(image) as layers:
        for fd, _ in layers:
            data = os.pread(fd, 1 << 20, 0)
            found.append(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data)
    return found


def assert_empty(images: Images, tmp_path: Path) -> None:
    """Nothing half-made is left."""
    assert images.list() == []
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert {path.name for path in left} <= {"lock", "index.json", "oci-layout"}


# OCI layouts


def test_an_oci_layout_by_tag(images: Images, tmp_path: Path) -> None:
    writer = LayoutWriter()
    first, second = (
        writer.image(ONE, TWO, annotations=named("1.0")),
        writer.image(TWO, compress=False, annotations=named("2.0")),
    )
    writer.top(first, second)
    path = writer.write(tmp_path / "layout")
    image = images.ensure(f"oci:{path}:1.0")
    assert (image.digest, image.platform, image.created) == (first["digest"], "linux/amd64", "2026-01-02T03:04:05Z")
    assert contents(images, image) == [ONE, TWO]
    assert image.annotations["test"] == "yes"
    assert image.config.cmd == ("/sbin/init",)
    assert contents(images, images.ensure(f"oci:{path}:2.0")) == [TWO]
    with pytest.raises(InvalidArgumentError, match="several images") as caught:
        images.ensure(f"oci:{path}")
    assert caught.value.hint == "add :TAG, one of 1.0, 2.0"
    with pytest.raises(NotFoundError, match=r"'3\.0' not found"):
        images.ensure(f"oci:{path}:3.0")
    with pytest.raises(NotFoundError, match="not found"):
        images.ensure("oci:/no/where:1")


def test_the_only_image_needs_no_tag(images: Images, tmp_path: Path) -> None:
    writer = LayoutWriter()
    manifest = writer.image(ONE)
    writer.top({**manifest, "annotations": named("a")}, {**manifest, "annotations": named("b")})
    assert images.ensure(f"oci:{writer.write(tmp_path / 'l')}").digest == manifest["digest"]


@pytest.mark.parametrize("nested", [False, True])
def test_the_platform_is_chosen_from_indexes(images: Images, tmp_path: Path, nested: bool) -> None:
    writer = LayoutWriter()
    arm, amd = writer.image(ONE, architecture="arm64"), writer.image(TWO, architecture="amd64")
    attestation = {**writer.image(ONE + bytes(512)), "platform": {"os": "unknown", "architecture": "unknown"}}
    windows = {
        **writer.image(TWO + bytes(512), architecture="amd64"),
        "platform": {"os": "windows", "architecture": "amd64"},
    }
    index = writer.index(
        attestation, windows, {**arm, "platform": platform("arm64")}, {**amd, "platform": platform("amd64")}
    )
    writer.top(writer.index(writer.index(index)) if nested else index)
    path = writer.write(tmp_path / "l")
    assert images.ensure(f"oci:{path}", platform="linux/arm64").digest == arm["digest"]
    assert images.ensure(f"oci:{path}", platform="linux/amd64/v1").digest == amd["digest"]
    assert (
        images.ensure(f"oci:{path}").platform == "linux/amd64"
    )  # what is there stays, as long as nothing else is asked


def test_an_index_that_leaves_the_platform_to_the_config(images: Images, tmp_path: Path) -> None:
    writer = LayoutWriter()
    wanted = writer.image(TWO, architecture=HOST)
    writer.top(writer.index(writer.image(ONE, architecture=OTHER), wanted))
    assert images.ensure(f"oci:{writer.write(tmp_path / 'l')}").digest == wanted["digest"]


def test_a_platform_that_is_not_there(images: Images, tmp_path: Path) -> None:
    writer = LayoutWriter()
    writer.top(writer.index({**writer.image(ONE, architecture="arm64"), "platform": platform("arm64")}))
    path = writer.write(tmp_path / "l")
    with pytest.raises(NotFoundError, match="has no image for linux/amd64") as caught:
        images.ensure(f"oci:{path}", platform="linux/amd64")
    assert caught.value.hint == "it has linux/arm64"
    assert_empty(images, tmp_path)


def test_a_single_manifest_of_another_platform_is_taken_unless_one_is_asked_for(images: Images, tmp_path: Path) -> None:
    writer = LayoutWriter()
    writer.top(writer.image(ONE, architecture=OTHER))
    path = writer.write(tmp_path / "l")
    with pytest.raises(NotFoundError, match=f"no image for linux/{HOST}"):
        images.ensure(f"oci:{path}", platform=f"linux/{HOST}")
    assert images.ensure(f"oci:{path}").platform == f"linux/{OTHER}"


def test_docker_media_types(images: Images, tmp_path: Path) -> None:
    writer = LayoutWriter()
    layer = writer.blob(gzip.compress(ONE), spec.DOCKER_LAYER_GZIP)
    config = writer.blob(
        encode({**platform(HOST), "rootfs": {"type": "layers", "diff_ids": [digest(ONE)]}}), spec.DOCKER_CONFIG
    )
    manifest = {"schemaVersion": 2, "mediaType": spec.DOCKER_MANIFEST, "config": config, "layers": [layer]}
    described = writer.blob(encode(manifest), spec.DOCKER_MANIFEST, platform=platform(HOST))
    index = {"schemaVersion": 2, "mediaType": spec.DOCKER_INDEX, "manifests": [described]}
    writer.top(writer.blob(encode(index), spec.DOCKER_INDEX))
    image = images.ensure(f"oci:{writer.write(tmp_path / 'l')}")
    assert contents(images, image) == [ONE]


def test_indexes_in_a_loop_end(images: Images, tmp_path: Path) -> None:
    """A real loop would need a broken sha256; a chain that is too long is as good."""
    writer = LayoutWriter()
    top = writer.image(ONE)
    for _ in range(7):
        top = writer.index(top)
    writer.top(top)
    with pytest.raises(ImageFormatError, match="nested deeper"):
        images.ensure(f"oci:{writer.write(tmp_path / 'l')}")
    assert_empty(images, tmp_path)


@pytest.mark.parametrize("what", ["layer", "config", "manifest"])
@pytest.mark.parametrize("how", ["cut", "changed", "longer", "missing"])
def test_a_damaged_layout_leaves_nothing(images: Images, tmp_path: Path, what: str, how: str) -> None:
    writer = LayoutWriter()
    manifest = writer.image(ONE)
    writer.top(manifest)
    path = writer.write(tmp_path / "l")
    document = json.loads((path / "blobs/sha256" / str(manifest["digest"])[7:]).read_bytes())
    digests = {"layer": document["layers"][0]["digest"], "config": document["config"]["digest"]}
    blob = path / "blobs/sha256" / str(digests.get(what, manifest["digest"]))[7:]
    data = blob.read_bytes()
    blob.write_bytes({"cut": data[:-1], "changed": data[:-1] + b"X", "longer": data + b"X", "missing": b""}[how])
    if how == "missing":
        blob.unlink()
    with pytest.raises(ImageFormatError, match=r"damaged|truncated|longer|can't read"):
        images.ensure(f"oci:{path}")
    assert_empty(images, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [descriptor(ONE, "application/vnd.example.encrypted")]},
        {"config": descriptor(b"{}", "application/vnd.cncf.helm.config.v1+json")},
        {"layers": []},  # the config says one
        {"schemaVersion": 1},
    ],
)
def test_what_is_no_image_is_refused(images: Images, tmp_path: Path, change: dict[str, object]) -> None:
    writer = LayoutWriter()
    config = writer.blob(encode({**platform(HOST), "rootfs": {"diff_ids": [digest(ONE)]}}), spec.CONFIG)
    manifest = {"schemaVersion": 2, "config": config, "layers": [writer.blob(ONE, spec.LAYER)], **change}
    writer.top(writer.blob(encode(manifest), spec.MANIFEST))
    with pytest.raises(ImageFormatError):
        images.ensure(f"oci:{writer.write(tmp_path / 'l')}")
    assert_empty(images, tmp_path)


def test_a_layout_that_changed_is_read_again(images: Images, tmp_path: Path) -> None:
    writer = LayoutWriter()
    writer.top(writer.image(ONE))
    path = writer.write(tmp_path / "l")
    first = images.ensure(f"oci:{path}")
    assert images.ensure(f"oci:{path}") == first
    writer = LayoutWriter()
    writer.top(writer.image(TWO))
    writer.write(path)
    second = images.ensure(f"oci:{path}")
    assert second.digest != first.digest
    assert [image.reference for image in images.list() if image.digest == first.digest] == [""]


# Archives


@pytest.mark.parametrize("pack", ["", "gzip", "fifo"])
def test_an_oci_archive(images: Images, tmp_path: Path, pack: str) -> None:
    writer = LayoutWriter()
    writer.top(writer.image(ONE, TWO, annotations=named("docker.io/library/x:1")))
    path = writer.archive(tmp_path / "a.tar")
    if pack == "gzip":
        path.write_bytes(gzip.compress(path.read_bytes()))
    if pack == "fifo":
        data = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        if os.fork() == 0:
            path.write_bytes(data)
            os._exit(0)
    assert images.load(path) == ["docker.io/library/x:1"]
    if pack == "fifo":
        os.wait()
    assert contents(images, images.find("x:1")) == [ONE, TWO]


def test_create_from_an_archive_that_holds_one_image_or_several(images: Images, tmp_path: Path) -> None:
    writer = LayoutWriter()
    writer.top(writer.image(ONE, annotations=named("x:1")))
    path = writer.archive(tmp_path / "a.tar")
    assert contents(images, images.ensure(f"oci-archive:{path}")) == [ONE]
    assert images.ensure(f"docker-archive:{path}").reference == f"docker-archive:{path}"  # the content decides
    writer.top(writer.image(ONE, annotations=named("x:1")), writer.image(TWO, annotations=named("x:2")))
    writer.archive(path)
    with pytest.raises(InvalidArgumentError, match="holds several images"):
        images.ensure(f"oci-archive:{path}")
    assert images.load(path) == ["docker.io/library/x:1", "docker.io/library/x:2"]


def docker_files(*layers: bytes, tags: list[str] | None = None, gz: bool = False) -> dict[str, bytes]:
    config = encode(
        {
            **platform("amd64"),
            "config": {"Env": None},
            "rootfs": {"type": "layers", "diff_ids": [digest(x) for x in layers]},
        }
    )
    names = [f"{digest(layer)[7:20]}/layer.tar" for layer in layers]
    manifest = [{"Config": "config.json", "RepoTags": tags, "Layers": names}]
    data = dict(zip(names, (gzip.compress(layer) if gz else layer for layer in layers), strict=True))
    return {**data, "config.json": config, "manifest.json": encode(manifest)}


@pytest.mark.parametrize("gz", [False, True])
def test_docker_save(images: Images, tmp_path: Path, gz: bool) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(docker_files(ONE, TWO, tags=["debian:12", "host:5000/x/y:z"], gz=gz)))
    assert images.load(path) == ["docker.io/library/debian:12", "host:5000/x/y:z"]
    image = images.find("debian:12")
    assert contents(images, image) == [ONE, TWO]
    assert images.inspect("debian:12")["references"] == ["docker.io/library/debian:12", "host:5000/x/y:z"]


def test_docker_save_with_linked_layers_and_without_tags(images: Images, tmp_path: Path) -> None:
    files = docker_files(ONE, ONE)
    name = f"{digest(ONE)[7:20]}/layer.tar"
    files["real.tar"] = files.pop(name)
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(files, {name: "../real.tar"}))
    [loaded] = images.load(path)
    assert loaded.startswith("sha256:")
    assert contents(images, images.find(loaded)) == [ONE, ONE]


def test_the_oldest_docker_save(images: Images, tmp_path: Path) -> None:
    """Before 1.10: no manifest.json, every layer has a document that names its parent."""
    top = {
        **platform("amd64"),
        "id": "b",
        "parent": "a",
        "created": "2015-01-01T00:00:00Z",
        "config": {"Cmd": ["/bin/x"]},
    }
    files = {
        "repositories": encode({"old/name": {"1": "b"}}),
        "a/json": encode({"id": "a"}), "a/layer.tar": ONE, "b/json": encode(top), "b/layer.tar": TWO,
    }  # fmt: skip
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(files))
    assert images.load(path) == ["docker.io/old/name:1"]
    image = images.find("old/name:1")
    assert contents(images, image) == [ONE, TWO]
    assert image.config.cmd == ("/bin/x",)
    files["a/json"] = encode({"id": "a", "parent": "b"})
    path.write_bytes(tar_of(files))
    with pytest.raises(ImageFormatError, match="in a loop"):
        images.load(path)


def test_docker_25_writes_both_forms_and_the_oci_one_counts(images: Images, tmp_path: Path) -> None:
    writer = LayoutWriter()
    manifest = writer.image(ONE, compress=False)
    writer.top({**manifest, "annotations": {"io.containerd.image.name": "docker.io/library/debian:12", **named("12")}})
    layers = [f"blobs/sha256/{digest(ONE)[7:]}"]
    writer.files["manifest.json"] = encode([{"Config": "x", "RepoTags": ["debian:12"], "Layers": layers}])
    assert images.load(writer.archive(tmp_path / "a.tar")) == ["docker.io/library/debian:12"]
    assert images.find("debian:12").digest == manifest["digest"]


@pytest.mark.parametrize(
    "change",
    [
        {"manifest.json": b"{"}, {"manifest.json": b"{}"}, {"manifest.json": b"[]"}, {"manifest.json": b"[5]"},
        {"manifest.json": b'[{"Config": "none", "Layers": []}]'},
        {"manifest.json": b'[{"Config": "../../etc/passwd", "Layers": []}]'},
        {"manifest.json": b'[{"Config": "config.json", "Layers": ["x"]}]'}, {"config.json": b"{}"},
        {f"{digest(ONE)[7:20]}/layer.tar": TWO},
    ],
)  # fmt: skip
def test_damaged_docker_archives_leave_nothing(images: Images, tmp_path: Path, change: dict[str, bytes]) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({**docker_files(ONE, tags=["x:1"]), **change}))
    with pytest.raises(ImageFormatError):
        images.load(path)
    assert_empty(images, tmp_path)


def test_truncated_archives_leave_nothing(images: Images, tmp_path: Path) -> None:
    data = tar_of(docker_files(member("f", os.urandom(50_000)) + bytes(1024), tags=["x:1"]))
    path = tmp_path / "a.tar"
    for length in (0, 100, 512, 20_000, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(ImageFormatError):
            images.load(path)
    path.write_bytes(gzip.compress(data)[:20_000])
    with pytest.raises(ImageFormatError, match="truncated"):
        images.load(path)
    assert_empty(images, tmp_path)


def test_a_root_file_system_is_no_image_archive(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(rootfs())
    with pytest.raises(ImageFormatError, match="no image archive") as caught:
        images.load(path)
    assert caught.value.hint
    assert "berth image import" in caught.value.hint
    path.write_bytes(tar_of(docker_files(ONE)))
    with pytest.raises(ImageFormatError, match="no root file system") as caught:
        images.import_(path, "x")
    assert caught.value.hint == f"it looks like an image archive: berth image load {path}"
    with pytest.raises(NotFoundError, match="can't read /no/where: No such file"):
        images.load(Path("/no/where"))
    with pytest.raises(ImageFormatError, match="is a directory"):
        images.load(tmp_path)
    assert_empty(images, tmp_path)


# Root file systems


@pytest.mark.parametrize("pack", ["", "gzip", "xz", "zstd", "bzip2"])
def test_a_root_file_system_from_an_archive(images: Images, tmp_path: Path, pack: str) -> None:
    if pack and find_program(pack) is None:
        pytest.skip(f"{pack} is not installed")
    data = rootfs(183)
    path = tmp_path / "rootfs.tar"
    path.write_bytes(subprocess.run([pack, "-c"], input=data, capture_output=True, check=True).stdout if pack else data)
    image = images.ensure(f"rootfs:{path}")
    assert (image.platform, image.config.cmd) == ("linux/arm64", ("/sbin/init",))
    assert image.config.platform.variant == "v8"
    assert image.config.diff_ids == (digest(data),)
    assert contents(images, image) == [data]
    assert images.ensure(f"rootfs:{path}") == image  # not read again
    with pytest.raises(NotFoundError, match="no image for linux/amd64"):
        images.ensure(f"rootfs:{path}", platform="linux/amd64")


def test_a_root_file_system_from_a_directory(images: Images, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/sh").write_bytes(elf())
    os.link(root / "bin/sh", root / "bin/bash")
    os.symlink("../bin/sh", root / "bin/init")
    (root / "sparse").touch()
    os.truncate(root / "sparse", 50 << 20)
    os.setxattr(root / "bin/sh", "user.note", b"kept\0")
    os.mkfifo(root / "fifo")
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "sock"))
        image = images.import_(root, "mine:1")
    assert image.reference == "docker.io/library/mine:1"
    [data] = contents(images, image)
    assert len(data) < 1 << 20
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {info.name: info for info in tar}
    assert set(found) == {".", "./bin", "./bin/sh", "./bin/bash", "./bin/init", "./sparse", "./fifo"}
    assert sorted((found["./bin/sh"].islnk(), found["./bin/bash"].islnk())) == [False, True]
    assert found["./sparse"].size == 50 << 20
    first = found["./bin/bash" if found["./bin/sh"].islnk() else "./bin/sh"]
    assert first.pax_headers["SCHILY.xattr.user.note"] == "kept\0"


def test_the_architecture_is_that_of_the_shell_or_the_init(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "r.tar"
    busybox = (
        directory("bin")
        + member("bin/busybox", elf(183))
        + symlink("bin/sh", "/bin/busybox")
        + member("bin/qemu", elf(62))
    )
    path.write_bytes(busybox)
    assert images.ensure(f"rootfs:{path}").platform == "linux/arm64"
    init_only = member("usr/lib/systemd/systemd", elf(62)) + symlink("lib", "usr/lib") + symlink("sbin", "usr/sbin")
    path.write_bytes(init_only + symlink("usr/sbin/init", "../../lib/systemd/systemd"))
    assert images.ensure(f"rootfs:{path}").platform == "linux/amd64"
    path.write_bytes(directory("bin") + member("bin/busybox", elf(183)) + hardlink("bin/sh", "bin/busybox"))
    assert images.ensure(f"rootfs:{path}").platform == "linux/arm64"
    path.write_bytes(symlink("bin/sh", "sh") + symlink("sbin", "sbin/sbin") + member("usr/bin/x", elf(62)))
    assert images.ensure(f"rootfs:{path}").platform == "linux/amd64"
    assert architecture_of(elf(243)) == "riscv64"
    assert architecture_of(b"#!/bin/sh" + bytes(99)) == architecture_of(b"") == ""


def test_what_is_no_root_file_system_is_refused(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "r.tar"
    for data in (
        b"",
        b"not a tar archive" * 99,
        rootfs()[:1000],
        gzip.compress(rootfs())[:200],
        member("f", b"x") + bytes(1024),
    ):
        path.write_bytes(data)
        with pytest.raises(ImageFormatError):
            images.ensure(f"rootfs:{path}")
    with pytest.raises(NotFoundError, match="can't read"):
        images.ensure(f"rootfs:{tmp_path}/none.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageFormatError, match="no root file system"):
        images.ensure(f"rootfs:{tmp_path}/empty")
    assert_empty(images, tmp_path)


def test_an_unreadable_directory_is_one_error(images: Images, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (tmp_path / "root/bin").mkdir(parents=True)
    (tmp_path / "root/bin/sh").write_bytes(elf())
    (tmp_path / "root/closed").mkdir(mode=0)
    with pytest.raises(BerthError, match=r"tar failed.*ermission denied"):
        images.ensure(f"rootfs:{tmp_path}/root")
    assert_empty(images, tmp_path)
