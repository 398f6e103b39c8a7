"""The images of this user: what the commands and the engines ask of the store. Layer 5; the API of `oci`.

docs/images.md tells the rules. Locks are taken inside and never handed out. The ways into and out of the store are
imported where they are gone: a machine made from a stored image does not wait for them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import stat
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from berth.errors import (
    BerthError,
    ImageFormatError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    RegistryError,
)
from berth.layout import Layout
from berth.names import ImageReference, parse_reference
from berth.oci import spec
from berth.oci.digest import Digest, parse_prefix
from berth.oci.spec import Descriptor, ImageConfig, Platform
from berth.oci.store import Ingest, Store
from berth.progress import Progress, Silent

if TYPE_CHECKING:
    from berth.oci.registry.pull import Arrivals

_SOURCE = "dev.berth.source"  # where an image came from, and as what
_RECIPE = "dev.berth.adapted.recipe"  # of `adapt.bootable`
_BASE = "org.opencontainers.image.base.digest"  # of `oci.derive`
_FILE_TRANSPORTS = ("oci", "oci-archive", "docker-archive", "rootfs")

Layers = list[tuple[int, str]]  # open descriptor and media type of each, lowest first
Names = list[str]
InUse = Callable[[], Mapping[str, Sequence[str]]]  # manifest digest -> names of the machines made from it


@dataclasses.dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in the store.

    reference: its full form, "" when a newer image has taken its name. digest: of its manifest. platform:
    ``linux/amd64``. size: bytes of config and layers, as stored. created: RFC 3339, "" when unknown. problem: why it
    can't be used, "" when it can; what is unknown then is empty.
    """

    reference: str
    digest: str
    platform: str = ""
    size: int = 0
    created: str = ""
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    config: ImageConfig = dataclasses.field(default_factory=lambda: ImageConfig(spec.host_platform()))
    problem: str = ""

    def to_json(self) -> dict[str, object]:
        """Give what ``image ls --format json`` shows of it."""
        return {
            "reference": self.reference,
            "digest": self.digest,
            "platform": self.platform,
            "size": self.size,
            "createdDate": self.created,
            "annotations": dict(self.annotations),
            "problem": self.problem,
        }


@dataclasses.dataclass(frozen=True, slots=True)
class ListedImage:
    """An image with what is known of it only beside the others, or by looking into it.

    unique: bytes of blobs that no other image of the store has, shared: of the others; their sum is the image's size
    and its manifest's. bootable: it has an init of its own; None when it can't be read. recipe: how berth adapted it
    (``debian 1``), "" when it has not.
    """

    image: StoredImage
    unique: int
    shared: int
    bootable: bool | None

    @property
    def recipe(self) -> str:
        return self.image.annotations.get(_RECIPE, "")

    @property
    def repository(self) -> str:
        """The name without tag and digest, in full: ``docker.io/library/debian``."""
        return self._parsed.path if self._parsed else ""

    @property
    def tag(self) -> str:
        return (self._parsed.tag or "") if self._parsed else ""

    @property
    def _parsed(self) -> ImageReference | None:
        with contextlib.suppress(InvalidArgumentError):
            parsed = parse_reference(self.image.reference)
            return parsed if parsed.transport == "docker" else None
        return None

    def to_json(self) -> dict[str, object]:
        """Give what ``image ls --format json`` shows of it."""
        base = self.image.annotations.get(_BASE) if self.recipe else None
        return {
            **self.image.to_json(),
            "repository": self.repository or None,
            "tag": self.tag or None,
            "uniqueSize": self.unique,
            "sharedSize": self.shared,
            "bootable": self.bootable,
            "adapted": {"recipe": self.recipe, "base": base} if self.recipe else None,
        }


