"""Digests: the names of blobs by their content. Owns their syntax and their computation; the `oci` package uses it.

Source: OCI image-spec v1.1, descriptor.md, "Digests". Only sha256 is accepted: no registry or tool writes another.
"""

from __future__ import annotations

import hashlib
import re
from typing import NewType

from berth.errors import ImageFormatError

Digest = NewType("Digest", str)  # ``sha256:`` + 64 lower-case hex digits

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})")


def parse_digest(value: object, *, where: str) -> Digest:
    """Check that `value` is a sha256 digest. Raises ImageFormatError, which names `where`."""
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return Digest(value)
    raise ImageFormatError(f"{where}: not a sha256 digest: {value!r:.80}")


def parse_prefix(text: str) -> str | None:
    """Return the hex digits of a digest or of its beginning (4 to 64), None when `text` cannot be one."""
    match = _PREFIX.fullmatch(text)
    return match[1] if match else None


def digest_of(data: bytes) -> Digest:
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


def hex_of(digest: Digest) -> str:
    """Return the digits after the colon: the blob's file name."""
    return digest.removeprefix("sha256:")
