"""`berth start`, `stop`, `restart` and `rm`: what changes whether a machine runs, or is."""

from __future__ import annotations

import argparse

from berth.cli import common, progress
from berth.cli.parser import Handler, Parser
from berth.errors import InvalidArgumentError, InvalidStateError
from berth.names import MachineName

_STOP_S = 10.0


def _start(parser: Parser) -> Handler:
    parser.describe(
        """
        Boots machines that are stopped, and prints their names. A machine that runs already stays as it is; one whose
        parts on the host were lost is repaired. It returns when the machine answers, which is before its services are
        all up: 'berth wait --for init' waits for that.
        """,
        examples=(("berth start dev", "boot dev"), ("berth start --all", "boot all machines")),
    )
    common.add_names(parser, help="the machines; without any the default machine", all_help="all machines")
    parser.add_common(progress=True)
    return _do_start


def _do_start(args: argparse.Namespace) -> int:
    machines = common.machines()
    names = common.chosen(args, lambda: [info.name for info in machines.list()])

    def deed(name: MachineName) -> None:
        with progress.display(args.progress) as shown:
            machines.start(name, progress=shown)

    return common.for_each(names, deed)


def _stop(parser: Parser) -> Handler:
    parser.describe(
        """
        Shuts machines down and prints their names. The machine's init is asked to power off, so services end in order
        and files are whole; what has not ended when the time is up is ended. A machine that is stopped already is no
        error.
        """,
        examples=(
            ("berth stop", "shut the default machine down"),
            ("berth stop dev --timeout 60", "give its services a minute"),
            ("berth stop --all --force", "end all machines now, as if the power had failed"),
        ),
    )
    common.add_names(parser, help="the machines; without any the default machine", all_help="all that run")
    parser.option("-f", "--force", action="store_true", help="don't ask the init: end the machine at once")
    _add_timeout(parser)
    parser.add_common()
    return _do_stop


def _add_timeout(parser: Parser) -> None:
    parser.option("-t", "--timeout", "--time", type=seconds, default=_STOP_S, metavar="SECONDS",
                  help="how long the init may take before it is forced (10)")  # fmt: skip


def seconds(text: str) -> float:
    """Read a number of seconds, 0 or more; for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"invalid number of seconds '{text}'")
    return value


def _do_stop(args: argparse.Namespace) -> int:
    machines = common.machines()
    names = common.chosen(args, lambda: [info.name for info in machines.list() if info.status != "stopped"])
    return common.for_each(names, lambda name: machines.stop(name, force=args.force, timeout_s=args.timeout))


def _restart(parser: Parser) -> Handler:
    parser.describe(
        """
        Shuts machines down, boots them again and prints their names. Changes made with 'berth set' take effect by it.
        A machine that was stopped is booted.
        """,
        examples=(("berth set -n dev memory=8G && berth restart dev", "let a change take effect"),),
    )
    common.add_names(parser, help="the machines; without any the default machine", all_help="all that run")
    parser.option("-f", "--force", action="store_true", help="don't ask the init: end the machine at once")
    _add_timeout(parser)
    parser.add_common(progress=True)
    return _do_restart


def _do_restart(args: argparse.Namespace) -> int:
    machines = common.machines()
    names = common.chosen(args, lambda: [info.name for info in machines.list() if info.status != "stopped"])

    def deed(name: MachineName) -> None:
        with progress.display(args.progress) as shown:
            machines.restart(name, force=args.force, timeout_s=args.timeout, progress=shown)

    return common.for_each(names, deed)


def _rm(parser: Parser) -> Handler:
    parser.describe(
        """
        Deletes machines with all that is on their disks, and prints their names. Your home and the folders shared
        with a machine are yours, and stay. A machine that runs is stopped first if you say so: with --force, or when
        asked on a terminal. A broken machine can be deleted too.
        """,
        examples=(("berth rm old", "delete a stopped machine"), ("berth rm --force dev test", "delete two that run")),
    )
    common.add_names(parser, help="the machines", all_help="all machines")
    parser.option("-f", "--force", action="store_true", help="stop those that run, without asking")
    parser.add_common()
    return _do_rm


def _do_rm(args: argparse.Namespace) -> int:
    if not args.names and not args.all:
        raise InvalidArgumentError("no machine named", hint="berth rm NAME …, or berth rm --all")
    machines = common.machines()
    names = common.chosen(args, lambda: [info.name for info in machines.list()])
    ask = args.all and names and not args.force and common.can_ask()
    if ask and not common.confirm(f"delete all {len(names)} machines: {', '.join(names)}?"):
        return 1
    return common.for_each(names, lambda name: _remove(name, force=args.force))


def _remove(name: MachineName, *, force: bool) -> None:
    machines = common.machines()
    try:
        machines.remove(name, force=force)
    except InvalidStateError:
        if force or not common.can_ask() or not common.confirm(f"machine '{name}' is running: stop and delete it?"):
            raise
        machines.remove(name, force=True)


COMMANDS = {"start": _start, "stop": _stop, "restart": _restart, "rm": _rm}
