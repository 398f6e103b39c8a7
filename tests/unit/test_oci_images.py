"""The API of images: names, digests, what is in use, saving and loading. As any user, below tmp_path."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from berth.errors import (
    BerthError,
    ImageFormatError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    RegistryError,
)
from berth.images import Images, StoredImage
from berth.layout import Layout
from registries import refuse_the_world
from tars import LayoutWriter, member, named, rootfs, tar_of

NOBODY: dict[str, Sequence[str]] = {}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_the_world(monkeypatch)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(*(tmp_path / name for name in ("data", "run", "config", "cache")))


@pytest.fixture
def images(layout: Layout) -> Images:
    return Images(layout)


def put(images: Images, tmp_path: Path, reference: str, note: bytes = b"") -> StoredImage:
    path = tmp_path / "r.tar"
    path.write_bytes(rootfs()[:-1024] + member("note", note) + bytes(1024))
    return images.import_(path, reference)


def in_use(digest: str = "", *machines: str) -> dict[str, Sequence[str]]:
    return {digest: machines} if digest else {}


def test_an_image_is_found_by_any_of_its_names(images: Images, tmp_path: Path) -> None:
    image = put(images, tmp_path, "debian:12")
    assert image.reference == "docker.io/library/debian:12"
    for text in (
        "debian:12",
        "docker://debian:12",
        "docker.io/library/debian:12",
        image.digest,
        image.digest[:19],
        image.digest[7:15],
    ):
        assert images.find(text) == image
        assert images.ensure(text) == image
    for text in ("debian", "debian:13", "sha256:" + "0" * 64, "sha256:zzzz", "0000"):
        with pytest.raises(NotFoundError, match=f"image '{text}' not found"):
            images.find(text)
    with pytest.raises(NotFoundError):
        images.ensure("sha256:" + "0" * 64)


def test_the_beginning_of_a_digest_must_fit_one_image_only(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [StoredImage("a", "sha256:abcd" + "0" * 60), StoredImage("b", "sha256:abcd1" + "0" * 59)]
    monkeypatch.setattr(Images, "list", lambda _self: found)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    put(images, tmp_path, "x")
    assert images.find("abcd0").reference == "a"
    with pytest.raises(InvalidArgumentError, match="several"):
        images.find("sha256:abcd")


def test_a_name_of_hex_digits_is_a_name_first(images: Images, tmp_path: Path) -> None:
    image = put(images, tmp_path, "cafe")
    assert images.find("cafe") == image
    with pytest.raises(RegistryError):
        images.ensure("decade")


def test_listing_and_inspecting(images: Images, tmp_path: Path) -> None:
    image = put(images, tmp_path, "x:1")
    images.tag("x:1", "y:2")
    assert [item.reference for item in images.list()] == ["docker.io/library/x:1", "docker.io/library/y:2"]
    shown = images.inspect("y:2")
    assert json.loads(json.dumps(shown)) == shown
    assert shown["references"] == ["docker.io/library/x:1", "docker.io/library/y:2"]
    assert (shown["digest"], shown["platform"], shown["problem"]) == (image.digest, "linux/amd64", "")
    assert isinstance(shown["size"], int)
    assert shown["size"] > 1000
    assert images.size() > shown["size"]
    assert image.created.endswith("Z")


def test_a_damaged_image_is_listed_with_its_problem_and_can_be_removed(
    images: Images, layout: Layout, tmp_path: Path
) -> None:
    image = put(images, tmp_path, "x")
    put(images, tmp_path, "fine", b"other")
    for blob in (layout.images / "blobs/sha256").iterdir():
        if blob.name == image.digest[7:]:
            blob.write_bytes(b"{}")
    broken, fine = images.list()
    assert "damaged" in broken.problem
    assert (broken.reference, fine.problem) == ("docker.io/library/x:latest", "")
    assert images.inspect("x")["problem"] == broken.problem
    with pytest.raises(ImageFormatError, match=r"image 'docker\.io/library/x:latest' is damaged"):
        images.layers(broken)
    with pytest.raises(BerthError, match="nothing is cleaned up"):
        images.prune(lambda: NOBODY)
    images.remove(["x"], lambda: NOBODY)
    images.prune(lambda: NOBODY)
    assert [item.reference for item in images.list()] == ["docker.io/library/fine:latest"]


def test_a_damaged_image_is_brought_in_again(images: Images, layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "r.tar"
    path.write_bytes(rootfs())
    image = images.ensure(f"rootfs:{path}")
    (layout.images / "blobs/sha256" / image.config.diff_ids[0][7:]).unlink()
    assert images.find(f"rootfs:{path}").problem
    assert not images.ensure(f"rootfs:{path}").problem


# Removing


def test_removing_names_and_with_the_last_one_the_image(images: Images, tmp_path: Path) -> None:
    image = put(images, tmp_path, "x:1")
    images.tag("x:1", "y:2")
    assert images.remove(["x:1"], lambda: in_use(image.digest, "dev")) == ["docker.io/library/x:1"]
    with pytest.raises(
        InvalidStateError, match=r"image 'docker\.io/library/y:2' is used by machine 'a', 'b'"
    ) as caught:
        images.remove(["y:2"], lambda: in_use(image.digest, "a", "b"))
    assert caught.value.hint == "berth rm a b"
    assert images.remove(["y:2"], lambda: NOBODY) == ["docker.io/library/y:2"]
    assert images.list() == []
    assert images.size() == 0


def test_removing_is_all_or_nothing(images: Images, tmp_path: Path) -> None:
    put(images, tmp_path, "x:1")
    with pytest.raises(NotFoundError, match="image 'z' not found"):
        images.remove(["x:1", "z"], lambda: NOBODY)
    assert len(images.list()) == 1
    image = put(images, tmp_path, "y:1", b"other")
    images.tag("y:1", "y:2")
    with pytest.raises(InvalidStateError):
        images.remove(["x:1", "y:1", "y:2"], lambda: in_use(image.digest, "dev"))
    assert len(images.list()) == 3
    assert len(images.remove(["x:1", "y:1", "y:2", "y:2"], lambda: NOBODY)) == 3


def test_a_digest_removes_an_image_with_all_its_names(images: Images, tmp_path: Path) -> None:
    image = put(images, tmp_path, "x:1")
    images.tag("x:1", "y:2")
    with pytest.raises(InvalidStateError):
        images.remove([image.digest], lambda: in_use(image.digest, "dev"))
    assert images.remove([image.digest[:19]], lambda: NOBODY) == [image.digest]
    assert images.list() == []


def test_an_untagged_image_can_be_removed_by_hex_digits(images: Images, tmp_path: Path) -> None:
    first = put(images, tmp_path, "x")
    put(images, tmp_path, "x", b"newer")
    assert images.remove([first.digest[7:19]], lambda: NOBODY) == [first.digest]
    assert [item.reference for item in images.list()] == ["docker.io/library/x:latest"]


def test_pruning(images: Images, tmp_path: Path) -> None:
    first = put(images, tmp_path, "x", b"1")
    second = put(images, tmp_path, "x", b"2")
    third = put(images, tmp_path, "x", b"3")
    assert [item.reference for item in images.list()] == ["", "", third.reference]
    assert images.prune(lambda: in_use(first.digest, "dev"))[0] == [second.digest]
    removed, freed = images.prune(lambda: NOBODY)
    assert removed == [first.digest]
    assert freed > 1000
    assert images.prune(lambda: in_use(third.digest, "dev"), unused=True) == ([], 0)
    assert images.prune(lambda: NOBODY, unused=True)[0] == [third.digest]


# Names


@pytest.mark.parametrize("name", ["oci:/x", "rootfs:/x", "x@sha256:" + "0" * 64, "UPPER", "a b", "sha256:/x", ""])
def test_names_that_no_image_can_have(images: Images, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="invalid image"):
        put(images, tmp_path, name)
    assert images.list() == []


def test_tagging_moves_a_name(images: Images, tmp_path: Path) -> None:
    first, second = put(images, tmp_path, "a"), put(images, tmp_path, "b", b"2")
    assert images.tag("a", "c") == images.find("c")
    assert images.tag("b", "c").digest == second.digest
    assert images.tag(first.digest, "c").digest == first.digest
    with pytest.raises(NotFoundError):
        images.tag("none", "d")


def test_paths_are_made_absolute(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.tar").write_bytes(rootfs())
    monkeypatch.chdir(tmp_path)
    image = images.ensure("rootfs:r.tar")
    assert image.reference == f"rootfs:{tmp_path}/r.tar"
    monkeypatch.chdir("/")
    assert images.find(f"rootfs:{tmp_path}/./r.tar") == image
    (tmp_path / "r.tar").unlink()
    assert images.ensure(f"rootfs:{tmp_path}/r.tar") == image  # what is in the store needs its source no more


def test_a_file_that_changed_is_imported_again(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "r.tar"
    path.write_bytes(rootfs())
    first = images.ensure(f"rootfs:{path}")
    path.write_bytes(rootfs(183))
    assert images.ensure(f"rootfs:{path}").platform == "linux/arm64"
    assert [item.digest for item in images.list() if not item.reference] == [first.digest]


def test_a_registry_out_of_reach_is_named(images: Images) -> None:
    with pytest.raises(RegistryError, match=r"can't reach registry example\.com: its name can't be resolved"):
        images.ensure("example.com/some/thing:1")


# Saving and loading


def test_what_is_saved_can_be_loaded(images: Images, layout: Layout, tmp_path: Path) -> None:
    first, second = put(images, tmp_path, "x:1"), put(images, tmp_path, "y:2", b"2")
    images.tag("x:1", "z:3")
    archive = tmp_path / "a.tar"
    images.save(["x:1", "z:3", second.digest], archive)
    again = tmp_path / "b.tar"
    images.save(["x:1", "z:3", second.digest], again)
    assert archive.read_bytes() == again.read_bytes()
    other = Images(Layout(tmp_path / "other", layout.runtime, layout.config, layout.cache))
    assert other.load(archive) == [f"docker.io/library/{name}" for name in ("x:1", "z:3", "y:2")]
    assert other.find("z:3").digest == first.digest
    with pytest.raises(NotFoundError):
        images.save(["none"], tmp_path / "c.tar")
    assert not (tmp_path / "c.tar").exists()


def test_saving_to_a_pipe(images: Images, tmp_path: Path) -> None:
    put(images, tmp_path, "x:1")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = os.fork()
    if child == 0:
        (tmp_path / "copy.tar").write_bytes(fifo.read_bytes())
        os._exit(0)
    images.save(["x:1"], fifo)
    os.waitpid(child, 0)
    assert images.load(tmp_path / "copy.tar") == ["docker.io/library/x:1"]


def test_saving_where_nothing_can_be_written(images: Images, tmp_path: Path) -> None:
    put(images, tmp_path, "x:1")
    with pytest.raises(BerthError, match=f"can't write {tmp_path}/no/where: No such file"):
        images.save(["x:1"], tmp_path / "no/where")


def test_progress_is_told(images: Images, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []

    class Heard:
        def step(self, text: str) -> None: ...

        def advance(self, done: int, total: int | None) -> None:
            told.append((done, total))

        def note(self, text: str) -> None: ...

    path = tmp_path / "r.tar"
    path.write_bytes(rootfs())
    images.ensure(f"rootfs:{path}", progress=Heard())
    assert told[-1] == (len(rootfs()), len(rootfs()))
    images.save([f"rootfs:{path}"], tmp_path / "a.tar", progress=Heard())
    assert told[-1][0] == told[-1][1]
    del told[:]
    images.load(tmp_path / "a.tar", progress=Heard())
    assert told == sorted(told)
    assert told


def test_an_archive_with_a_name_that_is_none_is_loaded_by_digest(images: Images, tmp_path: Path) -> None:
    writer = LayoutWriter()
    manifest = writer.image(member("f") + bytes(1024), annotations=named("Not A Name"))
    writer.top(manifest)
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(writer.files))
    assert images.load(path) == [manifest["digest"]]


def test_layers_are_open_and_outlive_the_image(images: Images, tmp_path: Path) -> None:
    image = put(images, tmp_path, "x:1")
    with images.opened_layers(image) as layers:
        images.remove(["x:1"], lambda: NOBODY)
        [(fd, media_type)] = layers
        assert media_type == "application/vnd.oci.image.layer.v1.tar"
        assert os.fstat(fd).st_size == len(rootfs()) + 512
    with pytest.raises(NotFoundError):
        images.layers(image)
