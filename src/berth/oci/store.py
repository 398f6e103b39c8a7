"""The image store: a standard OCI image layout on disk. Owns its files and its lock; `images` and `oci` use it.

    oci-layout, index.json, blobs/sha256/HEX   the layout: skopeo and buildah read it
    lock                                       flock: shared to open blobs, exclusive to change what is above
    ingest/ID/{lock,HEX,*.partial}             one import at work, with the blobs it has complete

An import gathers its blobs in a directory of its own, and only its commit moves them into blobs/ and writes index.json,
both under the exclusive lock. So whatever lies in blobs/ and can't be reached from index.json is garbage, at any time,
and nobody waits for a long import. A blob that the store has already is hard-linked into the import's directory, so it
can't be collected before the commit. The kernel drops the lock of a dead import: the next one sweeps what it left.

Source: OCI image-spec v1.1, image-layout.md. Every lock here is held for milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from berth import locks
from berth.errors import MAKE_ROOM, BerthError, ImageFormatError, NotFoundError, StateFormatError
from berth.files import make_private_directory, sync_directory, write_atomic
from berth.oci import spec, stream
from berth.oci.digest import Digest, digest_of, hex_of
from berth.oci.spec import Descriptor

LAYOUT_VERSION = "1.0.0"
_LOCK_S = 60.0

Told = Callable[[int, int | None], None]  # as Progress.advance
_Entry = dict[str, object]  # of index.json, with members that we don't know


@dataclasses.dataclass(frozen=True, slots=True)
class StoreLock:
    """Proof that this process alone may change the store; only `Store.exclusive` makes one."""

    root: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Blob:
    """What was written: a digest and the bytes it has."""

    digest: Digest
    size: int

    def described(self, media_type: str) -> Descriptor:
        return Descriptor(media_type, self.digest, self.size)


@contextlib.contextmanager
def writing(path: Path | str) -> Generator[None]:
    """Turn an OSError of the block into one BerthError that names `path` and, for a full disk, says what helps."""
    try:
        yield
    except OSError as error:
        hint = "BERTH_DATA_DIR has to be a folder that you may write"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = MAKE_ROOM
        raise BerthError(f"can't write {path}: {error.strerror or error}", hint=hint) from error


class Store:
    """The store at `root`. Making the object touches nothing; the directory is made when first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self._ingest = root / "ingest"
        self._index = root / "index.json"

    # Reading

    def entries(self) -> list[Descriptor]:
        """Return what index.json lists, in its order. Raises StateFormatError."""
        if not (self.root / "oci-layout").exists():
            return []
        where = str(self._index)
        return [Descriptor.from_json(entry, where=where) for entry in self._load()]

    def read(self, descriptor: Descriptor) -> bytes:
        """Return a document, verified. Raises ImageFormatError when it is missing or damaged."""
        where = f"blob {descriptor.digest} of the image store"
        if descriptor.size > spec.DOCUMENT_MAX:
            raise ImageFormatError(f"{where}: a document of {descriptor.size} bytes is too long")
        fd = self.open(descriptor)
        try:
            data = os.pread(fd, descriptor.size + 1, 0)
        finally:
            os.close(fd)
        if digest_of(data) != descriptor.digest:
            raise ImageFormatError(f"{where} is damaged", hint="remove the image and get it again")
        return data

    def manifest(self, descriptor: Descriptor) -> spec.Manifest:
        where = f"manifest {descriptor.digest}"
        return spec.Manifest.from_json(spec.parse_json(self.read(descriptor), where=where), where=where)

    def config(self, descriptor: Descriptor) -> spec.ImageConfig:
        where = f"config {descriptor.digest}"
        return spec.ImageConfig.from_json(spec.parse_json(self.read(descriptor), where=where), where=where)

    def open(self, descriptor: Descriptor) -> int:
        """Open a blob for reading; the descriptor stays valid though the blob is removed.

        Raises ImageFormatError when it is missing or has another size.
        """
        try:
            fd = os.open(self._blobs / hex_of(descriptor.digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise ImageFormatError(
                f"blob {descriptor.digest} is missing in the image store", hint="remove the image and get it again"
            ) from error
        size = os.fstat(fd).st_size
        if size != descriptor.size:
            os.close(fd)
            raise ImageFormatError(
                f"blob {descriptor.digest} of the image store is damaged: it has {size} bytes, not {descriptor.size}",
                hint="remove the image and get it again",
            )
        return fd

    @contextlib.contextmanager
    def shared(self) -> Generator[None]:
        """Hold off changes while several blobs are looked up and opened."""
        self._ensure()
        with self._locked(shared=True):
            yield

    # Changing the index

    @contextlib.contextmanager
    def exclusive(self) -> Generator[StoreLock]:
        """Be the only one who changes the store, and sweep what the dead left."""
        self._ensure()
        with self._locked(shared=False):
            self._sweep()
            yield StoreLock(self.root)

    def tag(self, lock: StoreLock, descriptor: Descriptor, references: Sequence[str]) -> None:
        """Make `references` name the manifest; what they named before is kept, without a name."""
        entries = self._load()
        for entry in entries:
            if _name_of(entry) in references:
                _set_name(entry, None)
        base = descriptor.to_json()
        named: list[_Entry] = []
        for reference in references:
            entry = dict(base)
            _set_name(entry, reference)
            named.append(entry)
        self._save(lock, _without_duplicates([*entries, *(named or [base])]))

    def untag(self, lock: StoreLock, reference: str) -> None:
        """Take one reference away, and with the last one the manifest. Raises NotFoundError."""
        entries = self._load()
        kept = [entry for entry in entries if _name_of(entry) != reference]
        if len(kept) == len(entries):
            raise NotFoundError(f"image '{reference}' not found")
        self._save(lock, kept)

    def drop(self, lock: StoreLock, digest: Digest) -> None:
        """Take a manifest away with all its references; idempotent."""
        self._save(lock, [entry for entry in self._load() if entry.get("digest") != digest])

    def collect(self, lock: StoreLock) -> int:
        """Remove the blobs that nothing in index.json leads to; return the bytes freed.

        Raises StateFormatError, removing nothing, when a listed image is too damaged to say what it needs.
        """
        del lock
        needed = self._needed()
        freed = 0
        for name in os.listdir(self._blobs):
            if name not in needed:
                freed += (self._blobs / name).lstat().st_size
                (self._blobs / name).unlink()
        return freed

    def blob_bytes(self) -> int:
        """Return what the blobs take, in bytes."""
        found = self._blobs.iterdir() if self._blobs.is_dir() else ()
        total = 0
        for path in found:
            with contextlib.suppress(FileNotFoundError):  # collected meanwhile
                total += path.lstat().st_size
        return total

    # Importing

    @contextlib.contextmanager
    def ingest(self, progress: Told = lambda _done, _total: None) -> Generator[Ingest]:
        """Begin an import. Whatever it has not committed at the end of the block is removed.

        progress: told the bytes written so far, all blobs together.
        """
        with self.exclusive():
            self._load()  # what is damaged should be known before a long download, not after it
        place = self._ingest / f"{os.getpid()}-{os.urandom(4).hex()}"
        with contextlib.ExitStack() as stack:
            with writing(place), self._locked(shared=True):
                # Under the lock: a sweep between the two lines would take it for a dead one's.
                place.mkdir(mode=0o700)
                stack.enter_context(locks.hold(place / "lock"))
                stack.callback(_remove_flat, place)
            yield Ingest(self, place, progress)

    def adopt(self, lock: StoreLock, place: Path, digests: Iterable[Digest]) -> None:
        """Move complete blobs of an import in."""
        del lock
        for digest in digests:
            os.replace(place / hex_of(digest), self._blobs / hex_of(digest))
        sync_directory(self._blobs)

    def link(self, digest: Digest, place: Path) -> bool:
        """Give an import its own name for a blob that the store has; False when it has not."""
        with self._locked(shared=True):
            try:
                os.link(self._blobs / hex_of(digest), place / hex_of(digest))
            except FileExistsError:
                return True
            except FileNotFoundError:
                return False
        return True

    # What is private

    def _locked(self, *, shared: bool) -> contextlib.AbstractContextManager[int]:
        return locks.hold(self.root / "lock", shared=shared, timeout_s=_LOCK_S, what="the image store")

    def _ensure(self) -> None:
        if (self.root / "oci-layout").exists():
            return
        with writing(self.root):
            make_private_directory(self.root)
            with self._locked(shared=False):
                self._blobs.mkdir(parents=True, exist_ok=True)
                self._ingest.mkdir(exist_ok=True, mode=0o700)
                if not self._index.exists():
                    if os.listdir(self._blobs):
                        raise self._damaged("index.json is missing")
                    write_atomic(self._index, spec.encode_json(_index_document([])))
                # Last: where it is, all is.
                write_atomic(self.root / "oci-layout", spec.encode_json({"imageLayoutVersion": LAYOUT_VERSION}))

    def _load(self) -> list[_Entry]:
        check_layout_version(self.root / "oci-layout")
        try:
            document = spec.parse_json(self._index.read_bytes(), where=str(self._index))
        except (FileNotFoundError, ImageFormatError) as error:
            raise self._damaged(f"index.json is no index: {error}") from error
        members = cast("dict[str, object]", document) if isinstance(document, dict) else {}
        version, manifests = members.get("schemaVersion"), members.get("manifests")
        if isinstance(version, int) and version > 2:
            raise StateFormatError(
                f"{self._index} was written by a newer program (schema version {version})", hint="upgrade berth"
            )
        if version != 2 or not isinstance(manifests, list):
            raise self._damaged("index.json is no OCI image index")
        for entry in cast("list[object]", manifests):
            try:
                Descriptor.from_json(entry, where=str(self._index))
            except ImageFormatError as error:
                raise self._damaged(error.message) from error
        return cast("list[_Entry]", manifests)

    def _save(self, lock: StoreLock, entries: list[_Entry]) -> None:
        assert lock.root == self.root
        # Members that somebody else put into the index are kept as they are.
        document = cast("dict[str, object]", spec.parse_json(self._index.read_bytes(), where=str(self._index)))
        with writing(self._index):
            write_atomic(self._index, spec.encode_json({**document, "manifests": entries}))

    def _damaged(self, what: str) -> StateFormatError:
        return StateFormatError(
            f"the image store {self.root} is damaged: {what}",
            hint=f"nothing was changed; repair {self._index}, or move {self.root} away and get the images again",
        )

    def _needed(self) -> set[str]:
        needed: set[str] = set()
        waiting = self.entries()
        while waiting:
            descriptor = waiting.pop()
            if hex_of(descriptor.digest) in needed:
                continue
            needed.add(hex_of(descriptor.digest))
            try:
                waiting += self.children(descriptor)
            except ImageFormatError as error:
                raise StateFormatError(
                    f"an image in {self.root} is damaged, so nothing is cleaned up: {error.message}",
                    hint=f"berth image rm {descriptor.digest[:19]}",
                ) from error
        return needed

    def children(self, descriptor: Descriptor) -> list[Descriptor]:
        """Return what a listed document leads to. Raises ImageFormatError when it can't be read."""
        if descriptor.media_type in spec.MANIFESTS:
            manifest = self.manifest(descriptor)
            return [manifest.config, *manifest.layers]
        if descriptor.media_type in spec.INDEXES:
            where = f"index {descriptor.digest}"
            index = spec.Index.from_json(spec.parse_json(self.read(descriptor), where=where), where=where)
            # An index may list platforms that were never fetched.
            return [item for item in index.manifests if (self._blobs / hex_of(item.digest)).exists()]
        return []

    def _sweep(self) -> None:
        for place in self._ingest.iterdir() if self._ingest.is_dir() else ():
            if not locks.is_held(place / "lock"):
                _remove_flat(place)
        for left in self.root.glob("*.partial"):
            left.unlink(missing_ok=True)


class Ingest:
    """One import at work: its complete blobs in a directory of its own. Only `Store.ingest` makes one."""

    def __init__(self, store: Store, place: Path, progress: Told) -> None:
        self._store = store
        self.path = place
        self._sizes: dict[Digest, int] = {}
        self._progress = progress
        self._written = 0

    def has(self, descriptor: Descriptor) -> bool:
        """Say whether the blob is here or in the store already; from now on it can't go away."""
        if descriptor.digest in self._sizes:
            return True
        with writing(self.path):
            if not self._store.link(descriptor.digest, self.path):
                return False
        path = self.path / hex_of(descriptor.digest)
        if path.stat().st_size != descriptor.size:
            path.unlink()  # a damaged one: the import brings it anew, and its commit replaces it
            return False
        self._sizes[descriptor.digest] = descriptor.size
        return True

    def add(self, chunks: Iterable[bytes], *, where: str, expected: Descriptor | None = None) -> Blob:
        """Write a blob, verified against `expected`. Raises ImageFormatError when it is not what was expected."""
        with self.writer() as writer:
            for chunk in chunks:
                writer.write(chunk)
                if expected is not None and writer.size > expected.size:
                    break
            return writer.finish(where=where, expected=expected)

    def add_bytes(self, data: bytes) -> Blob:
        return self.add([data], where="a new document")

    def add_json(self, document: dict[str, object], media_type: str) -> Descriptor:
        return self.add_bytes(spec.encode_json(document)).described(media_type)

    @contextlib.contextmanager
    def writer(self) -> Generator[BlobWriter]:
        """Write a blob piece by piece; what is not finished at the end of the block is removed."""
        partial = self.path / f"{os.urandom(8).hex()}.partial"
        with writing(partial):
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield BlobWriter(fd, partial, self._keep, self._wrote)
        finally:
            os.close(fd)
            partial.unlink(missing_ok=True)

    def scratch(self) -> IO[bytes]:
        """Open a file without a name, for what has to be seekable; it ends with its last descriptor."""
        path = self.path / f"{os.urandom(8).hex()}.partial"
        with writing(path):
            file = open(path, "w+b")  # noqa: SIM115 (the caller closes it)
        path.unlink()
        return file

    def read(self, descriptor: Descriptor) -> bytes:
        """Return a document of this import."""
        return (self.path / hex_of(descriptor.digest)).read_bytes()

    def open(self, digest: Digest) -> int:
        """Open a blob of this import for reading."""
        return os.open(self.path / hex_of(digest), os.O_RDONLY | os.O_CLOEXEC)

    def commit(self, manifest: Descriptor, references: Sequence[str]) -> None:
        """Put the image into the store under `references`. Everything it needs has been added."""
        self.commit_all([(manifest, references)])

    def commit_all(self, images: Sequence[tuple[Descriptor, Sequence[str]]]) -> None:
        """Put all images into the store, each under its references, or none."""
        for manifest, _ in images:
            self._check_complete(manifest)
        with self._store.exclusive() as lock, writing(self._store.root):
            self._store.entries()  # raises for a damaged index, before anything is changed
            self._store.adopt(lock, self.path, self._sizes)
            for manifest, references in images:
                self._store.tag(lock, manifest, references)
        self._sizes.clear()

    def _check_complete(self, manifest: Descriptor) -> None:
        where = "the new manifest"
        document = spec.Manifest.from_json(spec.parse_json(self.read(manifest), where=where), where=where)
        for needed in (document.config, *document.layers):
            if self._sizes.get(needed.digest) != needed.size:
                raise ImageFormatError(f"blob {needed.digest} is missing in the image")

    def _wrote(self, count: int) -> None:
        self._written += count
        self._progress(self._written, None)

    def _keep(self, partial: Path, blob: Blob) -> None:
        os.replace(partial, self.path / hex_of(blob.digest))
        self._sizes[blob.digest] = blob.size


class BlobWriter:
    """A blob being written: hashed on the way, kept only by `finish`."""

    def __init__(self, fd: int, path: Path, keep: Callable[[Path, Blob], None], wrote: Callable[[int], None]) -> None:
        self._fd = fd
        self._path = path
        self._keep = keep
        self._wrote = wrote
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        with writing(self._path):
            stream.write_all(self._fd, data)
        self._hash.update(data)
        self.size += len(data)
        self._wrote(len(data))

    def tee(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Write what passes through."""
        for chunk in chunks:
            self.write(chunk)
            yield chunk

    def finish(self, *, where: str, expected: Descriptor | None = None) -> Blob:
        """Make it durable and give it its name. Raises ImageFormatError when it is not what was expected."""
        blob = Blob(Digest(f"sha256:{self._hash.hexdigest()}"), self.size)
        if expected is not None and blob.size != expected.size:
            how = "is longer than" if blob.size > expected.size else f"is truncated: {blob.size} of"
            raise ImageFormatError(f"{where}: blob {expected.digest} {how} {expected.size} bytes")
        if expected is not None and blob.digest != expected.digest:
            raise ImageFormatError(f"{where}: blob {expected.digest} is damaged: its digest is {blob.digest}")
        with writing(self._path):
            os.fsync(self._fd)
            self._keep(self._path, blob)
        return blob


def check_layout_version(path: Path) -> None:
    """Check an oci-layout file. Raises StateFormatError for one that is damaged or newer."""
    match spec.parse_json(path.read_bytes(), where=str(path)):
        case {"imageLayoutVersion": str(version)} if version.partition(".")[0] == "1":
            return
        case {"imageLayoutVersion": str(version)}:
            raise StateFormatError(
                f"{path} was written by a newer program (image layout {version})", hint="upgrade berth"
            )
        case _:
            raise StateFormatError(f"{path} is damaged: it has no image layout version")


def _index_document(entries: list[_Entry]) -> dict[str, object]:
    return {"schemaVersion": 2, "mediaType": spec.INDEX, "manifests": entries}


def _name_of(entry: _Entry) -> str | None:
    annotations = entry.get("annotations")
    name = cast("dict[str, object]", annotations).get(spec.REF_NAME) if isinstance(annotations, dict) else None
    return name if isinstance(name, str) else None


def _set_name(entry: _Entry, name: str | None) -> None:
    found = entry.get("annotations")
    annotations = dict(cast("dict[str, object]", found)) if isinstance(found, dict) else {}
    annotations.pop(spec.REF_NAME, None)
    if name is not None:
        annotations[spec.REF_NAME] = name
    entry["annotations"] = annotations
    if not annotations:
        del entry["annotations"]


def _without_duplicates(entries: list[_Entry]) -> list[_Entry]:
    """Drop nameless entries of what has a name, and all but one of the others."""
    named = {entry["digest"] for entry in entries if _name_of(entry) is not None}
    seen: set[tuple[object, str | None]] = set()
    kept: list[_Entry] = []
    for entry in entries:
        name = _name_of(entry)
        if (entry["digest"], name) in seen or (name is None and entry["digest"] in named):
            continue
        seen.add((entry["digest"], name))
        kept.append(entry)
    return kept


def _remove_flat(place: Path) -> None:
    """Remove a directory of files; its owner and a sweep may do so at the same time."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(place):
            (place / name).unlink(missing_ok=True)
        place.rmdir()
