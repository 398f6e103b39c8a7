"""`image ls`: what images share, whether they boot, how they were adapted."""

from __future__ import annotations

from pathlib import Path

import pytest

from berth.images import Images, ListedImage
from berth.layout import Layout
from berth.oci import spec
from berth.oci.derive import BASE_DIGEST, derive
from berth.oci.store import Ingest, Store
from tars import END, member, rootfs

INIT = member("sbin/init", b"\x7fELF" + bytes(60), mode=0o755)


def put(images: Images, folder: Path, reference: str, extra: bytes = b"") -> None:
    path = folder / "rootfs.tar"
    path.write_bytes(rootfs()[:-1024] + extra + END)
    images.import_(path, reference)


def put_above(layout: Layout, images: Images, base: str, reference: str, annotations: dict[str, str]) -> None:
    """Make an image of `base` and one more layer, with an init in it."""
    store = Store(layout.images)
    digest = images.find(base).digest
    entry = next(item for item in store.entries() if item.digest == digest)

    def fill(ingest: Ingest) -> spec.Descriptor:
        with ingest.scratch() as layer:
            layer.write(INIT + END)
            layer.seek(0)
            return derive(store, ingest, entry, layer, created_by="test", annotations=annotations)

    images.add(fill, [reference])


@pytest.fixture
def images(layout: Layout) -> Images:
    return Images(layout)


def listed(images: Images) -> dict[str, ListedImage]:
    return {item.image.reference.rpartition("/")[2]: item for item in images.list_detailed()}


def test_what_is_shared_is_told_apart(layout: Layout, images: Images, tmp_path: Path) -> None:
    put(images, tmp_path, "base:1")
    put_above(layout, images, "base:1", "above:1", {})
    put(images, tmp_path, "alone:1", member("note", b"other"))
    images.tag("base:1", "again:1")
    found = listed(images)
    layer = images.manifest(images.find("base:1")).layers[0].size
    assert found["base:1"].shared == found["above:1"].shared == layer
    assert found["again:1"].unique == found["base:1"].unique < 2000
    assert found["above:1"].unique > len(INIT)
    assert found["alone:1"].shared == 0
    assert found["alone:1"].unique > found["alone:1"].image.size


def test_removing_an_image_frees_what_is_unique(layout: Layout, images: Images, tmp_path: Path) -> None:
    put(images, tmp_path, "base:1")
    put_above(layout, images, "base:1", "above:1", {})
    unique = listed(images)["above:1"].unique
    before = images.size()
    images.remove(["above:1"], dict)
    assert before - images.size() == unique


def test_an_image_boots_that_has_an_init(layout: Layout, images: Images, tmp_path: Path) -> None:
    put(images, tmp_path, "base:1")
    put_above(layout, images, "base:1", "above:1", {"dev.berth.adapted.recipe": "debian 1"})
    found = listed(images)
    assert [found["base:1"].bootable, found["above:1"].bootable] == [False, True]
    base = images.find("base:1").digest
    assert found["above:1"].image.annotations[BASE_DIGEST] == base
    assert found["above:1"].to_json()["adapted"] == {"recipe": "debian 1", "base": base}
    assert found["base:1"].to_json()["adapted"] is None


def test_its_name_is_given_in_parts(images: Images, tmp_path: Path) -> None:
    put(images, tmp_path, "host:5000/team/dev:today")
    shown = images.list_detailed()[0].to_json()
    assert (shown["repository"], shown["tag"]) == ("host:5000/team/dev", "today")
    put(images, tmp_path, "host:5000/team/dev:today", member("note", b"newer"))
    nameless = next(item.to_json() for item in images.list_detailed() if not item.image.reference)
    assert (nameless["repository"], nameless["tag"]) == (None, None)


def test_a_damaged_image_is_listed(layout: Layout, images: Images, tmp_path: Path) -> None:
    put(images, tmp_path, "base:1")
    layer = images.manifest(images.find("base:1")).layers[0].digest
    (layout.images / "blobs/sha256" / layer.removeprefix("sha256:")).unlink()
    found = listed(images)["base:1"]
    assert found.bootable is None
    assert "missing" in found.image.problem
