"""The store: whole or absent, whoever dies, whoever else works on it. As any user, below tmp_path."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from berth.errors import BerthError, ImageFormatError, NotFoundError, StateFormatError
from berth.oci import spec
from berth.oci.digest import parse_digest
from berth.oci.spec import Descriptor, ImageConfig, Manifest, Platform
from berth.oci.store import Ingest, Store
from tars import digest

AMD64 = Platform("linux", "amd64")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "images")


def add_image(ingest: Ingest, layer: bytes, note: str = "") -> Descriptor:
    blob = ingest.add([layer[:3], layer[3:]], where="test")
    config = ingest.add_json(ImageConfig(AMD64, note).to_json(), spec.CONFIG)
    return ingest.add_json(Manifest(config, (blob.described(spec.LAYER),)).to_json(), spec.MANIFEST)


def put(store: Store, layer: bytes, *references: str) -> Descriptor:
    with store.ingest() as ingest:
        manifest = add_image(ingest, layer)
        ingest.commit(manifest, references)
    return manifest


def names(store: Store) -> dict[str, str]:
    return {entry.annotations.get(spec.REF_NAME, ""): entry.digest for entry in store.entries()}


def blobs(store: Store) -> set[str]:
    return set(os.listdir(store.root / "blobs/sha256"))


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def collect(store: Store) -> int:
    with store.exclusive() as lock:
        return store.collect(lock)


def test_nothing_is_made_by_looking(store: Store) -> None:
    assert store.entries() == []
    assert store.blob_bytes() == 0
    assert not store.root.exists()


def test_an_image_is_stored_as_an_oci_layout(store: Store) -> None:
    manifest = put(store, b"layer", "docker.io/library/x:1")
    assert json.loads((store.root / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((store.root / "index.json").read_bytes())
    assert index["manifests"][0]["annotations"] == {"org.opencontainers.image.ref.name": "docker.io/library/x:1"}
    assert index["manifests"][0]["digest"] == manifest.digest
    for path in (store.root / "blobs/sha256").iterdir():
        assert digest(path.read_bytes()) == f"sha256:{path.name}"
    layer = store.manifest(manifest).layers[0]
    fd = store.open(layer)
    assert os.read(fd, 10) == b"layer"
    os.close(fd)
    assert store.config(store.manifest(manifest).config).platform == AMD64
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert os.listdir(store.root / "ingest") == []


def test_what_is_not_committed_is_gone(store: Store) -> None:
    with store.ingest() as ingest:
        add_image(ingest, b"layer")
    with store.ingest() as ingest:
        ingest.commit(add_image(ingest, b"one"), ["one"])
        add_image(ingest, b"two")
    assert list(names(store)) == ["one"]
    assert len(blobs(store)) == 3
    assert os.listdir(store.root / "ingest") == []


@pytest.mark.parametrize(
    ("data", "why"), [(b"layeX", "damaged"), (b"laye", "truncated"), (b"layer and more", "longer"), (b"", "truncated")]
)
def test_what_is_not_what_was_expected_is_refused(store: Store, data: bytes, why: str) -> None:
    expected = Descriptor(spec.LAYER, parse_digest(digest(b"layer"), where=""), 5)
    with store.ingest() as ingest:
        with pytest.raises(ImageFormatError, match=why):
            ingest.add(iter([data]), where="test", expected=expected)
        assert not ingest.has(expected)
        assert [name for name in os.listdir(next((store.root / "ingest").iterdir())) if name != "lock"] == []


def test_an_incomplete_image_is_not_committed(store: Store) -> None:
    with store.ingest() as ingest:
        missing = Descriptor(spec.LAYER, parse_digest(digest(b"gone"), where=""), 4)
        config = ingest.add_json(ImageConfig(AMD64).to_json(), spec.CONFIG)
        manifest = ingest.add_json(Manifest(config, (missing,)).to_json(), spec.MANIFEST)
        with pytest.raises(ImageFormatError, match="missing in the image"):
            ingest.commit(manifest, ["x"])
    assert store.entries() == []


def test_blobs_are_shared_and_a_damaged_one_is_healed(store: Store) -> None:
    manifest = put(store, b"layer", "a")
    layer = store.manifest(manifest).layers[0]
    path = store.root / "blobs/sha256" / layer.digest.removeprefix("sha256:")
    with store.ingest() as ingest:
        assert ingest.has(layer)
    path.write_bytes(b"cut")
    with pytest.raises(ImageFormatError, match="damaged: it has 3 bytes"):
        store.open(layer)
    with store.ingest() as ingest:
        assert not ingest.has(layer)
        ingest.commit(add_image(ingest, b"layer"), ["a"])
    assert path.read_bytes() == b"layer"


def test_a_damaged_document_is_named(store: Store) -> None:
    manifest = put(store, b"layer", "a")
    path = store.root / "blobs/sha256" / manifest.digest.removeprefix("sha256:")
    path.write_bytes(path.read_bytes().replace(b"layers", b"lAyers"))
    with pytest.raises(ImageFormatError, match=f"{manifest.digest} of the image store is damaged"):
        store.read(manifest)
    path.unlink()
    with pytest.raises(ImageFormatError, match=f"{manifest.digest} is missing"):
        store.read(manifest)


# References


def test_a_reference_moves_and_what_it_named_is_kept_without(store: Store) -> None:
    first = put(store, b"1", "x", "y")
    second = put(store, b"2", "x")
    assert names(store) == {"x": second.digest, "y": first.digest}
    third = put(store, b"3", "y")
    assert names(store) == {"x": second.digest, "y": third.digest, "": first.digest}
    put(store, b"1", "z")
    assert names(store) == {"x": second.digest, "y": third.digest, "z": first.digest}


def test_untag_and_drop(store: Store) -> None:
    first = put(store, b"1", "x", "y")
    with store.exclusive() as lock:
        store.untag(lock, "x")
        with pytest.raises(NotFoundError, match="image 'x' not found"):
            store.untag(lock, "x")
        assert store.collect(lock) == 0
        store.untag(lock, "y")
        assert store.collect(lock) > 0
        store.drop(lock, first.digest)
    assert blobs(store) == set()


def test_an_image_without_a_name_is_kept(store: Store) -> None:
    manifest = put(store, b"1")
    assert names(store) == {"": manifest.digest}
    assert collect(store) == 0


def test_what_others_wrote_into_the_index_is_kept(store: Store) -> None:
    put(store, b"1", "x")
    path = store.root / "index.json"
    document = json.loads(path.read_bytes())
    document["annotations"] = {"theirs": "yes"}
    document["manifests"][0]["artifactType"] = "theirs"
    path.write_text(json.dumps(document))
    put(store, b"2", "y")
    after = json.loads(path.read_bytes())
    assert after["annotations"] == {"theirs": "yes"}
    assert after["manifests"][0]["artifactType"] == "theirs"


# Garbage


def test_collect_removes_what_nothing_leads_to(store: Store) -> None:
    put(store, b"1", "x")
    (store.root / "blobs/sha256" / ("0" * 64)).write_bytes(b"garbage")
    before = blobs(store)
    assert collect(store) == 7
    assert blobs(store) == before - {"0" * 64}


def test_collect_leaves_an_import_alone(store: Store) -> None:
    old = put(store, b"shared", "old")
    with store.ingest() as ingest:
        assert ingest.has(store.manifest(old).layers[0])  # it has it from the store …
        with store.exclusive() as lock:
            store.drop(lock, old.digest)
            store.collect(lock)
        assert blobs(store) == set()
        ingest.commit(add_image(ingest, b"shared"), ["new"])  # … which has lost it meanwhile
    assert len(blobs(store)) == 3
    assert collect(store) == 0


def test_collect_removes_nothing_when_an_image_is_damaged(store: Store) -> None:
    manifest = put(store, b"1", "x")
    put(store, b"2", "y")
    (store.root / "blobs/sha256" / manifest.digest.removeprefix("sha256:")).unlink()
    before = blobs(store)
    with pytest.raises(StateFormatError, match="nothing is cleaned up") as caught:
        collect(store)
    assert caught.value.hint == f"berth image rm {manifest.digest[:19]}"
    assert blobs(store) == before
    with store.exclusive() as lock:
        store.drop(lock, manifest.digest)
        assert store.collect(lock) > 0


def test_an_open_blob_outlives_its_removal(store: Store) -> None:
    manifest = put(store, b"layer", "x")
    with store.shared():
        fd = store.open(store.manifest(manifest).layers[0])
    with store.exclusive() as lock:
        store.drop(lock, manifest.digest)
        store.collect(lock)
    assert os.pread(fd, 10, 0) == b"layer"
    os.close(fd)


# Damage


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schemaVersion": 2}', '{"schemaVersion": 2, "manifests": [5]}',
             '{"schemaVersion": 2, "manifests": [{"digest": "x"}]}', '{"schemaVersion": 1, "manifests": []}'],
)  # fmt: skip
def test_a_damaged_index_is_told_and_nothing_is_lost(store: Store, text: str) -> None:
    put(store, b"1", "x")
    before = blobs(store)
    (store.root / "index.json").write_text(text)
    actions: list[Callable[[], object]] = [store.entries, lambda: put(store, b"2", "y"), lambda: collect(store)]
    for action in actions:
        with pytest.raises(StateFormatError, match="damaged") as caught:
            action()
        assert caught.value.hint
        assert "nothing was changed" in caught.value.hint
    assert (store.root / "index.json").read_text() == text
    assert blobs(store) == before


def test_a_missing_index_is_damage_too(store: Store) -> None:
    put(store, b"1", "x")
    (store.root / "index.json").unlink()
    with pytest.raises(StateFormatError, match="damaged"):
        store.entries()
    (store.root / "oci-layout").unlink()
    with pytest.raises(StateFormatError, match=r"index\.json is missing"):
        put(store, b"2", "y")
    assert len(blobs(store)) == 3


def test_a_newer_store_is_refused(store: Store) -> None:
    put(store, b"1", "x")
    (store.root / "index.json").write_text('{"schemaVersion": 3, "manifests": []}')
    with pytest.raises(StateFormatError, match="newer") as caught:
        store.entries()
    assert caught.value.hint == "upgrade berth"
    (store.root / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    with pytest.raises(StateFormatError, match=r"newer program \(image layout 2\.0\.0\)"):
        store.entries()


def test_a_full_disk_is_one_error_that_names_the_path(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, b"1", "x")

    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    before = files(store.root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(BerthError, match=rf"can't write {store.root}/ingest/.*: No space left") as caught:
            put(store, b"2", "y")
    assert caught.value.hint
    assert "berth system prune" in caught.value.hint
    assert files(store.root) == before


# Several processes


def _die_while_importing(root: Path, stage: str) -> None:
    store = Store(root)
    with store.ingest() as ingest:
        manifest = add_image(ingest, b"dies")
        with ingest.writer() as writer:
            writer.write(b"half")
            if stage == "writing":
                os.kill(os.getpid(), signal.SIGKILL)
        with store.exclusive() as lock:
            store.adopt(lock, next((root / "ingest").iterdir()), [manifest.digest])
            (root / f"index.json.{os.getpid()}.partial").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)


def _run(target: Callable[..., None], *arguments: object) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(30)
    return process.exitcode


@pytest.mark.parametrize("stage", ["writing", "committing"])
def test_an_import_that_is_killed_leaves_nothing_for_long(store: Store, stage: str) -> None:
    put(store, b"1", "x")
    before = files(store.root)
    assert _run(_die_while_importing, store.root, stage) == -signal.SIGKILL
    assert files(store.root) != before
    assert list(names(store)) == ["x"]
    collect(store)
    assert files(store.root) == before


def _import_many(root: Path, number: int, failed: Event) -> None:
    try:
        store = Store(root)
        for turn in range(6):
            with store.ingest() as ingest:
                manifest = add_image(ingest, b"shared by all")
                own = add_image(ingest, b"%d %d" % (number, turn), note=f"{number}")
                ingest.commit(manifest, [f"shared-{number}"])
                ingest.commit(add_image(ingest, b"shared by all", note="again"), [f"again-{number}"])
                del own
            with store.ingest() as ingest:
                ingest.commit(add_image(ingest, b"%d %d" % (number, turn)), [f"own-{number}"])
            with store.exclusive() as lock:
                store.untag(lock, f"again-{number}")
    except BaseException:
        failed.set()
        raise


def _collect_always(root: Path, stop: Event, failed: Event) -> None:
    try:
        store = Store(root)
        while not stop.is_set():
            with store.exclusive() as lock:
                for entry in store.entries():
                    if spec.REF_NAME not in entry.annotations:
                        store.drop(lock, entry.digest)
                store.collect(lock)
    except BaseException:
        failed.set()
        raise


def test_imports_and_collections_at_the_same_time(store: Store) -> None:
    """Three import the same layers and their own, again and again, two collect all the time: no image loses a blob."""
    context = multiprocessing.get_context("fork")
    stop, failed = context.Event(), context.Event()
    importers = [context.Process(target=_import_many, args=(store.root, number, failed)) for number in range(3)]
    collectors = [context.Process(target=_collect_always, args=(store.root, stop, failed)) for _ in range(2)]
    for process in (*importers, *collectors):
        process.start()
    for process in importers:
        process.join(60)
    stop.set()
    for process in collectors:
        process.join(60)
    assert not failed.is_set()
    assert {process.exitcode for process in (*importers, *collectors)} == {0}
    collect(store)
    found = names(store)
    assert set(found) >= {f"{kind}-{number}" for kind in ("shared", "own") for number in range(3)}
    for entry in store.entries():
        manifest = store.manifest(entry)
        store.config(manifest.config)
        for layer in manifest.layers:
            os.close(store.open(layer))
    assert os.listdir(store.root / "ingest") == []
