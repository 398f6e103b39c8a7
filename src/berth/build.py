"""Dockerfile builds: from images of the store, by buildah, into the store. Layer 5; `cli` and the API call `build`.

berth brings the images that the file is built on, as it does for `create`, and hands them over as OCI layouts of hard
links; buildah builds without a registry in the room that `buildroom` makes; what came out is put into the store, its
layers shared with the images it was built on.

    DATA/build/lock            flock: shared while one builds, exclusive to clean up what the dead left
    DATA/build/storage         buildah's own storage: the cache of layers. Its owners are those of the namespace
    DATA/build/work-ID         one build at work; it stays, empty, when the build failed, and asks for a clean-up

docs/building.md tells what a person can rely on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from berth import dockerfile, locks, trees, userns
from berth.buildroom import ROOM, STORAGE, WORK, RoomBase, RoomMount, RoomPlan, write_settings
from berth.dockerfile import Base
from berth.errors import BerthError, BusyError, InvalidArgumentError, NotFoundError
from berth.files import make_private_directory
from berth.images import Images, StoredImage, storable
from berth.layout import Layout
from berth.names import parse_reference
from berth.oci import spec
from berth.oci.built import fetch_built, with_history
from berth.oci.digest import Digest, digest_of, hex_of
from berth.oci.spec import Descriptor, Platform
from berth.oci.store import LAYOUT_VERSION
from berth.proc import require_program
from berth.progress import Progress
from berth.userns import Extent, IdMap

_LOCK_S = 600.0
_NAMES = ("Containerfile", "Dockerfile")
_IGNORE = (".containerignore", ".dockerignore")

Shown = Callable[[], AbstractContextManager[Progress]]


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is to be built. tags: names for the image; none is fine. file: None for the context's own.

    arguments: ``K=V``, or ``K`` to take ours; secrets: ``id=ID[,src=PATH|,env=NAME]``; ssh: ``default`` or
    ``ID[=SOCKET-OR-KEY]``, as docker writes them. text: of a Dockerfile that is no file. pull: ask registries what the
    names of images to build on mean now, also of those that are stored.
    """

    context: Path
    tags: tuple[str, ...] = ()
    file: Path | None = None
    text: str | None = None
    arguments: tuple[str, ...] = ()
    target: str = ""
    secrets: tuple[str, ...] = ()
    ssh: tuple[str, ...] = ()
    platform: str = ""
    use_cache: bool = True
    pull: bool = False
    quiet: bool = False


class _Handed(NamedTuple):
    """Something of the host's that the build sees: what is mounted, the option that names it, the environment."""

    mounts: list[RoomMount]
    options: list[str]
    environment: dict[str, str]


def build(request: Request, images: Images, layout: Layout, *, shown: Shown, output: int) -> StoredImage:
    """Build, and return the image, stored under the request's tags.

    shown: makes the progress to report to, before and after buildah runs. output: the descriptor that takes what
    buildah and the file's commands say, as it comes. Interrupted, it ends all that it started.
    Raises UnsupportedError without buildah, InvalidArgumentError, NotFoundError, what `Images.pull` raises, and
    BerthError for a build that failed.
    """
    require_program("buildah", package="buildah")
    tags = [storable(tag) for tag in request.tags]
    text, ignore = _read_file(request)
    arguments = _arguments(request.arguments)
    handed = _hand_over(request)  # what is wrong with the options is told before anything is pulled
    wanted = spec.parse_platform(request.platform) if request.platform else spec.host_platform()
    bases = dockerfile.find_bases(text, {**_preset(wanted), **arguments})
    with shown() as progress:
        found = [(base, _bring(base, request, images, progress)) for base in bases]
    with _workplace(layout) as (work, clean):
        write_settings(work)
        (work / "Containerfile").write_text(text)
        if ignore is not None:
            (work / "ignore").write_bytes(ignore)
        (work / "bases").mkdir()
        linked = [_link(images, base, image, work) for base, image in found]
        digests = {room["name"]: image.digest for room, (_, image) in zip(linked, found, strict=True) if room["name"]}
        plan = RoomPlan(
            idmap=[[list(extent) for extent in extents] for extents in _idmap()] if os.geteuid() == 0 else None,
            mounts=[
                _mount(layout.build / "storage", STORAGE, mapped=False), _mount(work, WORK),
                _mount(request.context, f"{ROOM}/context", read_only=True), *handed.mounts,
            ],
            bases=linked,
            options=[
                *_options(request, arguments, ignored=ignore is not None), *handed.options,
                *_contexts(found, linked), f"{ROOM}/context",
            ],
            environment=handed.environment,
            clean=clean,
        )  # fmt: skip
        _run(plan, output)
        with shown() as progress:
            progress.step("storing the image")
            known = dict(pair for _, image in found for pair in _layers(images, image))
            return images.add(
                lambda ingest: fetch_built(work / "out", ingest, known=known, bases=digests),
                tags, progress=progress.advance,
            )  # fmt: skip


