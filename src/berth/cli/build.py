"""`berth build`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Generator
from pathlib import Path

from berth.cli import progress
from berth.cli.output import emit
from berth.cli.parser import DIRECTORY, FILE, IMAGE, Handler, Parser
from berth.config import parse_platform
from berth.errors import InvalidArgumentError
from berth.progress import Progress


def _configure(parser: Parser) -> Handler:
    parser.describe(
        """
        Builds an image from a Dockerfile (or Containerfile) into the store, and prints its name, or its digest when
        it is given none. The image is built on images of the store; those that are not there are brought first, as
        'berth create' does it.

        buildah does the work, in a user namespace of its own. What it says goes to stderr as it comes. Steps that
        have not changed since the last build are taken from a cache.
        """,
        examples=(
            ("berth build -t local/dev .", "from the Dockerfile in this directory"),
            ("berth build -t local/dev && berth create local/dev", "and a machine made from it"),
            ("berth build -t app --target test --build-arg V=2 -f ci/Dockerfile .", "one stage, with an argument"),
            ("berth build --secret id=token,src=token.txt .", "RUN --mount=type=secret,id=token can read the file"),
        ),
        more="""
        CONTEXT is the directory that COPY takes files from; a .dockerignore in it says which not. Without -f, its
        Containerfile or Dockerfile is built; -f - reads one from stdin.
        """,
    )
    parser.argument("context", nargs="?", default=".", metavar="CONTEXT", kind=DIRECTORY,
                    help="a directory; default: this one")  # fmt: skip
    parser.option("-t", "--tag", dest="tags", action="append", default=[], metavar="NAME", kind=IMAGE,
                  help="what to call the image; may be given again")  # fmt: skip
    parser.option("-f", "--file", metavar="FILE|-", kind=FILE, help="the Dockerfile; - for stdin")
    parser.option("--build-arg", dest="arguments", action="append", default=[], metavar="NAME[=VALUE]",
                  help="a value for an ARG of the file; without VALUE yours; may be given again")  # fmt: skip
    parser.option("--target", default="", metavar="STAGE", help="build up to this stage")
    parser.option("--no-cache", action="store_true", help="run every step again")
    parser.option("--pull", action="store_true", help="ask registries for newer images to build on")
    parser.option("--secret", dest="secrets", action="append", default=[], metavar="id=NAME,src=FILE",
                  help="show a file, or with env=VARIABLE a variable, to the steps that ask for it; "
                  "may be given again")  # fmt: skip
    parser.option("--ssh", action="append", default=[], metavar="default|NAME=PATH",
                  help="show your SSH agent, or a key or socket, to the steps that ask for it; "
                  "may be given again")  # fmt: skip
    parser.option("--platform", metavar="OS/ARCH", help="build on images for this platform (linux/arm64)")
    parser.add_common(progress=True)
    return _build


def _build(args: argparse.Namespace) -> int:
    from berth.build import Request, build
    from berth.cli.image import familiar_name
    from berth.images import Images
    from berth.layout import Layout

    quiet = args.progress == "none"
    request = Request(
        context=Path(args.context), tags=tuple(args.tags), arguments=tuple(args.arguments), target=args.target,
        file=None if args.file in (None, "-") else Path(args.file), text=_stdin() if args.file == "-" else None,
        secrets=tuple(args.secrets), ssh=tuple(args.ssh), use_cache=not args.no_cache, quiet=quiet, pull=args.pull,
        platform="" if args.platform is None else parse_platform(args.platform),
    )  # fmt: skip
    layout = Layout.from_environment()
    with _output() as output:
        image = build(
            request, Images(layout), layout, shown=lambda: _shown(args.progress), output=output
        )  # fmt: skip
    emit(familiar_name(image))
    return 0


def _shown(mode: str) -> contextlib.AbstractContextManager[Progress]:
    return progress.display(mode)


@contextlib.contextmanager
def _output() -> Generator[int]:
    """Give a descriptor for what the build says: a copy of stderr, with a number that no other program takes."""
    copy = os.dup(2)
    try:
        yield copy
    finally:
        os.close(copy)


def _stdin() -> str:
    if sys.stdin.isatty():
        raise InvalidArgumentError("stdin is a terminal, not a Dockerfile", hint="berth build -f FILE")
    return sys.stdin.read()


COMMANDS = {"build": _configure}
