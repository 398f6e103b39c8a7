"""The documents of the OCI image-spec (and docker's twins of them), decoded once. Owns their types; layer 2.

Every decoder takes parsed JSON (`object`) and the place it was found in, and raises ImageFormatError, which names both.
Source: OCI image-spec v1.1: descriptor.md, manifest.md, image-index.md, config.md, annotations.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import cast

from berth.errors import ImageFormatError, InvalidArgumentError
from berth.oci.digest import Digest, parse_digest

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = f"{LAYER}+gzip"
LAYER_ZSTD = f"{LAYER}+zstd"
# Source: distribution, "Image Manifest Version 2, Schema 2". Docker's documents have the same members.
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = f"{DOCKER_LAYER}.gzip"
DOCKER_LAYER_ZSTD = f"{DOCKER_LAYER}.zstd"

INDEXES = frozenset({INDEX, DOCKER_INDEX})
MANIFESTS = frozenset({MANIFEST, DOCKER_MANIFEST})
CONFIGS = frozenset({CONFIG, DOCKER_CONFIG})
LAYERS = frozenset({LAYER, LAYER_GZIP, LAYER_ZSTD, DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_LAYER_ZSTD})

REF_NAME = "org.opencontainers.image.ref.name"
DOCUMENT_MAX = 8 * 1024 * 1024  # bytes; registries refuse manifests above 4 MiB
_NESTING_MAX = 64

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64", "amd64": "amd64"}
_PLATFORMS = ("linux/amd64", "linux/arm64")


@dataclasses.dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on, in Go's words: ``linux``, ``amd64``; variant only narrows (``v8``)."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.os}/{self.architecture}"

    def to_json(self) -> dict[str, object]:
        variant = {"variant": self.variant} if self.variant else {}
        return {"architecture": self.architecture, "os": self.os, **variant}

    def same(self, other: Platform) -> bool:
        """Say whether an image for `other` runs here. Variants are ignored: every arm64 is v8 to a machine."""
        return (self.os, self.architecture) == (other.os, other.architecture)


def parse_platform(text: str) -> Platform:
    """Read ``linux/amd64`` or ``linux/arm64[/v8]``, the platforms that berth has a guest agent for."""
    parts = text.split("/")
    if "/".join(parts[:2]) not in _PLATFORMS or len(parts) > 3:
        raise InvalidArgumentError(f"invalid platform '{text}'", hint=f"one of {', '.join(_PLATFORMS)}")
    return Platform(*parts)


def host_platform() -> Platform:
    machine = os.uname().machine
    return Platform("linux", _MACHINES.get(machine, machine))


@dataclasses.dataclass(frozen=True, slots=True)
class Descriptor:
    """Points at one blob. size: bytes, >= 0. `platform` is set in indexes only."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    platform: Platform | None = None

    @classmethod
    def from_json(cls, document: object, *, where: str) -> Descriptor:
        members = _mapping(document, where=where)
        match members.get("mediaType"), members.get("size"):
            case str(media_type), int(size) if size >= 0 and size is not True:
                platform = members.get("platform")
                return cls(
                    media_type,
                    parse_digest(members.get("digest"), where=where),
                    size,
                    _strings(members.get("annotations"), where=f"{where}: annotations"),
                    None if platform is None else _platform(platform, where=where),
                )
            case _:
                raise ImageFormatError(f"{where}: not an OCI descriptor: {document!r:.80}")

    def to_json(self) -> dict[str, object]:
        document: dict[str, object] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.platform:
            document["platform"] = self.platform.to_json()
        return document


