"""`berth system …`: what is about this host, not about one machine."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from berth.cli import checklist, common, kernel, progress
from berth.cli.ending import say, show_error
from berth.cli.output import emit, emit_json, emit_table
from berth.cli.parser import Handler, Parser, add_format
from berth.units import format_size

if TYPE_CHECKING:
    from berth.autostart import Autostart


def _check(parser: Parser) -> Handler:
    parser.describe(
        """
        Looks at each thing that berth needs or can use on this host, and says what works, what is missing, and the
        one command that puts it right.
        """,
        examples=(
            ("berth system check", "what works, what is missing, and what to type"),
            ("berth system check --all", "each thing with its version, what works without it and its own fix"),
            ("berth doctor --format json | jq '.[] | select(.status != \"ok\")'", "for a script"),
        ),
        more="""
        Exit status: 0, or 1 when something is missing without which no machine runs. In JSON each check has the keys
        name, status (ok, warning, missing), version, detail, affects, fix, required and optional.
        """,
    )
    parser.option("--all", action="store_true", help="all there is to say about each thing, optional ones too")
    add_format(parser)
    parser.add_common()
    return _do_check


def _do_check(args: argparse.Namespace) -> int:
    from berth import check
    from berth.layout import Layout

    checks = check.run_checks(Layout.from_environment())
    if args.format == "json":
        emit_json([dataclasses.asdict(item) for item in checks])
    elif args.quiet:
        for item in checks:
            if item.status != "ok":
                emit(item.name)
    elif args.all:
        checklist.show_all(checks)
    else:
        checklist.show(checks)
    return 1 if any(item.required and item.status == "missing" for item in checks) else 0


def _df(parser: Parser) -> Handler:
    parser.describe(
        "Shows how much disk the images, the templates made from them and each machine's own files take.",
        examples=(("berth system df --format json", "bytes, for a script"),),
        more="In JSON each row has the keys what and bytes.",
    )
    add_format(parser)
    parser.add_common()
    return _do_df


def _do_df(args: argparse.Namespace) -> int:
    rows = common.machines().usage()
    if args.format == "json":
        emit_json([{"what": what, "bytes": size} for what, size in rows])
    elif args.quiet:
        for what, _ in rows:
            emit(what)
    else:
        total = sum(size for _, size in rows)
        emit_table(("WHAT", "SIZE"), [(what, format_size(size)) for what, size in [*rows, ("total", total)]])
    return 0


def _prune(parser: Parser) -> Handler:
    parser.describe(
        """
        Removes what nothing needs any more: images that no machine was made from and that have no name, templates
        without an image, and what commands that were killed left behind. Machines and named images stay.
        """,
        examples=(("berth system prune", "then 'berth system df' shows what it won"),),
    )
    parser.add_common(progress=True)
    return _do_prune


def _do_prune(args: argparse.Namespace) -> int:
    with progress.display(args.progress) as shown:
        common.machines().prune(shown)
    return 0


def _start(parser: Parser) -> Handler:
    parser.describe(
        """
        Starts the machines that are marked autostart, and prints their names. There is no daemon to start: a machine
        that is started stays up by itself.
        """,
        examples=(("berth set -n dev autostart=true && berth system start", "mark dev, and start what is marked"),),
    )
    parser.add_common(progress=True)
    return _do_start


def _do_start(args: argparse.Namespace) -> int:
    with progress.display(args.progress) as shown:
        started, failed = common.machines().start_autostart(shown)
    for name in started:
        emit(name)
    for error in failed:
        show_error(error)
    return 1 if failed else 0


def _stop(parser: Parser) -> Handler:
    parser.describe(
        """
        Shuts the machines down that are marked autostart, and prints their names. Other machines go on; 'berth stop
        --all' shuts down all that run.
        """,
        examples=(("berth system stop", "what 'berth system start' started"),),
    )
    parser.add_common()
    return _do_stop


def _do_stop(_args: argparse.Namespace) -> int:
    for name in common.machines().stop_autostart():
        emit(name)
    return 0


def _status(parser: Parser) -> Handler:
    parser.describe(
        """
        Shows the machines that are marked autostart with their states, and, on stderr, whether they come up by
        themselves ('berth system autostart').
        """,
        examples=(("berth system status", "a table"),),
    )
    add_format(parser)
    parser.add_common()
    return _do_status


def _do_status(args: argparse.Namespace) -> int:
    from berth import autostart

    infos = common.machines().autostart_status()
    if args.format == "json":
        emit_json([info.to_json() for info in infos])
    elif args.quiet:
        for info in infos:
            emit(info.name)
    else:
        emit_table(("NAME", "STATE"), [(info.name, info.status) for info in infos], coloured="STATE")
        say(f"autostart: {autostart.status().state}")
    return 0


def _autostart(parser: Parser) -> Handler:
    parser.describe(
        """
        Has systemd start the machines marked autostart when you log in (as root: when the host boots), or no longer.
        Without a word it shows how that stands.
        """,
        examples=(
            ("berth system autostart enable", "writes and enables berth.service"),
            ("berth set -n dev autostart=true", "marks a machine to be started by it"),
        ),
    )
    parser.argument("deed", nargs="?", choices=("enable", "disable", "status"), default="status",
                    metavar="enable|disable|status", help="what to do (status)")  # fmt: skip
    parser.add_common()
    return _do_autostart


def _do_autostart(args: argparse.Namespace) -> int:
    from berth import autostart
    from berth.layout import Layout

    state: Autostart
    if args.deed == "enable":
        state = autostart.enable(Layout.from_environment())
    elif args.deed == "disable":
        state = autostart.disable(Layout.from_environment())
    else:
        state = autostart.status()
    emit(f"{state.state} {state.unit}")
    for note in state.notes:
        say(f"hint: {note}")
    return 0


COMMANDS = {
    "system check": _check,
    "system df": _df,
    "system prune": _prune,
    "system start": _start,
    "system stop": _stop,
    "system status": _status,
    "system autostart": _autostart,
    "system kernel": kernel.configure,
}
