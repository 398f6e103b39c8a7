"""`berth image …`: the image store."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from berth.cli import common, progress
from berth.cli.ending import say
from berth.cli.output import emit, emit_json, emit_table, time_cell, write
from berth.cli.parser import FILE, IMAGE, Handler, Parser, add_format
from berth.config import parse_platform
from berth.errors import BerthError, InvalidArgumentError
from berth.names import parse_reference
from berth.units import format_size

if TYPE_CHECKING:
    from berth.images import Images, ListedImage, StoredImage

_SHORT = 19  # "sha256:" and 12 digits: enough to name an image by


def _images() -> Images:
    from berth.images import Images
    from berth.layout import Layout

    return Images(Layout.from_environment())


def familiar_name(image: StoredImage) -> str:
    """Return what people call an image: its short name, or its digest when it has none."""
    if not image.reference:
        return image.digest
    try:
        return parse_reference(image.reference).familiar
    except BerthError:
        return image.reference


def _add_platform(parser: Parser) -> None:
    parser.option("--platform", metavar="OS/ARCH", help="the image for this platform (linux/arm64)")


def _platform(args: argparse.Namespace) -> str | None:
    return None if args.platform is None else parse_platform(args.platform)


def _ls(parser: Parser) -> Handler:
    parser.describe(
        """
        Lists the images in the store. The store is a standard OCI image layout, so skopeo and buildah can read it.

        SIZE is what an image takes, UNIQUE what of it no other image has: what removing it wins. BOOTABLE says whether
        it has an init of its own; 'berth create' gives one to an image that has none. ADAPTED names the recipe by
        which an image was made out of such a one.
        """,
        examples=(("berth image ls", "a table"), ("berth image ls -q", "the references alone")),
        more="""
        In JSON each image has the keys reference (in full), repository, tag, digest, platform, size, uniqueSize and
        sharedSize (bytes), createdDate, bootable, adapted (recipe and base), annotations and problem.
        """,
    )
    add_format(parser)
    parser.add_common()
    return _do_ls


def _do_ls(args: argparse.Namespace) -> int:
    if args.quiet:
        images = sorted(_images().list(), key=_by_name)
        names = [image.reference or image.digest for image in images]
        if args.format == "json":
            emit_json(names)
        else:
            for image in images:
                emit(familiar_name(image))
        return 0
    listed = sorted(_images().list_detailed(), key=lambda item: _by_name(item.image))
    if args.format == "json":
        emit_json([item.to_json() for item in listed])
        return 0
    columns = _columns(listed)
    emit_table([heading for heading, _ in columns], [[cell(item) for _, cell in columns] for item in listed])
    return 0


def _by_name(image: StoredImage) -> tuple[bool, str]:
    return not image.reference, image.reference


def _columns(listed: Sequence[ListedImage]) -> Sequence[tuple[str, Callable[[ListedImage], str]]]:
    """Say what the table shows: a column that would be empty, or the same in every line, is left out."""
    from berth.oci.spec import host_platform

    foreign = any(item.image.platform not in ("", str(host_platform())) for item in listed)
    return [
        ("REPOSITORY", _repository),
        ("TAG", lambda item: item.tag),
        ("DIGEST", lambda item: item.image.digest[:_SHORT]),
        *([("PLATFORM", lambda item: item.image.platform)] if foreign else []),
        ("SIZE", lambda item: _size(item.image.size)),
        ("UNIQUE", lambda item: _size(item.unique)),
        ("CREATED", lambda item: time_cell(item.image.created)),
        ("BOOTABLE", lambda item: _BOOTABLE[item.bootable]),
        *([("ADAPTED", lambda item: item.recipe)] if any(item.recipe for item in listed) else []),
        *([("PROBLEM", lambda item: item.image.problem)] if any(item.image.problem for item in listed) else []),
    ]


_BOOTABLE = {True: "yes", False: "no", None: ""}


def _repository(item: ListedImage) -> str:
    name = familiar_name(item.image) if item.image.reference else ""
    return name.removesuffix(f":{item.tag}") if item.tag else name


def _size(size: int) -> str:
    return format_size(size) if size else ""


def _pull(parser: Parser) -> Handler:
    parser.describe(
        """
        Brings an image into the store as its registry has it now, and prints its reference. What the store has of it is
        not fetched again; when the registry can't be reached, what is stored stays. 'berth create' brings by itself
        what is not there.
        """,
        examples=(
            ("berth image pull debian:12", "from its registry, or bootstrapped where that can't be reached"),
            ("berth image pull localhost:5000/team/dev:latest", "from a registry of your own"),
            ("berth image pull oci-archive:./image.tar", "from a file"),
        ),
        more="""
        'berth create --help' says how references are written, 'berth login' logs in to registries. Mirrors, insecure
        registries and CAs stand in registries.toml in berth's configuration directory.
        """,
    )
    parser.argument("image", metavar="IMAGE", kind=IMAGE, help="what to bring")
    _add_platform(parser)
    parser.add_common(progress=True)
    return _do_pull


def _do_pull(args: argparse.Namespace) -> int:
    with progress.display(args.progress) as shown:
        image = _images().pull(args.image, platform=_platform(args), progress=shown)
    emit(familiar_name(image))
    return 0


def _push(parser: Parser) -> Handler:
    parser.describe(
        """
        Puts an image of the store into the registry that its reference names, or DESTINATION does, and prints that
        reference. Layers that the registry has already are not sent, and where it allows that, those of other
        repositories are used there.
        """,
        examples=(
            ("berth image push localhost:5000/team/dev:today", "under its own name"),
            ("berth image push debian:12 localhost:5000/base/debian:12", "under another one"),
        ),
    )
    parser.argument("image", metavar="IMAGE", kind=IMAGE, help="by reference, digest, or the start of its digest")
    parser.argument("destination", nargs="?", metavar="DESTINATION", kind=IMAGE, help="the name it gets there")
    parser.add_common(progress=True)
    return _do_push


def _do_push(args: argparse.Namespace) -> int:
    with progress.display(args.progress) as shown:
        pushed = _images().push(args.image, args.destination, progress=shown)
    emit(parse_reference(pushed).familiar)
    return 0


def _inspect(parser: Parser) -> Handler:
    parser.describe(
        "Prints an image as a JSON object: its references, digest, platform, size, manifest and configuration.",
        examples=(("berth image inspect debian:12 | jq .config.config.Env", "its environment"),),
    )
    parser.argument("image", metavar="IMAGE", kind=IMAGE, help="by reference, digest, or the start of its digest")
    parser.add_common()
    return _do_inspect


def _do_inspect(args: argparse.Namespace) -> int:
    emit_json(_images().inspect(args.image))
    return 0


def _tag(parser: Parser) -> Handler:
    parser.describe(
        "Gives an image another name, and prints that. Another image that had the name stays without it.",
        examples=(("berth image tag debian:12 base:latest", "the same image under a name of yours"),),
    )
    parser.argument("source", metavar="IMAGE", kind=IMAGE, help="by reference, digest, or the start of its digest")
    parser.argument("reference", metavar="NAME", kind=IMAGE, help="its new name")
    parser.add_common()
    return _do_tag


def _do_tag(args: argparse.Namespace) -> int:
    emit(familiar_name(_images().tag(args.source, args.reference)))
    return 0


def _rm(parser: Parser) -> Handler:
    parser.describe(
        """
        Removes names of images, and with its last name the image; a digest removes the image with all its names. What
        was removed is printed. An image that a machine was made from is kept, with an error, until the machine is
        deleted.
        """,
        examples=(("berth image rm debian:11", "what you do not use any more"),),
    )
    parser.argument("images", nargs="+", metavar="IMAGE", kind=IMAGE, help="by reference or digest")
    parser.add_common()
    return _do_rm


def _do_rm(args: argparse.Namespace) -> int:
    machines = common.machines()
    machines.sweep_unfinished()  # or a berth that was killed would use its image for good
    for removed in _images().remove(args.images, machines.images_in_use):
        emit(removed)
    return 0


def _prune(parser: Parser) -> Handler:
    parser.describe(
        """
        Removes the images that have no name any more and that no machine was made from, prints their digests, and
        says how much disk that won.
        """,
        examples=(("berth image prune --all", "also named images that no machine was made from"),),
    )
    parser.option("-a", "--all", action="store_true", help="also images with a name")
    parser.add_common()
    return _do_prune


def _do_prune(args: argparse.Namespace) -> int:
    machines = common.machines()
    machines.sweep_unfinished()
    removed, freed = _images().prune(machines.images_in_use, unused=args.all)
    for digest in removed:
        emit(digest)
    say(f"{format_size(freed)} freed")
    return 0


def _load(parser: Parser) -> Handler:
    parser.describe(
        """
        Reads all images of an archive into the store and prints their references: a docker-archive ('docker save') or
        an oci-archive, compressed or not.
        """,
        examples=(
            ("berth image load image.tar", "from a file"),
            ("docker save debian:12 | berth image load -", "from a pipe"),
        ),
    )
    parser.argument("file", metavar="FILE|-", kind=FILE, help="the archive; - for stdin")
    parser.add_common(progress=True)
    return _do_load


def _do_load(args: argparse.Namespace) -> int:
    if args.file == "-" and sys.stdin.isatty():
        raise InvalidArgumentError("stdin is a terminal, not an archive", hint="berth image load FILE")
    file = Path("/dev/stdin" if args.file == "-" else args.file)
    with progress.display(args.progress) as shown:
        loaded = _images().load(file, progress=shown)
    for reference in loaded:
        emit(reference)
    return 0


def _save(parser: Parser) -> Handler:
    parser.describe(
        "Writes images to an oci-archive, which 'berth image load', skopeo and podman read, and prints nothing.",
        examples=(
            ("berth image save debian:12 -o debian.tar", "to a file"),
            ("berth image save debian:12 -o - | ssh there berth image load -", "to another host"),
        ),
    )
    parser.argument("images", nargs="+", metavar="IMAGE", kind=IMAGE, help="by reference or digest")
    parser.option("-o", "--output", required=True, metavar="FILE|-", kind=FILE, help="the archive; - for stdout")
    parser.add_common(progress=True)
    return _do_save


def _do_save(args: argparse.Namespace) -> int:
    with progress.display(args.progress) as shown:
        if args.output != "-":
            _images().save(args.images, Path(args.output), progress=shown)
            return 0
        if os.isatty(1):
            raise InvalidArgumentError("stdout is a terminal: no archive goes there", hint="berth image save -o FILE")
        with _nameless_file() as file:  # stdout gets all of it, or nothing
            _images().save(args.images, file, progress=shown)
            file.seek(0)
            while data := file.read(1 << 20):
                write(data)
    return 0


def _nameless_file() -> IO[bytes]:
    """Open a file on a disk that has room for images; it is gone when it is closed, however we end."""
    import tempfile

    from berth.files import make_private_directory
    from berth.layout import Layout

    cache = Layout.from_environment().cache
    make_private_directory(cache)
    return tempfile.TemporaryFile(dir=cache)


def _import(parser: Parser) -> Handler:
    parser.describe(
        """
        Makes an image of a root file system, an archive or a directory, names it, and prints the name.
        """,
        examples=(
            ("berth image import alpine-minirootfs.tar.gz alpine:mine", "from an archive"),
            ("berth image import ./rootfs box:latest", "from a directory"),
        ),
    )
    parser.argument("source", metavar="ROOTFS", kind=FILE, help="a tar archive, compressed or not, or a directory")
    parser.argument("reference", metavar="NAME", kind=IMAGE, help="what to call the image")
    _add_platform(parser)
    parser.add_common(progress=True)
    return _do_import


def _do_import(args: argparse.Namespace) -> int:
    with progress.display(args.progress) as shown:
        image = _images().import_(Path(args.source), args.reference, platform=_platform(args), progress=shown)
    emit(familiar_name(image))
    return 0


COMMANDS = {
    "image ls": _ls,
    "image pull": _pull,
    "image push": _push,
    "image inspect": _inspect,
    "image tag": _tag,
    "image rm": _rm,
    "image prune": _prune,
    "image load": _load,
    "image save": _save,
    "image import": _import,
}
