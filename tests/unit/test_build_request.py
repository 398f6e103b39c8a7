"""What is asked for becomes what buildah is told: options, mounts, the images it is built on. Nothing is started."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from berth import build as builds
from berth import userns
from berth.build import Request, build
from berth.buildroom import RoomPlan
from berth.errors import BerthError, InvalidArgumentError, NotFoundError, UnsupportedError
from berth.images import Images
from berth.layout import Layout
from berth.oci import spec
from berth.oci.digest import digest_of
from berth.progress import Progress, Silent
from berth.userns import Extent, IdMap
from registries import FakeRegistry, clear_environment
from tars import END, member, rootfs

OUTPUT = 2


@contextmanager
def silent() -> Generator[Progress]:
    yield Silent()


class Room:
    """Stands where `berth.buildroom` would run: keeps the plan, and leaves what buildah would."""

    def __init__(self, status: int = 0) -> None:
        self.plan: RoomPlan | None = None
        self.layouts: dict[str, object] = {}
        self._status = status

    def call(self, _function: str, arguments: dict[str, object], **_: object) -> object:
        self.plan = arguments["plan"]  # type: ignore[assignment]
        work = Path(next(mount["source"] for mount in self.options["mounts"] if mount["target"] == "/mnt/work"))
        self.text = (work / "Containerfile").read_text()
        self.ignored = (work / "ignore").read_bytes() if (work / "ignore").exists() else None
        for base in self.options["bases"]:
            place = work / "bases" / Path(base["layout"]).name
            self.layouts[base["id"]] = json.loads((place / "index.json").read_bytes())
            assert (place / "blobs/sha256" / base["id"].removeprefix("sha256:")).exists()
        if self._status == 0:
            (work / "out").mkdir()
            write_image(work / "out")
        return {"status": self._status}

    @property
    def options(self) -> RoomPlan:
        assert self.plan is not None
        return self.plan


def write_image(folder: Path, *, layer: bytes = (member("new") + END), diff_id: str | None = None) -> None:
    """Write what buildah's `dir:` transport does."""
    config = json.dumps(
        {
            "architecture": spec.host_platform().architecture, "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [diff_id or digest_of(layer)]},
        }
    ).encode()  # fmt: skip
    documents = {"config": (spec.CONFIG, config), "layer": (spec.LAYER, layer)}
    described = {
        name: {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}
        for name, (media_type, data) in documents.items()
    }
    for _, data in documents.values():
        (folder / digest_of(data).removeprefix("sha256:")).write_bytes(data)
    manifest = {"schemaVersion": 2, "config": described["config"], "layers": [described["layer"]]}
    annotations = {"org.opencontainers.image.base.name": "docker.io/library/base:1",
                   "org.opencontainers.image.base.digest": "sha256:" + "0" * 64}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({**manifest, "annotations": annotations}))


@pytest.fixture
def images(layout: Layout, tmp_path: Path) -> Images:
    images = Images(layout)
    path = tmp_path / "rootfs.tar"
    path.write_bytes(rootfs())
    images.import_(path, "base:1")
    return images


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text("FROM base:1\nRUN true\n")
    return folder


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    room = Room()
    settle(monkeypatch, room)
    return room


