"""Sizes and times as people write them. Owns their parsing and printing; anyone may use it."""

from __future__ import annotations

import datetime
import re

from berth.errors import InvalidArgumentError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_SIZE = re.compile(r"(\d{1,19}(?:\.\d{1,19})?)\s*([kmgtp]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def parse_size(text: str, *, what: str = "size") -> int:
    """Read ``512M``, ``8G``, ``1.5G`` or plain bytes (binary units); return bytes, > 0.

    Raises InvalidArgumentError, which names `what`.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * 1024 ** _POWER[match[2].lower()]) if match else 0
    if not 0 < size < 2**63:
        raise InvalidArgumentError(f"invalid {what} '{text}'", hint="write it as 512M, 8G, 1.5G or plain bytes")
    return size


def format_size(size: int) -> str:
    """Print bytes for people: ``512M``, ``1.5G``."""
    value = float(size)
    for unit in ("B", "K", "M", "G", "T"):
        if value < 1024 or unit == "T":
            break
        value /= 1024
    return f"{value:.0f}{unit}" if value >= 10 or value == int(value) else f"{value:.1f}{unit}"


def utc_now() -> str:
    """Return the time now, RFC 3339 in UTC to the second: ``2026-11-22T14:16:00Z``."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
