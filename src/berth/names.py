"""Names that people give: parsed once, then trusted. Owns `MachineName` and `ImageReference`; anyone may use it."""

from __future__ import annotations

import dataclasses
import re
from typing import NewType

from berth.errors import InvalidArgumentError
from berth.fastpath import is_machine_name

MachineName = NewType("MachineName", str)

HIDDEN = ".adapt-"  # begins the names of throw-away machines, which nobody can give and no list shows

_TRANSPORTS = ("docker", "oci", "oci-archive", "docker-archive", "rootfs", "bootstrap")
# Source: distribution-spec v1.1, "Pulling manifests": <name>, <reference>; docker's reference grammar for the domain.
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_REGISTRY = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")


def parse_machine_name(text: str) -> MachineName:
    """Check a machine's name: 1 to 63 of ``a-z0-9-``, a letter or digit at both ends."""
    if not is_machine_name(text):
        raise InvalidArgumentError(
            f"invalid machine name '{text}'",
            hint="a name has 1 to 63 lower-case letters, digits and '-', and must start and end with a letter or digit",
        )
    return MachineName(text)


def parse_bundle_name(text: str) -> MachineName:
    """Check the name of a machine or of a throw-away one."""
    if text.startswith(HIDDEN) and is_machine_name(text[1:]):
        return MachineName(text)
    return parse_machine_name(text)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageReference:
    """What an image is called.

    transport: one of `docker` (a registry's name, also the form kept in the local store), `oci`, `oci-archive`,
    `docker-archive`, `rootfs`, `bootstrap`. For `docker`, `path` is ``registry/repository`` and one of `tag`, `digest`
    is set; for the others `path` is all that follows the colon, and tag and digest are None.
    """

    transport: str
    path: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        if self.transport != "docker":
            return f"{self.transport}:{self.path}"
        suffix = (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")
        return self.path + suffix

    @property
    def familiar(self) -> str:
        """The short form people type: ``debian:12`` for ``docker.io/library/debian:12``."""
        text = str(self)
        if self.transport == "docker":
            for prefix in ("docker.io/library/", "docker.io/"):
                short = text.removeprefix(prefix)
                # Only where it means the same: docker.io/my.corp/app must not become a registry called my.corp.
                if short != text and _is_same(short, self):
                    return short
        return text


def _is_same(text: str, reference: ImageReference) -> bool:
    try:
        return parse_reference(text) == reference
    except InvalidArgumentError:
        return False


def parse_reference(text: str) -> ImageReference:
    """Read an image reference, filling in docker.io, library/ and :latest. Raises InvalidArgumentError."""
    transport, colon, rest = text.partition(":")
    if colon and transport in _TRANSPORTS and (transport != "docker" or rest.startswith("//")):
        if transport != "docker":
            if not rest:
                raise InvalidArgumentError(f"invalid image reference '{text}': nothing follows '{transport}:'")
            return ImageReference(transport, rest)
        text = rest.removeprefix("//")
    return _parse_registry_name(text)


def _parse_registry_name(text: str) -> ImageReference:
    name, at, digest = text.partition("@")
    head, slash, tail = name.rpartition("/")
    last, colon, tag = tail.partition(":")
    name = head + slash + last
    registry, slash, repository = name.partition("/")
    if not slash or not (set(registry) & {".", ":"} or registry == "localhost"):
        registry, repository = "docker.io", name
    if registry == "docker.io" and "/" not in repository:
        repository = f"library/{repository}"
    valid = (
        _REGISTRY.fullmatch(registry)
        and _REPOSITORY.fullmatch(repository)
        and (not colon or _TAG.fullmatch(tag))
        and (not at or _DIGEST.fullmatch(digest))
    )
    if not valid:
        hint = "write it as debian:12, host:port/name:tag or name@sha256:…"
        if text.startswith((".", "/", "~")):
            hint = (
                f"say what kind of file it is: rootfs:{text}, oci-archive:{text}, docker-archive:{text} or oci:{text}"
            )
        raise InvalidArgumentError(f"invalid image reference '{text}'", hint=hint)
    return ImageReference(
        "docker", f"{registry}/{repository}", (tag or None if at else tag or "latest"), digest or None
    )
