"""An image by its reference into the store. Owns the choice of the transport, and of bootstrapping instead; layer 2."""

from __future__ import annotations

from pathlib import Path

from berth.errors import RegistryError, UnsupportedError
from berth.names import ImageReference
from berth.oci.bootstrap import check_host, fetch_bootstrap, is_bootstrappable, parse_recipe
from berth.oci.registry.pull import Arrivals, pull
from berth.oci.rootfs import fetch_rootfs
from berth.oci.sources import fetch_oci_layout, fetch_one
from berth.oci.spec import Descriptor, Platform
from berth.oci.store import Ingest
from berth.progress import Progress


def fetch(
    reference: ImageReference, ingest: Ingest, *, platform: Platform | None, progress: Progress, registries: Path,
    bootstrapped: bool = True, arrivals: Arrivals | None = None,
) -> Descriptor:  # fmt: skip
    """Bring the image, complete, into `ingest`; return its manifest. Paths are absolute. Raises what `ensure` does.

    registries: registries.toml. bootstrapped: a distribution may come from its package mirror instead of a registry.
    arrivals: told of the layers that a registry gives, as they come.
    """
    match reference.transport:
        case "docker":
            if not bootstrapped:
                progress.step(f"pulling {reference.familiar}")
                return pull(reference, ingest, platform=platform, progress=progress, registries=registries)
            return _fetch_named(reference, ingest, platform, progress, registries, arrivals)
        case "bootstrap":
            return fetch_bootstrap(parse_recipe(reference.path), ingest, platform=platform, progress=progress)
        case "rootfs":
            progress.step(f"importing {reference.path}")
            path = Path(reference.path)
            return fetch_rootfs(path, ingest, platform=platform, annotations={}, progress=progress.advance)
        case "oci":
            progress.step(f"copying {reference}")
            return fetch_oci_layout(reference.path, ingest, platform=platform).manifest
        case _:
            progress.step(f"copying {reference}")
            return fetch_one(Path(reference.path), ingest, platform=platform).manifest


def _fetch_named(
    reference: ImageReference, ingest: Ingest, platform: Platform | None, progress: Progress, registries: Path,
    arrivals: Arrivals | None,
) -> Descriptor:  # fmt: skip
    try:
        progress.step(f"pulling {reference.familiar}")
        return pull(
            reference, ingest, platform=platform, progress=progress, registries=registries, arrivals=arrivals
        )  # fmt: skip
    except RegistryError as error:
        name = is_bootstrappable(str(reference))
        if name is None:
            raise
        recipe = parse_recipe(name)
        try:
            check_host(recipe, platform)
        except UnsupportedError as why:
            raise RegistryError(f"{error.message}; nor can it be bootstrapped: {why.message}", hint=why.hint) from why
        progress.note(f"{error.message}; bootstrapping {name} from the package mirror instead")
    return fetch_bootstrap(recipe, ingest, platform=platform, progress=progress)
