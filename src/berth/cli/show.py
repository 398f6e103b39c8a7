"""`berth ls`, `inspect`, `logs` and `wait`: what only looks."""

from __future__ import annotations

import argparse

from berth.cli import common
from berth.cli.output import emit, emit_json, emit_table, size_cell, time_cell, write
from berth.cli.parser import Handler, Parser, add_format
from berth.cli.state import seconds
from berth.errors import InvalidArgumentError
from berth.machineinfo import MachineInfo

_WAIT_S = 60.0


def _ls(parser: Parser) -> Handler:
    parser.describe(
        """
        Lists the machines. One that can't be read or is damaged is listed too, with the state broken; 'berth inspect'
        says what is wrong with it.
        """,
        examples=(
            ("berth ls", "a table"),
            ("berth ls --format json", "all that 'inspect' knows, of every machine"),
            ("berth stop $(berth ls -q)", "the names alone, for a script"),
        ),
        more="""
        STATE is stopped, starting, running, stopping or broken. IP is what this host reaches the machine by. A - for
        CPUS, MEMORY or DISK means no limit of the machine's own. The default machine has a * at its end.
        """,
    )
    add_format(parser)
    parser.add_common()
    return _do_ls


def _do_ls(args: argparse.Namespace) -> int:
    infos = sorted(common.machines().list(), key=lambda info: info.name)
    if args.format == "json":
        emit_json([info.name for info in infos] if args.quiet else [info.to_json() for info in infos])
    elif args.quiet:
        for info in infos:
            emit(info.name)
    else:
        headings = ("NAME", "CREATED", "IP", "CPUS", "MEMORY", "DISK", "STATE", "ISOLATION", "DEFAULT")
        emit_table(headings, [_row(info) for info in infos], coloured="STATE")
    return 0


def _row(info: MachineInfo) -> tuple[str, ...]:
    return (
        info.name, time_cell(info.created), info.address or "", str(info.cpus or ""), size_cell(info.memory),
        size_cell(info.disk), info.status, info.isolation or "", "*" if info.default else " ",
    )  # fmt: skip


def _inspect(parser: Parser) -> Handler:
    parser.describe(
        """
        Prints one machine as a JSON object: what it was made from, how it is configured, its state and address, where
        its files are, and what is wrong with it if something is.
        """,
        examples=(
            ("berth inspect dev", "all of it"),
            ("berth inspect dev | jq -r .ipAddress", "its address"),
        ),
        more="""
        Keys: id, name, image (reference, digest), status, default, isolation, platform, ipAddress, ports, cpus,
        memory, disk, homeMount, mounts, expose, env, kernel, virtualization, autostart, sshAgent, user, createdDate,
        startedDate, paths (bundle, runtime, console), pids (init, vmm, keeper), problems, limits. Sizes are bytes,
        times are RFC 3339 in UTC, and what is not known or not set is null.
        """,
    )
    common.add_name(parser)
    parser.option("--format", choices=("json",), default="json", metavar="json", help="JSON, the only one")
    parser.add_common()
    return _do_inspect


def _do_inspect(args: argparse.Namespace) -> int:
    emit_json(common.machines().inspect(common.resolve(args.name)).to_json())
    return 0


def _logs(parser: Parser) -> Handler:
    parser.describe(
        """
        Prints what the machine's init and services wrote: its journal where it has one, else its console. Works on a
        stopped machine too.
        """,
        examples=(
            ("berth logs dev -n 50", "the last 50 lines"),
            ("berth logs dev --boot", "what the console said while it booted"),
            ("berth logs dev -f", "go on printing as lines come, until Ctrl-C"),
        ),
    )
    common.add_name(parser)
    parser.option("--boot", action="store_true", help="the kernel's messages and the console")
    parser.option("-f", "--follow", action="store_true", help="go on as lines come")
    parser.option("-n", "--lines", type=_count, metavar="LINES", help="only the last LINES lines")
    parser.add_common()
    return _do_logs


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"invalid number of lines '{text}'")
    return int(text)


def _do_logs(args: argparse.Namespace) -> int:
    name = common.resolve(args.name)
    for chunk in common.machines().logs(name, boot=args.boot, follow=args.follow, lines=args.lines):
        write(chunk)
    return 0


def _wait(parser: Parser) -> Handler:
    parser.describe(
        """
        Waits until a machine answers (agent), or until its init has settled (init: all services were started, or have
        failed), and prints the state that was reached: running, or degraded when a service has failed.
        """,
        examples=(
            ("berth wait dev --for agent", "until commands can be run in it"),
            ("berth wait dev --for init --timeout 120", "until its services are up, at most two minutes"),
        ),
        more="Exit status: 0 when it was reached, 1 when the time was up or the machine is not running.",
    )
    common.add_name(parser)
    parser.option("--for", dest="target", required=True, metavar="agent|init", help="what to wait for",
                  choices=("agent", "init"))  # fmt: skip
    parser.option("-t", "--timeout", type=seconds, default=_WAIT_S, metavar="SECONDS", help="give up after (60)")
    parser.add_common()
    return _do_wait


def _do_wait(args: argparse.Namespace) -> int:
    name = common.resolve(args.name)
    target: str = args.target
    if target != "agent" and target != "init":
        raise InvalidArgumentError(f"invalid target '{target}'")
    emit(common.machines().wait(name, target=target, timeout_s=args.timeout))
    return 0


COMMANDS = {"ls": _ls, "inspect": _inspect, "logs": _logs, "wait": _wait}
