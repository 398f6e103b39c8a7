"""Images from files and directories into the store. Owns the transports oci, oci-archive, docker-archive; layer 2.

Every function copies one image, for one platform, into an `Ingest`, verified, and returns what its caller commits.
Root file systems (`rootfs:`) are in `rootfs`, the distributions (`bootstrap:`) in `bootstrap`.

Sources: OCI image-spec v1.1, image-layout.md, image-index.md; docker image-spec v1.2, "Combined Image JSON + Filesystem
Changeset Format", and v1.0 for archives with `repositories` alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from berth.errors import ImageFormatError, InvalidArgumentError, NotFoundError
from berth.names import parse_reference
from berth.oci import spec, stream
from berth.oci.archive import DirectoryFiles, Files, blob_name, opened_archive, read_json
from berth.oci.choose import choose
from berth.oci.digest import Digest
from berth.oci.spec import Descriptor, Platform
from berth.oci.store import Blob, Ingest

_CONTAINERD_NAME = "io.containerd.image.name"  # docker 25 and later; its ref.name is the bare tag


@dataclasses.dataclass(frozen=True, slots=True)
class Fetched:
    """An image that is complete in an `Ingest`. names: the references that its archive gives it, in full form."""

    manifest: Descriptor
    names: tuple[str, ...] = ()


def fetch_oci_layout(location: str, ingest: Ingest, *, platform: Platform | None) -> Fetched:
    """Copy an image out of an OCI layout on disk; `location` is PATH or PATH:TAG."""
    path, tag = _split_location(location)
    if not path.is_dir():
        raise NotFoundError(f"OCI layout {path} not found")
    files = DirectoryFiles(path)
    return _fetch_from_index(files, _one_of(_top_level(files), tag, files.where), ingest, platform)


def fetch_archive(path: Path, ingest: Ingest, *, platform: Platform | None) -> list[Fetched]:
    """Copy all images out of an archive: of an OCI layout, or of `docker save` in any of its forms."""
    with opened_archive(path, ingest) as files:
        # docker 25 writes both kinds in one file; the OCI one keeps the digests that the registry knows.
        if files.has("index.json") and files.has("oci-layout"):
            found = [_fetch_from_index(files, item, ingest, platform) for item in _top_level(files)]
        elif files.has("manifest.json"):
            found = _fetch_docker(files, ingest)
        elif files.has("repositories"):
            found = _fetch_legacy(files, ingest)
        else:
            raise ImageFormatError(
                f"{files.where} is no image archive: it has neither index.json nor manifest.json",
                hint="for the archive of a root file system: berth image import FILE REFERENCE",
            )
    if not found:
        raise ImageFormatError(f"{files.where} holds no image")
    return found


def fetch_one(path: Path, ingest: Ingest, *, platform: Platform | None) -> Fetched:
    """Copy the only image out of an archive. Raises InvalidArgumentError when there are several."""
    found = fetch_archive(path, ingest, platform=platform)
    if len({item.manifest.digest for item in found}) > 1:
        names = ", ".join(name for item in found for name in item.names)
        raise InvalidArgumentError(f"{path} holds several images: {names}", hint=f"berth image load {path}")
    return found[0]


def store_manifest(
    ingest: Ingest, config: Descriptor, layers: Sequence[Descriptor], annotations: Mapping[str, str] | None = None
) -> Descriptor:
    """Write the manifest of an image whose parts are in `ingest`."""
    manifest = spec.Manifest(config, tuple(layers), annotations or {})
    return ingest.add_json(manifest.to_json(), spec.MANIFEST)


# OCI layouts


def _top_level(files: Files) -> list[Descriptor]:
    match read_json(files, "oci-layout"):
        case {"imageLayoutVersion": str(version)} if version.startswith("1."):
            pass
        case _:
            raise ImageFormatError(f"{files.where}: oci-layout has no version that berth reads")
    where = f"{files.where}: index.json"
    return list(spec.Index.from_json(read_json(files, "index.json"), where=where).manifests)


def _split_location(location: str) -> tuple[Path, str | None]:
    if Path(location).is_dir():
        return Path(location), None
    path, colon, tag = location.partition(":")
    return Path(path), tag if colon else None


def _one_of(entries: Sequence[Descriptor], tag: str | None, where: str) -> Descriptor:
    names = [_name_of(entry) for entry in entries]
    if tag is None:
        if len({entry.digest for entry in entries}) == 1:
            return entries[0]
        if not entries:
            raise ImageFormatError(f"{where} holds no image")
        listed = ", ".join(name for name in names if name)
        raise InvalidArgumentError(f"{where} holds several images", hint=f"add :TAG, one of {listed}")
    for entry, name in zip(entries, names, strict=True):
        if name is not None and tag in (name, entry.annotations.get(spec.REF_NAME)):
            return entry
    raise NotFoundError(f"image '{tag}' not found in {where}")


def _name_of(entry: Descriptor) -> str | None:
    return entry.annotations.get(_CONTAINERD_NAME) or entry.annotations.get(spec.REF_NAME)


def _fetch_from_index(files: Files, top: Descriptor, ingest: Ingest, platform: Platform | None) -> Fetched:
    chosen = choose(_Documents(files), top, platform)
    ingest.add_bytes(chosen.document)
    for needed in (chosen.manifest.config, *chosen.manifest.layers):
        _copy(files, needed, ingest)
    name = _name_of(top)
    return Fetched(chosen.descriptor, _full_names([name] if name else []))


@dataclasses.dataclass(frozen=True, slots=True)
class _Documents:
    """The documents among `files`, as `choose` reads them."""

    files: Files

    @property
    def where(self) -> str:
        return self.files.where

    def read(self, descriptor: Descriptor) -> bytes:
        data = b""
        for chunk in self.files.chunks(blob_name(descriptor)):
            data += chunk
            if len(data) > descriptor.size:
                break
        return data


def _copy(files: Files, descriptor: Descriptor, ingest: Ingest) -> None:
    if not ingest.has(descriptor):
        ingest.add(files.chunks(blob_name(descriptor)), where=files.where, expected=descriptor)


# docker save


def _fetch_docker(files: Files, ingest: Ingest) -> list[Fetched]:
    where = f"{files.where}: manifest.json"
    found: list[Fetched] = []
    for item in _list(read_json(files, "manifest.json"), where):
        members = _object(item, where)
        data = b"".join(files.chunks(_string(members.get("Config"), where)))
        config = spec.ImageConfig.from_json(spec.parse_json(data, where=where), where=f"{where}: config")
        paths = [_string(path, where) for path in _list(members.get("Layers"), where)]
        if len(paths) != len(config.diff_ids):
            raise ImageFormatError(f"{where}: {len(paths)} layers, but {len(config.diff_ids)} diff ids")
        layers = [
            _add_layer(files, path, ingest, diff_id) for path, diff_id in zip(paths, config.diff_ids, strict=True)
        ]
        names = [_string(name, where) for name in _list(members.get("RepoTags"), where)]
        manifest = store_manifest(ingest, ingest.add_bytes(data).described(spec.CONFIG), layers)
        found.append(Fetched(manifest, _full_names(names)))
    return found


def _add_layer(files: Files, path: str, ingest: Ingest, diff_id: Digest | None) -> Descriptor:
    """Add a layer as it is; check its uncompressed content against `diff_id`."""
    blob = ingest.add(files.chunks(path), where=f"{files.where}: {path}")
    media_type, content = _look_into(ingest, blob, f"{files.where}: {path}")
    if diff_id is not None and content != diff_id:
        raise ImageFormatError(f"{files.where}: layer {path} is damaged: its digest is {content}, not {diff_id}")
    return blob.described(media_type)


def _look_into(ingest: Ingest, blob: Blob, where: str) -> tuple[str, Digest]:
    """Return a layer's media type, by its first bytes, and the digest of its uncompressed content."""
    fd = ingest.open(blob.digest)
    try:
        media_types = {"": spec.LAYER, "gzip": spec.LAYER_GZIP, "zstd": spec.LAYER_ZSTD}
        codec = stream.codec_of(fd)
        if codec not in media_types:
            raise ImageFormatError(f"{where}: a layer compressed with {codec}")
        if not codec:
            return spec.LAYER, blob.digest
        with stream.opened(fd, where=where) as data:
            return media_types[codec], data.digest()
    finally:
        os.close(fd)