@dataclasses.dataclass(frozen=True, slots=True)
class Index:
    """A list of manifests, or of further indexes."""

    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str]

    @classmethod
    def from_json(cls, document: object, *, where: str) -> Index:
        members = _mapping(document, where=where)
        if members.get("schemaVersion") != 2 or "manifests" not in members:
            raise ImageFormatError(f"{where}: not an OCI image index: {document!r:.80}")
        manifests = _list(members["manifests"], where=f"{where}: manifests")
        return cls(
            tuple(Descriptor.from_json(item, where=f"{where}: manifests[{i}]") for i, item in enumerate(manifests)),
            _strings(members.get("annotations"), where=f"{where}: annotations"),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """One image for one platform: its config and its layers, lowest first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    @classmethod
    def from_json(cls, document: object, *, where: str) -> Manifest:
        members = _mapping(document, where=where)
        if members.get("schemaVersion") == 1:
            raise ImageFormatError(f"{where}: a docker schema 1 manifest, which nobody writes since 2017")
        if members.get("schemaVersion") != 2 or "config" not in members or "layers" not in members:
            raise ImageFormatError(f"{where}: not an OCI image manifest: {document!r:.80}")
        layers = _list(members["layers"], where=f"{where}: layers")
        return cls(
            Descriptor.from_json(members["config"], where=f"{where}: config"),
            tuple(Descriptor.from_json(item, where=f"{where}: layers[{i}]") for i, item in enumerate(layers)),
            _strings(members.get("annotations"), where=f"{where}: annotations"),
        )

    def to_json(self) -> dict[str, object]:
        document: dict[str, object] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.config.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
        }
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        return document


@dataclasses.dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image says about itself. created: RFC 3339, "" when unknown; `env` holds ``K=V``.

    Machines run /sbin/init, so entrypoint and cmd only matter to who adapts an image that has no init.
    """

    platform: Platform
    created: str = ""
    diff_ids: tuple[Digest, ...] = ()
    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    exposed_ports: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, document: object, *, where: str) -> ImageConfig:
        members = _mapping(document, where=where)
        process = _mapping(members.get("config"), where=f"{where}: config")
        rootfs = _mapping(members.get("rootfs"), where=f"{where}: rootfs")
        diff_ids = _list(rootfs.get("diff_ids"), where=f"{where}: rootfs.diff_ids")
        return cls(
            platform=_platform(members, where=where),
            created=_text(members.get("created"), where=f"{where}: created"),
            diff_ids=tuple(parse_digest(item, where=f"{where}: rootfs.diff_ids") for item in diff_ids),
            user=_text(process.get("User"), where=f"{where}: User"),
            env=_texts(process.get("Env"), where=f"{where}: Env"),
            entrypoint=_texts(process.get("Entrypoint"), where=f"{where}: Entrypoint"),
            cmd=_texts(process.get("Cmd"), where=f"{where}: Cmd"),
            working_dir=_text(process.get("WorkingDir"), where=f"{where}: WorkingDir"),
            stop_signal=_text(process.get("StopSignal"), where=f"{where}: StopSignal"),
            labels=_strings(process.get("Labels"), where=f"{where}: Labels"),
            exposed_ports=tuple(_mapping(process.get("ExposedPorts"), where=f"{where}: ExposedPorts")),
        )

    def to_json(self) -> dict[str, object]:
        process: dict[str, object] = {
            "User": self.user,
            "Env": list(self.env),
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.cmd),
            "WorkingDir": self.working_dir,
            "StopSignal": self.stop_signal,
            "Labels": dict(self.labels),
            "ExposedPorts": {port: {} for port in self.exposed_ports},
        }
        return {
            **({"created": self.created} if self.created else {}),
            **self.platform.to_json(),
            "config": {key: value for key, value in process.items() if value},
            "rootfs": {"type": "layers", "diff_ids": list(self.diff_ids)},
        }


def parse_json(data: bytes, *, where: str) -> object:
    """Parse a JSON document of bounded size and depth. Raises ImageFormatError."""
    if len(data) > DOCUMENT_MAX:
        raise ImageFormatError(f"{where}: a document of {len(data)} bytes is longer than {DOCUMENT_MAX}")
    try:
        document: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageFormatError(f"{where}: not JSON: {error}") from error
    if _depth(document) > _NESTING_MAX:
        raise ImageFormatError(f"{where}: nested deeper than {_NESTING_MAX} levels")
    return document


def encode_json(document: Mapping[str, object]) -> bytes:
    """Print a document the one way: the same document has the same digest."""
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def _depth(document: object) -> int:
    level: list[object] = [document]
    for depth in range(_NESTING_MAX + 1):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += cast("dict[str, object]", item).values()
            elif isinstance(item, list):
                below += cast("list[object]", item)
        if not below:
            return depth
        level = below
    return _NESTING_MAX + 1


def _platform(document: object, *, where: str) -> Platform:
    members = _mapping(document, where=where)
    match members.get("architecture"), members.get("os"):
        case str(architecture), str(system) if architecture and system:
            return Platform(system, architecture, _text(members.get("variant"), where=f"{where}: variant"))
        case _:
            raise ImageFormatError(f"{where}: no platform (os and architecture): {document!r:.80}")


def _mapping(value: object, *, where: str) -> Mapping[str, object]:
    # Go writes null for an empty map or list; so absent, null and empty are one.
    if value is None:
        return {}
    if isinstance(value, dict):
        return cast("dict[str, object]", value)
    raise ImageFormatError(f"{where}: not an object: {value!r:.80}")


def _list(value: object, *, where: str) -> Sequence[object]:
    if value is None:
        return ()
    if isinstance(value, list):
        return cast("list[object]", value)
    raise ImageFormatError(f"{where}: not a list: {value!r:.80}")


def _text(value: object, *, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise ImageFormatError(f"{where}: not a string: {value!r:.80}")


def _texts(value: object, *, where: str) -> tuple[str, ...]:
    return tuple(_text(item, where=where) for item in _list(value, where=where))


def _strings(value: object, *, where: str) -> Mapping[str, str]:
    return {key: _text(item, where=f"{where}.{key}") for key, item in _mapping(value, where=where).items()}