def settle(monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    monkeypatch.setattr(builds, "require_program", lambda _name, package: Path("/usr/bin", package))
    monkeypatch.setattr(userns, "call", room.call)
    monkeypatch.setattr(builds, "_idmap", lambda: IdMap((Extent(0, os.getuid(), 1),), (Extent(0, os.getgid(), 1),)))


def test_an_image_is_built_stored_and_named(images: Images, layout: Layout, context: Path, room: Room) -> None:
    built = build(Request(context, tags=("a/b", "c:1")), images, layout, shown=silent, output=OUTPUT)
    assert built.reference == "docker.io/a/b:latest"
    assert images.find("c:1").digest == built.digest
    assert room.text == "FROM base:1\nRUN true\n"
    assert room.options["options"][-1] == "/mnt/context"
    assert [base["name"] for base in room.options["bases"]] == ["docker.io/library/base:1"]
    assert not list(layout.build.glob("work-*"))


@pytest.mark.usefixtures("room")
def test_without_a_name_it_is_known_by_its_digest(images: Images, layout: Layout, context: Path) -> None:
    built = build(Request(context), images, layout, shown=silent, output=OUTPUT)
    assert built.reference == ""
    assert images.find(built.digest).digest == built.digest


@pytest.mark.usefixtures("room")
def test_the_base_is_told_by_its_digest_in_the_store(images: Images, layout: Layout, context: Path) -> None:
    built = build(Request(context), images, layout, shown=silent, output=OUTPUT)
    assert built.annotations["org.opencontainers.image.base.digest"] == images.find("base:1").digest


def test_pull_asks_for_newer_bases(
    images: Images, layout: Layout, tmp_path: Path, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_environment(monkeypatch.delenv, monkeypatch.setenv, tmp_path / "home")
    with FakeRegistry().serving() as registry:
        name = f"{registry.host}/team/base:1"
        old = registry.put_image("team/base:1", rootfs())
        images.ensure(name)
        new = registry.put_image("team/base:1", rootfs(), b"newer")
        request = Request(tmp_path, text=f"FROM {name}\nFROM {registry.host}/team/base@{old.digest}\n")
        seen: list[list[str]] = []
        for pull in (False, True):
            build(dataclasses.replace(request, pull=pull), images, layout, shown=silent, output=OUTPUT)
            seen.append([Path(base["layout"]).name for base in room.options["bases"]])
            assert "--pull-never" in room.options["options"], "buildah itself asks nobody"
        was, now = (digest.removeprefix("sha256:") for digest in (old.digest, new.digest))
        assert seen == [[was, was], [now, was]]
        registry.behaviours.append(lambda exchange: exchange.answer(403))
        build(dataclasses.replace(request, pull=True), images, layout, shown=silent, output=OUTPUT)
        assert [Path(base["layout"]).name for base in room.options["bases"]] == [now, was], "what is stored"


def test_layers_of_the_base_are_shared_as_they_are_stored(
    images: Images, layout: Layout, context: Path, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(function: str, arguments: dict[str, object], **others: object) -> object:
        answer = Room.call(room, function, arguments, **others)
        out = Path(room.options["mounts"][1]["source"]) / "out"
        base = images.manifest(images.find("base:1"))
        for path in out.iterdir():
            path.unlink()
        # Another form of the same layer: were it taken, its digest would differ from the base's.
        write_image(out, layer=b"another form", diff_id=base.layers[0].digest)
        return answer

    monkeypatch.setattr(userns, "call", call)
    built = build(Request(context), images, layout, shown=silent, output=OUTPUT)
    assert images.manifest(built).layers == images.manifest(images.find("base:1")).layers


def test_what_buildah_wrote_is_verified(
    images: Images, layout: Layout, context: Path, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(function: str, arguments: dict[str, object], **others: object) -> object:
        answer = Room.call(room, function, arguments, **others)
        out = Path(room.options["mounts"][1]["source"]) / "out"
        layer = digest_of(member("new") + END).removeprefix("sha256:")
        (out / layer).write_bytes(member("old") + END)
        return answer

    monkeypatch.setattr(userns, "call", call)
    with pytest.raises(BerthError, match="damaged"):
        build(Request(context, tags=("x",)), images, layout, shown=silent, output=OUTPUT)
    assert [image.reference for image in images.list()] == ["docker.io/library/base:1"]


def test_a_failed_build_stores_nothing_and_asks_for_a_clean_up(
    images: Images, layout: Layout, context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch, Room(status=125))
    with pytest.raises(BerthError, match="status 125"):
        build(Request(context, tags=("x",)), images, layout, shown=silent, output=OUTPUT)
    left = list(layout.build.glob("work-*"))
    assert [list(path.iterdir()) for path in left] == [[]]
    second = Room()
    settle(monkeypatch, second)
    build(Request(context), images, layout, shown=silent, output=OUTPUT)
    assert second.options["clean"]
    assert not list(layout.build.glob("work-*"))


def test_options_are_handed_on(
    images: Images, layout: Layout, context: Path, room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cret")
    monkeypatch.setenv("MINE", "m")
    monkeypatch.setenv("TOKEN", "t0ken")
    monkeypatch.delenv("ABSENT", raising=False)
    request = Request(
        context, arguments=("A=1", "MINE", "ABSENT"), target="test", use_cache=False, quiet=True,
        secrets=(f"id=file,src={secret}", "id=word,env=TOKEN"), ssh=(f"default={secret}",),
    )  # fmt: skip
    build(request, images, layout, shown=silent, output=OUTPUT)
    words = room.options["options"]
    for first, second in (
        ("--build-arg", "A=1"), ("--build-arg", "MINE=m"), ("--target", "test"),
        ("--secret", "id=file,src=/mnt/secrets/0"), ("--secret", "id=word,env=BERTH_SECRET_1"),
        ("--ssh", "default=/mnt/ssh/0"), ("--isolation", "chroot"),
    ):  # fmt: skip
        assert (first, second) in itertools.pairwise(words)
    assert {"--no-cache", "--quiet", "--pull-never"} <= set(words)
    assert not any("ABSENT" in word or "t0ken" in word for word in words)
    assert room.options["environment"] == {"BERTH_SECRET_1": "t0ken"}
    targets = {mount["target"]: mount for mount in room.options["mounts"]}
    assert targets["/mnt/secrets/0"]["read_only"]
    assert targets["/mnt/context"]["read_only"]


def test_a_base_by_digest_is_found_whatever_it_is_called(
    images: Images, layout: Layout, context: Path, room: Room
) -> None:
    reference = f"other/name@{images.find('base:1').digest}"
    (context / "Dockerfile").write_text(f"FROM {reference}\n")
    build(Request(context), images, layout, shown=silent, output=OUTPUT)
    words = room.options["options"]
    image_id = room.options["bases"][0]["id"].removeprefix("sha256:")
    assert f"{reference}=container-image://{image_id}" in words


@pytest.mark.parametrize("reference", ["rootfs:/etc", "oci-archive:/root/x.tar", "oci:/x", "docker-archive:/x"])
def test_a_dockerfile_can_not_name_files_of_the_host(
    images: Images, layout: Layout, context: Path, room: Room, reference: str
) -> None:
    (context / "Dockerfile").write_text(f"FROM {reference}\n")
    with pytest.raises(InvalidArgumentError, match="can't be built on"):
        build(Request(context), images, layout, shown=silent, output=OUTPUT)
    assert room.plan is None


def test_the_file_is_found_as_docker_and_podman_find_it(
    images: Images, layout: Layout, context: Path, room: Room
) -> None:
    (context / "Containerfile").write_text("FROM base:1\n# Containerfile\n")
    (context / "other").write_text("FROM base:1\n# other\n")
    (context / "other.dockerignore").write_text("secret\n")
    build(Request(context), images, layout, shown=silent, output=OUTPUT)
    assert "# Containerfile" in room.text
    assert room.ignored is None
    build(Request(context, file=Path("other")), images, layout, shown=silent, output=OUTPUT)
    assert "# other" in room.text
    assert room.ignored == b"secret\n"
    build(Request(context, text="FROM base:1\n# stdin\n"), images, layout, shown=silent, output=OUTPUT)
    assert "# stdin" in room.text


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"secrets": ("src=/x",)}, InvalidArgumentError),
        ({"secrets": ("id=a,src=/does/not/exist",)}, NotFoundError),
        ({"secrets": ("id=a,mode=7",)}, InvalidArgumentError),
        ({"secrets": ("id=a,env=BERTH_NO_SUCH_VARIABLE",)}, InvalidArgumentError),
        ({"ssh": ("default=/does/not/exist",)}, NotFoundError),
        ({"arguments": ("=x",)}, InvalidArgumentError),
        ({"tags": ("Not A Name",)}, InvalidArgumentError),
        ({"tags": ("oci:/x",)}, InvalidArgumentError),
        ({"platform": "plan9/mips"}, InvalidArgumentError),
        ({"file": Path("absent")}, NotFoundError),
        ({"context": Path("/does/not/exist")}, NotFoundError),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_done(
    images: Images, layout: Layout, context: Path, room: Room, changes: dict[str, object], error: type[BerthError]
) -> None:
    request = Request(**{"context": context, **changes})  # type: ignore[arg-type]
    with pytest.raises(error):
        build(request, images, layout, shown=silent, output=OUTPUT)
    assert room.plan is None


def test_without_buildah_it_says_how_to_get_it(
    images: Images, layout: Layout, context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("berth.proc.find_program", {"apt-get": Path("/usr/bin/apt-get")}.get)
    with pytest.raises(UnsupportedError, match="buildah is not installed") as caught:
        build(Request(context), images, layout, shown=silent, output=OUTPUT)
    assert caught.value.hint is not None
    assert "install buildah" in caught.value.hint
