"""Layers to a directory, by descriptors alone. Owns the order of it; the engine runs it inside a user namespace.

A machine's root is an id of nobody on the host, so its files must be made by that root: in its namespace, where
neither the store nor berth's own files may be reachable. Everything needed is imported above, nothing later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from berth import inside
from berth.errors import BerthError, ImageFormatError
from berth.oci import spec, stream
from berth.oci.layer import Devices, Limits, UnpackReport, apply_layer

_STEP = 4 * stream.CHUNK  # bytes between two reports of progress


def unpack_layers(
    target_fd: int,
    layers: Sequence[tuple[int, str]],
    *,
    devices: Devices,
    progress: Callable[[int, int | None], None] = lambda _done, _total: None,
    limits: Limits | None = None,
    first: int = 1,
    height: int | None = None,
) -> UnpackReport:
    """Apply `layers`, lowest first, each a blob's descriptor and its media type, to the directory `target_fd`.

    The descriptors stay open and the caller's. progress: told bytes of blobs read, and all. first, height: which layer
    of how many in the image the lowest is, where these are not all of them. After an error the directory is half-made
    and the caller's to remove. Raises what `apply_layer` does.
    """
    report = UnpackReport()
    total = sum(os.fstat(fd).st_size for fd, _ in layers)
    done = shown = 0

    def consumed(count: int) -> None:
        nonlocal done, shown
        done += count
        if done - shown >= _STEP or done == total:
            shown = done
            progress(done, total)

    bound = limits or Limits()
    for number, (fd, media_type) in enumerate(layers, first):
        where = f"layer {number} of {height or len(layers)}"
        if media_type not in spec.LAYERS:
            raise ImageFormatError(f"{where}: the media type {media_type} is not one of a layer")
        try:
            with stream.opened(fd, where=where, limit=bound.stream, consumed=consumed) as data:
                apply_layer(data, target_fd, report, devices=devices, limits=bound)
        except OSError as error:
            raise BerthError(f"can't unpack {where}: {error.strerror}") from error
    return report


def unpack_inside(
    target_fd: int, layers: Sequence[tuple[int, str]], devices: Devices, first: int = 1, height: int | None = None
) -> dict[str, object]:
    """`unpack_layers` for `userns.call`: plain values in and out, progress told to the process that called.

    `UnpackReport.from_json` reads the result.
    """
    pairs = [(fd, media_type) for fd, media_type in layers]
    report = unpack_layers(target_fd, pairs, devices=devices, progress=inside.report, first=first, height=height)
    return report.to_json()
