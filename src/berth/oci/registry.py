"""Images from registries (the distribution-spec). Owns their transport; it comes with the issue "Any image"."""

from __future__ import annotations

from berth.errors import RegistryError
from berth.names import ImageReference
from berth.oci.spec import Descriptor, Platform
from berth.oci.store import Ingest
from berth.progress import Progress


def pull(reference: ImageReference, ingest: Ingest, *, platform: Platform | None, progress: Progress) -> Descriptor:
    """Copy an image out of a registry, complete in `ingest`. Raises RegistryError: it is not built yet."""
    del ingest, platform, progress
    registry = reference.path.partition("/")[0]
    raise RegistryError(
        f"can't pull {reference.familiar} from registry {registry}: pulling from registries is not built yet",
        hint="berth image load FILE, or a reference like oci-archive:FILE, rootfs:DIR, bootstrap:debian/bookworm",
    )
