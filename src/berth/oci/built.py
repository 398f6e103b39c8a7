"""Images to buildah and from it: what its config must have, what its `dir:` transport wrote. Layer 2, for `build`.

manifest.json, version, HEX    a `dir:`: the manifest; each blob by the hex digits of its digest
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from berth.errors import ImageFormatError
from berth.oci import spec, stream
from berth.oci.derive import BASE_DIGEST, BASE_NAME
from berth.oci.digest import Digest, hex_of
from berth.oci.sources import store_manifest
from berth.oci.spec import Descriptor
from berth.oci.store import Ingest


def fetch_built(
    folder: Path, ingest: Ingest, *, known: Mapping[Digest, Descriptor], bases: Mapping[str, str]
) -> Descriptor:
    """Copy the image in `folder`, verified; return its new manifest.

    known: layers of the store by their diff ids; where the image has one of them, it gets it as it is stored,
    compressed or not, so that images share what they have in common. bases: the images that it may be built on, their
    digests by their names: what buildah says of the base's digest is true of its own copy alone.
    """
    where = str(folder)
    manifest = spec.Manifest.from_json(
        spec.parse_json((folder / "manifest.json").read_bytes(), where=where), where=where
    )
    config = _copied(folder, manifest.config, ingest)
    document = spec.ImageConfig.from_json(spec.parse_json(ingest.read(config), where=where), where=where)
    if len(document.diff_ids) != len(manifest.layers):
        raise ImageFormatError(f"{where}: {len(manifest.layers)} layers, but {len(document.diff_ids)} diff ids")
    layers = [
        _layer(folder, layer, known.get(diff_id), ingest)
        for layer, diff_id in zip(manifest.layers, document.diff_ids, strict=True)
    ]
    annotations = dict(manifest.annotations)
    annotations.pop(BASE_DIGEST, None)
    if (name := annotations.get(BASE_NAME, "")) in bases:
        annotations[BASE_DIGEST] = bases[name]
    return store_manifest(ingest, config, layers, annotations)


def _layer(folder: Path, layer: Descriptor, known: Descriptor | None, ingest: Ingest) -> Descriptor:
    if known is not None and ingest.has(known):
        return known
    return _copied(folder, layer, ingest)


def _copied(folder: Path, descriptor: Descriptor, ingest: Ingest) -> Descriptor:
    plain = dataclasses.replace(descriptor, annotations={}, platform=None)
    if not ingest.has(plain):
        ingest.add(_chunks(folder / hex_of(descriptor.digest)), where=str(folder), expected=plain)
    return plain


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(stream.CHUNK):
            yield data


def with_history(config: Mapping[str, object], layers: int) -> Mapping[str, object]:
    """Return an image's config with a history that has a line for each layer.

    The image-spec lets it be absent; buildah refuses to build on such an image.
    """
    found = config.get("history")
    history = cast("list[dict[str, object]]", found) if isinstance(found, list) else []
    if sum(1 for line in history if not line.get("empty_layer")) == layers:
        return config
    return {**config, "history": [{"created_by": "a layer of the base image"} for _ in range(layers)]}
