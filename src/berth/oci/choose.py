"""The one image for a platform, out of an index or a manifest. Owns that choice; `sources` and `registry` use it.

Sources: OCI image-spec v1.1, image-index.md, manifest.md.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from berth.errors import ImageFormatError, NotFoundError
from berth.oci import spec
from berth.oci.digest import digest_of
from berth.oci.spec import Descriptor, Index, Manifest, Platform

_NESTING_MAX = 4  # indexes in indexes
_HELD_MAX = 4 * spec.DOCUMENT_MAX  # bytes of all documents of one choice
_DOCUMENTS_MAX = 64  # documents read for one choice: each may be a request to a registry


class Documents(Protocol):
    """Read access to indexes, manifests and configs. where: what they come from, for messages."""

    @property
    def where(self) -> str: ...

    def read(self, descriptor: Descriptor) -> bytes:
        """Return a document, not verified, at most a little longer than the descriptor says."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """An image for one platform: its manifest, decoded; that and its config as they are written."""

    descriptor: Descriptor
    manifest: Manifest
    document: bytes
    config: bytes


def choose(documents: Documents, top: Descriptor, platform: Platform | None) -> Chosen:
    """Follow indexes from `top` to the one manifest for the platform (the host's when none is asked for).

    A single manifest is taken as it is unless a platform was asked for. Raises NotFoundError, which lists the platforms
    there are, and ImageFormatError.
    """
    chooser = _Chooser(documents, platform)
    found = chooser.choose(top, depth=0)
    manifest = chooser.manifest(found)
    chooser.check(manifest)
    plain = dataclasses.replace(found, annotations={}, platform=None)
    return Chosen(plain, manifest, chooser.read(found), chooser.read(manifest.config))


class _Chooser:
    """One choice: what it has read already, verified."""

    def __init__(self, documents: Documents, platform: Platform | None) -> None:
        self._documents = documents
        self._asked = platform
        self._wanted = platform or spec.host_platform()
        self._where = documents.where
        self._read: dict[tuple[str, int], bytes] = {}

    def choose(self, descriptor: Descriptor, *, depth: int) -> Descriptor:
        if descriptor.media_type in spec.MANIFESTS:
            return descriptor
        if descriptor.media_type not in spec.INDEXES:
            raise ImageFormatError(f"{self._where}: {descriptor.digest} is no image but {descriptor.media_type}")
        if depth >= _NESTING_MAX:
            raise ImageFormatError(f"{self._where}: image indexes are nested deeper than {_NESTING_MAX}, or in a loop")
        where = f"{self._where}: index {descriptor.digest}"
        index = Index.from_json(spec.parse_json(self.read(descriptor), where=where), where=where)
        for item in index.manifests:
            if item.platform is not None and item.platform.same(self._wanted):
                return self.choose(item, depth=depth + 1)
        for item in index.manifests:
            # Indexes in indexes, and manifests of tools that leave the platform to the config.
            if item.platform is None and item.media_type in spec.INDEXES | spec.MANIFESTS:
                found = self._try(item, depth)
                if found is not None:
                    return found
        offered = sorted({str(item.platform) for item in index.manifests if item.platform})
        raise NotFoundError(
            f"{self._where} has no image for {self._wanted}", hint=f"it has {', '.join(offered)}" if offered else None
        )

    def manifest(self, descriptor: Descriptor) -> Manifest:
        where = f"{self._where}: manifest {descriptor.digest}"
        manifest = Manifest.from_json(spec.parse_json(self.read(descriptor), where=where), where=where)
        if manifest.config.media_type not in spec.CONFIGS:
            raise ImageFormatError(f"{where}: no image: its config is {manifest.config.media_type}")
        for layer in manifest.layers:
            if layer.media_type not in spec.LAYERS:
                raise ImageFormatError(f"{where}: a layer of an unknown media type {layer.media_type}")
        return manifest

    def check(self, manifest: Manifest) -> None:
        config = self._config(manifest.config)
        if len(config.diff_ids) != len(manifest.layers):
            raise ImageFormatError(f"{self._where}: {len(manifest.layers)} layers, but {len(config.diff_ids)} diff ids")
        if self._asked is not None and not config.platform.same(self._asked):
            raise NotFoundError(f"{self._where} has no image for {self._asked}", hint=f"it has {config.platform}")

    def read(self, descriptor: Descriptor) -> bytes:
        key = (descriptor.digest, descriptor.size)
        if key not in self._read:
            if descriptor.size > spec.DOCUMENT_MAX:
                raise ImageFormatError(f"{self._where}: a document of {descriptor.size} bytes is too long")
            held = sum(len(document) for document in self._read.values()) + descriptor.size
            if len(self._read) >= _DOCUMENTS_MAX or held > _HELD_MAX:
                raise ImageFormatError(f"{self._where}: no image among the first {len(self._read)} of its documents")
            data = self._documents.read(descriptor)
            if len(data) != descriptor.size or digest_of(data) != descriptor.digest:
                raise ImageFormatError(f"{self._where}: blob {descriptor.digest} is damaged or truncated")
            self._read[key] = data
        return self._read[key]

    def _try(self, item: Descriptor, depth: int) -> Descriptor | None:
        try:
            found = self.choose(item, depth=depth + 1)
        except NotFoundError:
            return None
        return found if self._config(self.manifest(found).config).platform.same(self._wanted) else None

    def _config(self, descriptor: Descriptor) -> spec.ImageConfig:
        where = f"{self._where}: config {descriptor.digest}"
        return spec.ImageConfig.from_json(spec.parse_json(self.read(descriptor), where=where), where=where)
