"""The one logger, and how it speaks: debug lines on stderr with --debug, silence otherwise. Layer 1."""

from __future__ import annotations

import logging
import os

log = logging.getLogger("berth")


def configure(*, debug: bool) -> None:
    """Send our log to stderr: all of it with `debug` (or BERTH_DEBUG=1), warnings otherwise. Only `cli` calls this."""
    debug = debug or os.environ.get("BERTH_DEBUG", "") not in ("", "0")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("berth[%(process)d] %(relativeCreated)5d ms: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.WARNING)