class Images:
    """The images in the store of `layout`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._store = Store(layout.images)
        self._registries = layout.registries

    def ensure(
        self, reference: str, *, platform: str | None = None, progress: Progress | None = None,
        arrivals: Arrivals | None = None,
    ) -> StoredImage:  # fmt: skip
        """Return the image, brought into the store if it is not there.

        A file or directory that has changed since is brought in again. arrivals: told of layers as they come out of a
        registry, before the image is in the store. Raises NotFoundError, RegistryError, ImageFormatError,
        InvalidArgumentError, and BerthError for a disk that is full; then the store is as before.
        """
        wanted = spec.parse_platform(platform) if platform else None
        progress = progress or Silent()
        if not _is_name(reference):
            return self.find(reference)
        parsed = _absolute(parse_reference(reference))
        stored = self._find_name(str(parsed))
        if stored is not None and not stored.problem and _is_current(stored, parsed, wanted):
            return stored
        if stored is None and parse_prefix(reference):
            with contextlib.suppress(NotFoundError):
                return self.find(reference)
        return self._fetch(parsed, wanted, progress, arrivals=arrivals)

    def pull(self, reference: str, *, platform: str | None = None, progress: Progress | None = None) -> StoredImage:
        """Bring an image as its registry has it now; what the store has of it is not fetched again.

        What is stored stays, with a note, when the registry can't say; from elsewhere than a registry it is `ensure`.
        """
        parsed = parse_reference(reference) if _is_name(reference) else None
        if parsed is None or parsed.transport != "docker":
            return self.ensure(reference, platform=platform, progress=progress)
        wanted = spec.parse_platform(platform) if platform else None
        progress = progress or Silent()
        stored = self._find_name(str(parsed))
        if stored is None or stored.problem or not _is_current(stored, parsed, wanted):
            return self.ensure(reference, platform=platform, progress=progress)
        try:
            return self._fetch(parsed, wanted, progress, bootstrapped=False)
        except RegistryError as error:
            progress.note(f"{error.message}; '{parsed.familiar}' stays as it is in the store")
            return stored

    def push(self, reference: str, destination: str | None = None, *, progress: Progress | None = None) -> str:
        """Put an image of the store into the registry that `destination`, else its reference, names; return that name.

        Raises NotFoundError, ImageFormatError, InvalidArgumentError, and RegistryError.
        """
        from berth.oci.registry.push import Outgoing, push

        image = self.find(reference)
        target = parse_reference(storable(destination or image.reference or reference))
        descriptor, manifest = self._descriptor(image), self._manifest(image)
        with contextlib.ExitStack() as stack:
            with self._store.shared():
                blobs = {blob.digest: (blob, self._opened(stack, blob)) for blob in (manifest.config, *manifest.layers)}
            known = self._known_at(target.path.partition("/")[0])
            outgoing = Outgoing(descriptor, self._store.read(descriptor), blobs, known)
            push(target, outgoing, progress=progress or Silent(), registries=self._registries)
        return str(target)

    def find(self, reference: str) -> StoredImage:
        """Look an image up by reference, digest, or the beginning of a digest that fits one image only.

        Raises NotFoundError, and InvalidArgumentError when the beginning fits several.
        """
        if _is_name(reference):
            found = self._find_name(str(_absolute(parse_reference(reference)))) or self._find_name(reference)
            if found is not None:
                return found
        prefix = parse_prefix(reference)
        matching = [item for item in self.list() if prefix and item.digest.startswith(f"sha256:{prefix}")]
        digests = {item.digest for item in matching}
        if len(digests) > 1:
            raise InvalidArgumentError(f"the digest '{reference}' fits several images", hint="give more of its digits")
        if not matching:
            raise NotFoundError(f"image '{reference}' not found", hint="berth image ls")
        return matching[0]

    def list(self) -> list[StoredImage]:
        """Return all images, one item a reference, damaged ones included. Raises StateFormatError."""
        found = [self._stored(entry) for entry in self._store.entries()]
        if any(image.problem for image in found):
            # No lock was held: one that has been removed meanwhile looks damaged.
            listed = {entry.digest for entry in self._store.entries()}
            found = [image for image in found if image.digest in listed]
        return found

    def list_detailed(self) -> Sequence[ListedImage]:
        """`list`, with what each image shares with others and whether it boots; slow for images never looked into."""
        images = self.list()
        parts = {image.digest: self._parts(image) for image in images}
        users = collections.Counter(digest for blobs in parts.values() for digest in blobs)
        return [self._detailed(image, parts[image.digest], users) for image in images]

    def _detailed(self, image: StoredImage, parts: Mapping[str, int], users: Mapping[str, int]) -> ListedImage:
        unique = sum(size for digest, size in parts.items() if users[digest] == 1)
        return ListedImage(image, unique, sum(parts.values()) - unique, self._is_bootable(image))

    def _parts(self, image: StoredImage) -> dict[str, int]:
        """Say which blobs an image has, and how long each is; none for a damaged one."""
        if image.problem:
            return {}
        with contextlib.suppress(ImageFormatError, NotFoundError):
            listed = self._descriptor(image)
            return {item.digest: item.size for item in (listed, *self._store.children(listed))}
        return {}

    def _is_bootable(self, image: StoredImage) -> bool | None:
        from berth.adapt.facts import inspect

        if image.problem:
            return None
        try:
            return inspect(self._layout, image.digest, lambda: self.opened_layers(image)).has_init
        except (BerthError, OSError):  # a list shows what is damaged, and does not fail on it
            return None

    def inspect(self, reference: str) -> dict[str, object]:
        """Return all that is known of an image: its item of `list_detailed`, its manifest and its config."""
        image = self.find(reference)
        shown = next((item.to_json() for item in self.list_detailed() if item.image == image), image.to_json())
        if not image.problem:
            manifest = self._manifest(image)
            shown["references"] = [item.reference for item in self.list() if item.digest == image.digest]
            shown["manifest"] = manifest.to_json()
            shown["config"] = spec.parse_json(self._store.read(manifest.config), where=manifest.config.digest)
        return shown

    def layers(self, image: StoredImage) -> Layers:
        """Open the layers for `unpack_layers`; the caller closes them.

        They stay readable though the image is removed meanwhile. Raises ImageFormatError for a damaged image.
        """
        with self._store.shared(), contextlib.ExitStack() as stack:
            opened: Layers = []
            for layer in self._manifest(image).layers:
                opened.append((self._store.open(layer), layer.media_type))
                stack.callback(os.close, opened[-1][0])
            stack.pop_all()  # all went well: they are the caller's now
        return opened

    @contextlib.contextmanager
    def keeping(self, image: StoredImage) -> Generator[None]:
        """Hold off removals while a machine comes to be that needs the image; for milliseconds.

        Raises NotFoundError when it has been removed since it was looked up.
        """
        with self._store.shared():
            self._descriptor(image)
            yield

    @contextlib.contextmanager
    def opened_layers(self, image: StoredImage) -> Generator[Layers]:
        """`layers` for a block, which closes them."""
        opened = self.layers(image)
        try:
            yield opened
        finally:
            for fd, _ in opened:
                os.close(fd)

    def import_(
        self, path: Path, reference: str, *, platform: str | None = None, progress: Progress | None = None
    ) -> StoredImage:
        """Make an image of a root file system, a directory or a tar archive, and name it `reference`."""
        from berth.oci.rootfs import fetch_rootfs

        name = storable(reference)
        wanted = spec.parse_platform(platform) if platform else None
        progress = progress or Silent()
        progress.step(f"importing {path}")
        with self._store.ingest() as ingest:
            manifest = fetch_rootfs(path, ingest, platform=wanted, annotations={}, progress=progress.advance)
            ingest.commit(manifest, [name])
        return self.find(name)

    def load(self, file: Path, *, progress: Progress | None = None) -> Names:
        """Bring all images of an archive into the store, or none; return their references.

        One without a name is told by its digest.
        """
        from berth.oci.sources import fetch_archive

        progress = progress or Silent()
        progress.step(f"loading {file}")
        with self._store.ingest(progress.advance) as ingest:
            fetched = fetch_archive(file, ingest, platform=None)
            ingest.commit_all([(item.manifest, item.names) for item in fetched])
        return [name for item in fetched for name in item.names or (item.manifest.digest,)]

    def save(self, references: Sequence[str], file: Path | IO[bytes], *, progress: Progress | None = None) -> None:
        """Write images into an oci-archive that `load`, skopeo and podman read; at a path nothing half-made is left."""
        from berth.oci.save import save_archive

        progress = progress or Silent()
        images = [self.find(reference) for reference in references]
        progress.step(f"saving {', '.join(references)}")
        entries = [(self._descriptor(image), image.reference or None) for image in images]
        with self._store.shared():
            blobs = {item.digest: item for entry, _ in entries for item in (entry, *self._store.children(entry))}
            opened = {digest: self._store.open(item) for digest, item in blobs.items()}
        try:
            save_archive(file, entries, opened, progress.advance)
        finally:
            for fd in opened.values():
                os.close(fd)

    def tag(self, source: str, reference: str) -> StoredImage:
        """Give an image one more reference; what had it before is kept without."""
        name = storable(reference)
        image = self.find(source)
        with self._store.exclusive() as lock:
            self._store.tag(lock, self._descriptor(image), [name])
        return self.find(name)

    def add(
        self,
        fill: Callable[[Ingest], Descriptor],
        references: Sequence[str],
        *,
        progress: Callable[[int, int | None], None] = lambda _done, _total: None,
    ) -> StoredImage:
        """Put an image that `fill` gathers in an import, returning its manifest, into the store under `references`."""
        names = [storable(reference) for reference in references]
        with self._store.ingest(progress) as ingest:
            manifest = fill(ingest)
            ingest.commit(manifest, names)
        return self.find(names[0] if names else manifest.digest)

    def manifest(self, image: StoredImage) -> spec.Manifest:
        """Return an image's manifest. Raises ImageFormatError for a damaged image, NotFoundError."""
        return self._manifest(image)

    def config_document(self, image: StoredImage) -> Mapping[str, object]:
        """Return an image's config as it is, with members that berth does not know."""
        config = self._manifest(image).config
        return cast("Mapping[str, object]", spec.parse_json(self._store.read(config), where=config.digest))

    def link_blobs(self, descriptors: Sequence[Descriptor], folder: Path) -> None:
        """Give `folder`, on the store's file system, hard links to blobs: they stay though the image is removed.

        Raises ImageFormatError for one that is missing.
        """
        for descriptor in descriptors:
            os.close(self._store.open(descriptor))  # also that it has its size
            if not self._store.link(descriptor.digest, folder):
                raise ImageFormatError(f"blob {descriptor.digest} is missing in the image store")

    def remove(self, references: Sequence[str], in_use: InUse) -> Names:
        """Remove references, and with its last one the image; return what was removed.

        A digest removes the image with all its references. All or nothing: raises NotFoundError for one that is not
        there, InvalidStateError, naming the machines, for an image that would go and is used.
        """
        with self._store.exclusive() as lock:
            used = in_use()
            gone = [(self.find(reference), _is_name(reference)) for reference in dict.fromkeys(references)]
            self._refuse_used(gone, used)
            for image, by_name in gone:
                if by_name and image.reference:
                    self._store.untag(lock, image.reference)
                else:
                    self._store.drop(lock, Digest(image.digest))
            # A damaged image elsewhere must not stop this one from going: `prune` then says what is wrong.
            with contextlib.suppress(BerthError):
                self._store.collect(lock)
        return [image.reference if by_name and image.reference else image.digest for image, by_name in gone]

    def prune(self, in_use: InUse, *, unused: bool = False) -> tuple[Names, int]:
        """Remove the images that have lost their name and that no machine uses; return digests and bytes freed.

        unused: also named ones that no machine uses.
        """
        removed: list[str] = []
        with self._store.exclusive() as lock:
            used = in_use()
            for entry in self._store.entries():
                named = entry.annotations.get(spec.REF_NAME)
                if entry.digest not in used and (unused or not named) and entry.digest not in removed:
                    self._store.drop(lock, entry.digest)
                    removed.append(entry.digest)
            freed = self._store.collect(lock)
        return removed, freed

    def size(self) -> int:
        """Return the bytes that the store's blobs take."""
        return self._store.blob_bytes()

    # What is private

    def _opened(self, stack: contextlib.ExitStack, blob: Descriptor) -> int:
        fd = self._store.open(blob)
        stack.callback(os.close, fd)
        return fd

    def _known_at(self, registry: str) -> Mapping[Digest, Names]:
        """Say which repositories of a registry should have which blobs: images of that name came from there."""
        known: dict[Digest, Names] = {}
        for entry in self._store.entries():
            host, _, rest = entry.annotations.get(spec.REF_NAME, "").partition("/")
            if host != registry or entry.media_type not in spec.MANIFESTS:
                continue
            with contextlib.suppress(ImageFormatError, InvalidArgumentError):
                repository = parse_reference(f"{host}/{rest}").path.partition("/")[2]
                for layer in self._store.manifest(entry).layers:
                    known.setdefault(layer.digest, []).append(repository)
        return known

    def _fetch(
        self, reference: ImageReference, platform: Platform | None, progress: Progress, *, bootstrapped: bool = True,
        arrivals: Arrivals | None = None,
    ) -> StoredImage:  # fmt: skip
        """Bring an image in. bootstrapped: a distribution is, where its registry can't be reached."""
        from berth.oci.fetch import fetch

        name = str(reference)
        # Root file systems and registries tell by themselves how far they are, and know the total.
        copied = progress.advance if reference.transport not in ("rootfs", "docker") else Silent().advance
        with self._store.ingest(copied) as ingest:
            fingerprint = _fingerprint(reference)  # before it is read: a change after that is seen the next time
            manifest = fetch(
                reference, ingest, platform=platform, progress=progress, registries=self._registries,
                bootstrapped=bootstrapped, arrivals=arrivals,
            )  # fmt: skip
            source = {_SOURCE: fingerprint} if fingerprint else {}
            ingest.commit(dataclasses.replace(manifest, annotations=source), [name])
        found = self._find_name(name)
        assert found is not None
        return found

    def _find_name(self, name: str) -> StoredImage | None:
        for entry in self._store.entries():
            if entry.annotations.get(spec.REF_NAME) == name:
                return self._stored(entry)
        return None

    def _stored(self, entry: Descriptor) -> StoredImage:
        reference = entry.annotations.get(spec.REF_NAME, "")
        if entry.media_type not in spec.MANIFESTS:
            return StoredImage(reference, entry.digest, problem=f"no image for one platform but {entry.media_type}")
        try:
            manifest = self._store.manifest(entry)
            config = self._store.config(manifest.config)
            self._check_blobs(manifest)
        except (ImageFormatError, OSError) as error:
            return StoredImage(reference, entry.digest, problem=str(error))
        annotations = {key: value for key, value in entry.annotations.items() if key != spec.REF_NAME}
        return StoredImage(
            reference,
            entry.digest,
            str(config.platform),
            manifest.config.size + sum(layer.size for layer in manifest.layers),
            config.created,
            {**manifest.annotations, **annotations},
            config,
        )

    def _check_blobs(self, manifest: spec.Manifest) -> None:
        for layer in manifest.layers:
            os.close(self._store.open(layer))

    def _descriptor(self, image: StoredImage) -> Descriptor:
        for entry in self._store.entries():
            if entry.digest == image.digest:
                return dataclasses.replace(entry, annotations={}, platform=None)
        raise NotFoundError(f"image '{image.reference or image.digest}' not found", hint="berth image ls")

    def _manifest(self, image: StoredImage) -> spec.Manifest:
        if image.problem:
            raise ImageFormatError(
                f"image '{image.reference or image.digest}' is damaged: {image.problem}",
                hint="remove it and get it again",
            )
        return self._store.manifest(self._descriptor(image))

    def _refuse_used(self, gone: Sequence[tuple[StoredImage, bool]], used: Mapping[str, Sequence[str]]) -> None:
        """Raise InvalidStateError when an image would lose its last reference though machines use it."""
        left: dict[str, int] = {}
        for entry in self._store.entries():
            left[entry.digest] = left.get(entry.digest, 0) + 1
        for image, by_name in gone:
            left[image.digest] = left[image.digest] - 1 if by_name else 0
            machines = used.get(image.digest, ())
            if machines and left[image.digest] <= 0:
                raise _in_use(image, machines)