def forget(layout: Layout) -> None:
    """Remove the cache of layers, unless a build is at work: the next build starts from nothing."""
    with contextlib.suppress(BusyError, FileNotFoundError), locks.hold(layout.build / "lock", timeout_s=0):
        for path in layout.build.iterdir():
            if path.is_dir():
                trees.delete(path)


# What is asked for


def _read_file(request: Request) -> tuple[str, bytes | None]:
    """Return the Dockerfile's text, and the ignore file that goes with it by name, if there is one."""
    if not request.context.is_dir():
        raise NotFoundError(f"build context {request.context} not found", hint="give a directory")
    if request.text is not None:
        return request.text, None
    path = _find_file(request)
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise InvalidArgumentError(f"invalid Dockerfile {path}: it is a directory") from None
    for ending in _IGNORE:
        beside = path.with_name(f"{path.name}{ending}")
        if beside.is_file():
            return data.decode(errors="replace"), beside.read_bytes()
    return data.decode(errors="replace"), None


def _find_file(request: Request) -> Path:
    if request.file is not None:
        # As docker takes it, and then as podman does.
        for path in (request.file, request.context / request.file):
            if path.exists():
                return path
        raise NotFoundError(f"Dockerfile {request.file} not found")
    for name in _NAMES:
        if (request.context / name).exists():
            return request.context / name
    raise NotFoundError(f"{request.context} has no Containerfile and no Dockerfile", hint="berth build -f FILE")


