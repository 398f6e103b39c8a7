"""An image on top of another: its layers and one more. Owns how config, history and manifest follow; layer 2.

Adapting and `commit` use it. The base's config is kept as it is, members that we don't know included.

Source: OCI image-spec v1.1, config.md (history, rootfs), annotations.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import IO, cast

from berth.errors import ImageFormatError
from berth.oci import spec, stream
from berth.oci.sources import store_manifest
from berth.oci.spec import Descriptor
from berth.oci.store import Ingest, Store
from berth.units import utc_now

BASE_DIGEST = "org.opencontainers.image.base.digest"
BASE_NAME = "org.opencontainers.image.base.name"
# The twins that OCI has for docker's media types: the bytes are the same.
_OCI = {
    spec.DOCKER_LAYER: spec.LAYER, spec.DOCKER_LAYER_GZIP: spec.LAYER_GZIP, spec.DOCKER_LAYER_ZSTD: spec.LAYER_ZSTD,
}  # fmt: skip


def derive(
    store: Store, ingest: Ingest, base: Descriptor, layer: IO[bytes], *, created_by: str, annotations: Mapping[str, str]
) -> Descriptor:
    """Put an image made of `base`, which is in `store`, and `layer` into `ingest`; return its manifest.

    layer: an uncompressed archive, read from where it stands. created_by: what its line in the history says.
    annotations: of the manifest, besides those of the base. Raises ImageFormatError for a damaged base.
    """
    manifest = store.manifest(base)
    for needed in manifest.layers:
        if not ingest.has(needed):
            raise ImageFormatError(f"blob {needed.digest} is missing in the image store")
    blob = ingest.add(_chunks(layer), where="the new layer")
    config = ingest.add_json(_config(store, manifest, blob.digest, created_by), spec.CONFIG)
    layers = [
        dataclasses.replace(item, media_type=_OCI.get(item.media_type, item.media_type)) for item in manifest.layers
    ]
    return store_manifest(
        ingest, config, [*layers, blob.described(spec.LAYER)],
        {**manifest.annotations, BASE_DIGEST: base.digest, **annotations},
    )  # fmt: skip


def _config(store: Store, manifest: spec.Manifest, diff_id: str, created_by: str) -> dict[str, object]:
    where = f"config {manifest.config.digest}"
    document = spec.parse_json(store.read(manifest.config), where=where)
    diff_ids = spec.ImageConfig.from_json(document, where=where).diff_ids  # checks it, too
    members = dict(cast("dict[str, object]", document))
    now = utc_now()
    found = members.get("history")
    history = list(cast("list[object]", found)) if isinstance(found, list) else []
    # Readers want a line for each layer or no history at all.
    filled = sum(
        1 for line in history if not (isinstance(line, dict) and cast("dict[str, object]", line).get("empty_layer"))
    )
    history += [{"created_by": "a layer of the base image"}] * max(0, len(manifest.layers) - filled)
    members["history"] = [*history, {"created": now, "created_by": created_by}]
    members["created"] = now
    members["rootfs"] = {"type": "layers", "diff_ids": [*diff_ids, diff_id]}
    return members


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while data := file.read(stream.CHUNK):
        yield data