def _in_use(image: StoredImage, machines: Sequence[str]) -> InvalidStateError:
    name = image.reference or image.digest
    shown = [machine for machine in machines if not machine.startswith(".")]
    if not shown:  # it is a throw-away one's, which no command takes
        return InvalidStateError(f"image '{name}' is being adapted", hint="try again when that is done")
    names = ", ".join(f"'{machine}'" for machine in shown)
    return InvalidStateError(f"image '{name}' is used by machine {names}", hint=f"berth rm {' '.join(shown)}")


def _is_name(text: str) -> bool:
    """Tell a reference from a digest; a word of hex digits is both, and then a name first."""
    return not text.startswith("sha256:")


def storable(reference: str) -> str:
    """Return the full form of a name that an image may get. Raises InvalidArgumentError for a transport or a digest."""
    parsed = parse_reference(reference)
    if parsed.transport != "docker" or parsed.digest is not None:
        raise InvalidArgumentError(
            f"invalid image name '{reference}'", hint="write it as name, name:tag or host/name:tag"
        )
    return str(parsed)


def _absolute(reference: ImageReference) -> ImageReference:
    if reference.transport not in _FILE_TRANSPORTS:
        return reference
    return dataclasses.replace(reference, path=os.path.abspath(os.path.expanduser(reference.path)))


def _is_current(stored: StoredImage, reference: ImageReference, platform: Platform | None) -> bool:
    if platform is not None and not stored.config.platform.same(platform):
        return False
    if reference.transport not in _FILE_TRANSPORTS or not _source_path(reference).exists():
        return True
    return stored.annotations.get(_SOURCE) == _fingerprint(reference) != ""


def _source_path(reference: ImageReference) -> Path:
    path = Path(reference.path)
    if reference.transport != "oci":
        return path
    return (path if path.is_dir() else Path(reference.path.partition(":")[0])) / "index.json"


def _fingerprint(reference: ImageReference) -> str:
    """Return what changes with the file that a reference names; "" when nothing tells (a directory, no file)."""
    if reference.transport not in _FILE_TRANSPORTS:
        return ""
    try:
        status = _source_path(reference).stat()
    except OSError:
        return ""
    if not stat.S_ISREG(status.st_mode):
        return ""
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
