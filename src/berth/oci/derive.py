"""An image made from another: more layers on top, told in the history. Owns the config that it gets; layer 2.

Works on the config as a document and not on `ImageConfig`, so that members which berth does not know are kept.
Source: OCI image-spec v1.1, config.md, "history", "rootfs".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from berth.errors import ImageFormatError
from berth.oci.digest import Digest

_Document = Mapping[str, object]


def derive_config(config: _Document, diff_ids: Sequence[Digest], *, created: str, by: str, comment: str) -> _Document:
    """Return the config of `config`'s image with more layers on top. created: RFC 3339; by: what made the layers."""
    base = with_history(config)
    rootfs = cast("Mapping[str, object]", base["rootfs"])
    entry = {"created": created, "created_by": by, **({"comment": comment} if comment else {})}
    return {
        **base,
        "created": created,
        "rootfs": {**rootfs, "diff_ids": [*_diff_ids(config), *diff_ids]},
        "history": [*cast("list[object]", base["history"]), *(entry for _ in diff_ids)],
    }


def with_history(config: _Document) -> _Document:
    """Return the config with a history that has as many entries as the image has layers.

    The specification lets it be absent, yet buildah and others count on it.
    """
    found = config.get("history")
    history = cast("list[object]", found) if isinstance(found, list) else []
    told = sum(1 for entry in history if not (isinstance(entry, dict) and entry.get("empty_layer")))  # pyright: ignore[reportUnknownMemberType]
    layers = len(_diff_ids(config))
    if told == layers:
        return {**config, "history": history}
    created = config.get("created")
    entry = {"created": created} if isinstance(created, str) else {}
    return {**config, "history": [{**entry, "created_by": "unknown"} for _ in range(layers)]}


def _diff_ids(config: _Document) -> list[object]:
    match config.get("rootfs"):
        case {"diff_ids": list(found)}:  # pyright: ignore[reportUnknownVariableType]
            return cast("list[object]", found)
        case _:
            raise ImageFormatError("the image's config has no rootfs.diff_ids")