def _arguments(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name:
            raise InvalidArgumentError(
                f"invalid build argument '{word}'", hint="write it as NAME=VALUE, or NAME to take yours"
            )
        if equals or name in os.environ:
            found[name] = value if equals else os.environ[name]
    return found


def _preset(target: Platform) -> dict[str, str]:
    """The arguments that every build has. Source: Dockerfile reference, "Automatic platform ARGs"."""
    preset: dict[str, str] = {}
    for kind, platform in (("TARGET", target), ("BUILD", spec.host_platform())):
        preset |= {
            f"{kind}PLATFORM": str(platform), f"{kind}OS": platform.os, f"{kind}ARCH": platform.architecture,
            f"{kind}VARIANT": platform.variant,
        }  # fmt: skip
    return preset


def _options(request: Request, arguments: Mapping[str, str], *, ignored: bool) -> list[str]:
    options = ["--isolation", "chroot", "--network", "host", "--layers", "--pull-never", "--format", "oci"]
    options += ["--file", f"{WORK}/Containerfile"]
    options += ["--ignorefile", f"{WORK}/ignore"] if ignored else []
    for name, value in arguments.items():
        options += ["--build-arg", f"{name}={value}"]
    options += ["--target", request.target] if request.target else []
    options += ["--platform", request.platform] if request.platform else []
    options += [] if request.use_cache else ["--no-cache"]
    options += ["--quiet"] if request.quiet else []
    return options


def _hand_over(request: Request) -> _Handed:
    handed = _Handed([], [], {})
    for number, word in enumerate(request.secrets):
        _hand_secret(word, number, handed)
    for number, word in enumerate(request.ssh):
        name, _, path = word.partition("=")
        path = path or os.environ.get("SSH_AUTH_SOCK", "")
        if not path:
            raise InvalidArgumentError(f"no SSH agent is running for --ssh {word}", hint="--ssh default=KEY-OR-SOCKET")
        handed.mounts.append(_mount(_existing(path, "SSH agent or key"), f"{ROOM}/ssh/{number}"))
        handed.options.extend(("--ssh", f"{name}={ROOM}/ssh/{number}"))
    return handed


def _hand_secret(word: str, number: int, handed: _Handed) -> None:
    """Hand a secret over, a file by a mount, a variable by the environment: never on a command line."""
    given = {key: value for key, _, value in (part.partition("=") for part in word.split(","))}
    name, path, variable = given.get("id", ""), given.get("src") or given.get("source"), given.get("env")
    if not name or set(given) - {"id", "src", "source", "env", "type"}:
        raise InvalidArgumentError(
            f"invalid secret '{word}'", hint="write it as id=NAME,src=FILE or id=NAME,env=VARIABLE"
        )
    if path is None and variable is None and name not in os.environ:
        path = name  # as docker: a variable of that name, else a file
    if path is not None:
        target = f"{ROOM}/secrets/{number}"
        handed.mounts.append(_mount(_existing(path, "secret"), target, read_only=True))
        handed.options.extend(("--secret", f"id={name},src={target}"))
        return
    value = os.environ.get(variable or name)
    if value is None:
        raise InvalidArgumentError(f"the variable {variable} of secret '{name}' is not set")
    handed.environment[f"BERTH_SECRET_{number}"] = value
    handed.options.extend(("--secret", f"id={name},env=BERTH_SECRET_{number}"))


def _existing(path: str, what: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists() or found.is_dir():
        raise NotFoundError(f"{what} {found} not found")
    return found


def _mount(source: Path, target: str, *, read_only: bool = False, mapped: bool = True) -> RoomMount:
    return RoomMount(source=os.path.realpath(source), target=target, read_only=read_only, mapped=mapped)


# The images it is built on


def _bring(base: Base, request: Request, images: Images, progress: Progress) -> StoredImage:
    reference = parse_reference(base.reference)
    # A Dockerfile is not trusted: only we may name files of ours.
    if reference.transport not in ("docker", "bootstrap"):
        raise InvalidArgumentError(
            f"a Dockerfile can't be built on '{base.reference}'",
            hint=f"berth image import or load it, and use its name; or berth image pull {base.reference}",
        )
    if reference.digest is not None:
        # Whatever it is called in the store, it is the same.
        with contextlib.suppress(NotFoundError):
            return images.find(reference.digest)
    bring = images.pull if request.pull else images.ensure
    return bring(base.reference, platform=base.platform or request.platform or None, progress=progress)


def _link(images: Images, base: Base, image: StoredImage, work: Path) -> RoomBase:
    """Make an OCI layout of an image, for buildah: hard links, and a config with a history (buildah insists on it)."""
    manifest = images.manifest(image)
    place = work / "bases" / hex_of(Digest(image.digest))
    blobs = place / "blobs" / "sha256"
    config = spec.encode_json(with_history(images.config_document(image), len(manifest.layers)))
    described = Descriptor(spec.CONFIG, digest_of(config), len(config))
    document = spec.encode_json(dataclasses.replace(manifest, config=described).to_json())
    if not place.exists():
        blobs.mkdir(parents=True)
        images.link_blobs(manifest.layers, blobs)
        for data in (config, document):
            (blobs / hex_of(digest_of(data))).write_bytes(data)
        listed = Descriptor(spec.MANIFEST, digest_of(document), len(document)).to_json()
        (place / "index.json").write_bytes(spec.encode_json({"schemaVersion": 2, "manifests": [listed]}))
        (place / "oci-layout").write_bytes(spec.encode_json({"imageLayoutVersion": LAYOUT_VERSION}))
    return RoomBase(id=described.digest, layout=f"{WORK}/bases/{place.name}", name=_tag(base))


def _tag(base: Base) -> str:
    """Return the name that buildah finds the image by, "" for one that is no name: see `_contexts`."""
    reference = parse_reference(base.reference)
    return str(reference) if reference.transport == "docker" and reference.digest is None else ""


def _contexts(found: Sequence[tuple[Base, StoredImage]], linked: Sequence[RoomBase]) -> list[str]:
    """Say by which option buildah finds the images that can't be tagged: those named by digest."""
    options: list[str] = []
    for (base, _), room in zip(found, linked, strict=True):
        if not room["name"]:
            options += ["--build-context", f"{base.reference}=container-image://{hex_of(Digest(room['id']))}"]
    return options


def _layers(images: Images, image: StoredImage) -> list[tuple[Digest, Descriptor]]:
    return list(zip(image.config.diff_ids, images.manifest(image).layers, strict=True))


# Running it


@contextlib.contextmanager
def _workplace(layout: Layout) -> Generator[tuple[Path, bool]]:
    """Give a build its directory, and say whether buildah has to clean up first. A failed build leaves it empty."""
    make_private_directory(layout.data)
    make_private_directory(layout.build)
    storage = layout.build / "storage"
    clean = _sweep(layout.build)
    with locks.hold(layout.build / "lock", shared=True, timeout_s=_LOCK_S, what="the build cache"):
        storage.mkdir(exist_ok=True, mode=0o711)
        if os.geteuid() == 0:
            os.chown(storage, _idmap().host_root(), _idmap().host_root())
        work = layout.build / f"work-{os.getpid()}-{os.urandom(4).hex()}"
        work.mkdir(mode=0o700)
        try:
            yield work, clean
        except BaseException:
            with contextlib.suppress(OSError, BerthError):
                _empty(work)
            raise
        trees.delete(work)


def _sweep(place: Path) -> bool:
    """Remove what builds left that failed or were killed; False when there was nothing, or others are at work."""
    with contextlib.suppress(BusyError), locks.hold(place / "lock", timeout_s=0):
        left = list(place.glob("work-*"))
        for path in left:
            trees.delete(path)
        return bool(left)
    return False


def _empty(work: Path) -> None:
    trees.delete(work)
    work.mkdir(mode=0o700)


def _idmap() -> IdMap:
    """Say which ids a build has: for root shifted ones, as a machine's; a user's root is the user, as rootless buildah.

    A user's context, in a home that nobody else may enter, can then be read.
    """
    uid, gid = os.getuid(), os.getgid()
    kept = userns.plan_idmap(uid, gid)
    return kept if uid == 0 else IdMap(_rootless(kept.uids, uid), _rootless(kept.gids, gid))


def _rootless(kept: Sequence[Extent], own: int) -> tuple[Extent, ...]:
    others = [extent for extent in kept if extent.inside != own]
    return (Extent(0, own, 1), Extent(1, others[0].outside, sum(extent.size for extent in others)))


def _run(plan: RoomPlan, output: int) -> None:
    idmap = None if plan["idmap"] is not None else _idmap()
    answer = userns.call(
        "berth.buildroom:build", {"plan": plan, "output": output}, idmap=idmap, pass_fds=[output]
    )  # fmt: skip
    match answer:
        case {"status": 0}:
            return
        case {"status": int(status)}:
            raise BerthError(f"the build failed: buildah ended with status {status}")
        case _:
            raise BerthError(f"unexpected answer from the build: {answer!r:.200}")
