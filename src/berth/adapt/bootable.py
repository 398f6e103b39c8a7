"""Whether an image can be a machine as it is, and the image that can be one instead. `lifecycle.create` calls it.

An adapted image is an image of its own in the store: the base's layers and one more, named after the recipe and the
base's digest, so that who needs it again finds it by its name alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Literal

from berth import bundle as bundles
from berth import host, trees
from berth.adapt.facts import INIT, Facts, inspect
from berth.errors import BerthError, NotFoundError, UnsupportedError
from berth.layout import Layout
from berth.names import parse_reference
from berth.progress import Progress

if TYPE_CHECKING:
    from berth.adapt.recipes import Recipe
    from berth.engine.unpacking import Ahead
    from berth.images import Images, StoredImage

AdaptMode = Literal["auto", "never"]

# Annotations of an adapted image's manifest. The base's digest stands in that of the image-spec.
RECIPE = "dev.berth.adapted.recipe"
_NAMESPACE = "localhost/adapted"


@dataclasses.dataclass(frozen=True, slots=True)
class Bootable:
    """An image that makes a machine. init: the argv to start; empty: berth's agent is the init."""

    image: StoredImage
    init: tuple[str, ...]


def make_bootable(
    layout: Layout,
    images: Images,
    image: StoredImage,
    *,
    mode: AdaptMode,
    in_use: Callable[[], Collection[str]],
    progress: Progress,
    ahead: Ahead | None = None,
) -> Bootable:
    """Return the image to make a machine from: itself when it has an init, else one that was given one, now or before.

    in_use: the digests of images that machines use. ahead: may have unpacked the image. Says what was done.
    Raises BerthError, which names the step that failed; then nothing is left of it.
    """
    name = image.reference or image.digest
    facts = inspect(
        layout, image.digest, lambda: images.opened_layers(image),
        lambda: None if ahead is None else ahead.tree(image.digest, name, progress),
    )  # fmt: skip
    if facts.has_init:
        return Bootable(image, (INIT,))
    if mode == "never":
        progress.note(f"{name} has no init and is not adapted: berth's agent is the machine's init")
        return Bootable(image, ())
    from berth.adapt.recipes import find_recipe, load_recipes

    recipe = find_recipe(load_recipes(layout), facts)
    if recipe is None:
        progress.note(f"{name} has no init and {_why_not(facts)}: berth's agent is the machine's init")
        return Bootable(image, ())
    cached = _find(images, image, recipe)
    if cached is None:
        _check_platform(image)
        cached = _adapt(layout, images, image, facts, recipe, in_use, progress, ahead)
    progress.note(f"{name} has no init: using {cached.reference}, which has one (recipe {recipe})")
    return Bootable(cached, (INIT,))


def adapted_name(base_digest: str, recipe: Recipe) -> str:
    """Name the image that a recipe makes of a base: ``localhost/adapted/debian:0123456789abcdef-1``."""
    return f"{_NAMESPACE}/{recipe.name}:{base_digest.removeprefix('sha256:')[:16]}-{recipe.version}"


def _why_not(facts: Facts) -> str:
    if not facts.has_shell:
        return "no shell"
    if not facts.managers:
        return "no package manager that is known"
    return f"there is no recipe for {facts.name or facts.ids[0]}"


def _find(images: Images, base: StoredImage, recipe: Recipe) -> StoredImage | None:
    from berth.oci.derive import BASE_DIGEST

    with contextlib.suppress(NotFoundError):
        found = images.find(adapted_name(base.digest, recipe))
        if not found.problem and found.annotations.get(BASE_DIGEST) == base.digest:
            return found
    return None


def _check_platform(image: StoredImage) -> None:
    architecture = image.platform.split("/")[1]
    if architecture != host.architecture():
        raise UnsupportedError(
            f"{image.reference} has no init, and this host can't run its programs ({image.platform}) to install one",
            hint="berth create --adapt never makes berth's agent its init; or take an image that has one",
        )


def _adapt(
    layout: Layout,
    images: Images,
    image: StoredImage,
    facts: Facts,
    recipe: Recipe,
    in_use: Callable[[], Collection[str]],
    progress: Progress,
    ahead: Ahead | None,
) -> StoredImage:
    from berth.adapt.workshop import adapting

    with adapting(layout, progress):
        found = _find(images, image, recipe)  # made while we waited
        if found is not None:
            return found
        what = f": {', '.join(recipe.packages)}" if recipe.packages else ""
        progress.note(f"{image.reference or image.digest} has no init: installing one by recipe {recipe}{what}")
        try:
            _carry_out(layout, images, image, facts, recipe, progress, ahead)
        finally:
            _drop_template(layout, image.digest, in_use)
        return images.find(adapted_name(image.digest, recipe))


def _carry_out(
    layout: Layout, images: Images, image: StoredImage, facts: Facts, recipe: Recipe, progress: Progress,
    ahead: Ahead | None,
) -> None:  # fmt: skip
    from berth.adapt.recipes import plan_steps
    from berth.adapt.workshop import workshop
    from berth.oci.derive import BASE_NAME, derive
    from berth.oci.store import Store

    name = image.reference or image.digest
    store = Store(layout.images)
    try:
        with (
            workshop(layout, images, image, progress, ahead) as shop,
            store.ingest() as ingest,
            ingest.scratch() as layer,
        ):
            for step in plan_steps(recipe, facts):
                progress.step(f"adapting {name}: {step.say}")
                shop.run(step, recipe)
            progress.step(f"adapting {name}: storing the result")
            shop.finish(layer)
            base = next(entry for entry in store.entries() if entry.digest == image.digest)
            manifest = derive(
                store, ingest, dataclasses.replace(base, annotations={}, platform=None), layer,
                created_by=f"berth adapt, recipe {recipe}",
                annotations={BASE_NAME: name, RECIPE: str(recipe)},
            )  # fmt: skip
            ingest.commit(manifest, [str(parse_reference(adapted_name(image.digest, recipe)))])
    except UnsupportedError:
        raise
    except BerthError as error:
        raise BerthError(
            f"{name} has no init and could not be given one: {error.message}",
            hint=error.hint or "--adapt never makes a machine without services: its init is berth's agent",
        ) from error


def _drop_template(layout: Layout, digest: str, in_use: Callable[[], Collection[str]]) -> None:
    """Remove the unpacked base again unless a machine uses it: what machines are made from is the adapted image."""
    template = layout.template(digest)
    with bundles.machines_lock(layout):
        if digest in in_use() or not template.exists():
            return
        # By this name the engine sweeps it, should we be killed now.
        doomed = template.with_name(f"{template.name}.{os.urandom(4).hex()}.partial")
        template.rename(doomed)
    trees.delete(doomed)
