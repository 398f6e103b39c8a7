"""`berth set` and `berth set-default`."""

from __future__ import annotations

import argparse
import textwrap

from berth.cli import common
from berth.cli.ending import say
from berth.cli.output import emit
from berth.cli.parser import ASSIGNMENT, MACHINE, Handler, Parser, width
from berth.config import KEYS
from berth.names import parse_machine_name


def _set(parser: Parser) -> Handler:
    rows = [
        row
        for key in KEYS
        for row in textwrap.wrap(
            f"{f'{key.name}={key.metavar}':26} {key.help}",
            width(),
            initial_indent="  ",
            subsequent_indent=" " * 29,
            break_on_hyphens=False,
        )
    ]
    parser.describe(
        """
        Changes how a machine is configured, prints its name, and says on stderr which changes take effect now and
        which when the machine is booted again. All assignments are made, or, when one is wrong, none.

        KEY=VALUE sets a value. The keys that hold a list (mount, expose, env) are added to by KEY=VALUE or
        KEY+=VALUE, which replaces an entry with the same destination or name; KEY-=VALUE takes an entry away and KEY=
        empties the list.
        """,
        examples=(
            ("berth set cpus=4 memory=8G", "of the default machine"),
            ("berth set -n dev mount+=~/data:/data:ro", "share another folder"),
            ("berth set -n dev mount-=/data env-=EDITOR", "take a folder and a variable away"),
            ("berth set -n dev expose+=.ssh", "let the machine see your SSH keys"),
        ),
        listing=["Keys:", *rows],
    )
    parser.argument("assignments", nargs="+", metavar="KEY=VALUE", kind=ASSIGNMENT, help="what to change; see below")
    parser.option("-n", "--name", metavar="NAME", kind=MACHINE, help="the machine; without it the default machine")
    parser.add_common()
    return _do_set


def _do_set(args: argparse.Namespace) -> int:
    name = common.resolve(args.name)
    changes = common.machines().set(name, args.assignments)
    for change in changes:
        say(f"{change.key} {'takes effect now' if change.when == 'now' else 'will take effect after a restart'}")
    if not changes:
        say("nothing changes: that is how it is already")
    emit(name)
    return 0


def _set_default(parser: Parser) -> Handler:
    parser.describe(
        """
        Makes a machine the default and prints its name. Commands mean the default machine when none is named, and
        'berth' alone opens a shell in it.
        """,
        examples=(("berth set-default dev", "from now on 'berth run' runs in dev"),),
    )
    parser.argument("name", metavar="NAME", kind=MACHINE, help="the machine")
    parser.add_common()
    return _do_set_default


def _do_set_default(args: argparse.Namespace) -> int:
    name = parse_machine_name(args.name)
    common.machines().set_default(name)
    emit(name)
    return 0


COMMANDS = {"set": _set, "set-default": _set_default}
