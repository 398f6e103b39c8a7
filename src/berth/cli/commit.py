"""`berth commit`."""

from __future__ import annotations

import argparse

from berth.cli import common, progress
from berth.cli.output import emit
from berth.cli.parser import IMAGE, MACHINE, Handler, Parser


def _configure(parser: Parser) -> Handler:
    parser.describe(
        """
        Makes an image of what a machine has become, and prints its name: the image that the machine was made from, and
        one layer with what has changed since. A machine that runs stands still while it is read; a VM's disk does
        while it is copied, and a VM of berth's own reads the copy.

        Your home and other mounted folders are not in it, nor what makes the machine this one and no other: its host
        name, its machine id, what berth keeps in it.
        """,
        examples=(
            ("berth commit dev local/dev:today", "an image of the machine dev"),
            ("berth create local/dev:today --name dev2", "another machine like it"),
        ),
    )
    parser.argument("machine", metavar="MACHINE", kind=MACHINE, help="the machine")
    parser.argument("reference", metavar="NAME", kind=IMAGE, help="what to call the image")
    parser.option("-m", "--message", default="", metavar="TEXT", help="a line for the image's history")
    parser.option("--live", action="store_true", help="do not let a running container stand still; files that "
                  "change meanwhile may be half old, half new")  # fmt: skip
    parser.add_common(progress=True)
    return _commit


def _commit(args: argparse.Namespace) -> int:
    from berth.cli.image import familiar_name
    from berth.commit import commit

    with progress.display(args.progress) as shown:
        image = commit(
            common.machines(), args.machine, args.reference, message=args.message, live=args.live, progress=shown
        )  # fmt: skip
    emit(familiar_name(image))
    return 0


COMMANDS = {"commit": _configure}