def _fetch_legacy(files: Files, ingest: Ingest) -> list[Fetched]:
    """Read an archive of docker before 1.10: a chain of ID/json, each naming its parent, and ID/layer.tar."""
    where = f"{files.where}: repositories"
    names: dict[str, list[str]] = {}
    for repository, tags in _object(read_json(files, "repositories"), where).items():
        for tag, top in _object(tags, where).items():
            names.setdefault(_string(top, where), []).append(f"{repository}:{tag}")
    return [Fetched(_fetch_chain(files, top, ingest), _full_names(references)) for top, references in names.items()]


def _fetch_chain(files: Files, top: str, ingest: Ingest) -> Descriptor:
    chain: list[str] = []
    newest: Mapping[str, object] = {}
    current = top
    while current:
        if current in chain or len(chain) > 1000:
            raise ImageFormatError(f"{files.where}: the layers of {top} are in a loop")
        chain.append(current)
        document = _object(read_json(files, f"{current}/json"), f"{files.where}: {current}/json")
        newest = newest or document
        parent = document.get("parent")
        current = parent if isinstance(parent, str) else ""
    layers = [_add_layer(files, f"{layer}/layer.tar", ingest, None) for layer in reversed(chain)]
    diff_ids = [_look_into(ingest, Blob(layer.digest, layer.size), files.where)[1] for layer in layers]
    wanted = ("architecture", "os", "created", "author", "config")
    kept: dict[str, object] = {key: value for key, value in newest.items() if key in wanted}
    kept["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    spec.ImageConfig.from_json(kept, where=f"{files.where}: {top}/json")
    return store_manifest(ingest, ingest.add_json(kept, spec.CONFIG), layers)


def _full_names(names: Sequence[str]) -> tuple[str, ...]:
    """Give names their full form; one that is no reference (a bare tag in an OCI layout) names nothing here."""
    full: list[str] = []
    for name in names:
        try:
            reference = parse_reference(name)
        except InvalidArgumentError:
            continue
        if reference.transport == "docker" and (":" in name or "/" in name):
            full.append(str(reference))
    return tuple(dict.fromkeys(full))


def _object(value: object, where: str) -> Mapping[str, object]:
    if isinstance(value, dict):
        return cast("dict[str, object]", value)
    raise ImageFormatError(f"{where}: not an object: {value!r:.80}")


def _list(value: object, where: str) -> Sequence[object]:
    if value is None:
        return ()
    if isinstance(value, list):
        return cast("list[object]", value)
    raise ImageFormatError(f"{where}: not a list: {value!r:.80}")


def _string(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    raise ImageFormatError(f"{where}: not a string: {value!r:.80}")
