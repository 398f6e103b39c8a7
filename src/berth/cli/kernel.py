"""`berth system kernel …`: the kernels that VMs boot."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from berth.cli import progress
from berth.cli.ending import say
from berth.cli.output import emit, emit_json, emit_table
from berth.cli.parser import Handler, Parser, add_format
from berth.config import parse_platform
from berth.errors import InvalidArgumentError
from berth.units import format_size

if TYPE_CHECKING:
    from berth.kernels.model import Kernel
    from berth.kernels.store import Kernels

_NEWEST = "newest"


def configure(parser: Parser) -> Handler:
    parser.describe(
        """
        Shows and changes the kernels that machines with isolation vm boot. berth fetches one by itself when the first
        such machine is made: the distribution's kernel for VMs, from the package source of this host, verified by
        apt. Nothing is installed, and no root is needed.

        'ls' (the default) lists them. 'fetch' brings the newest into the store, if it is not there already, and prints
        its version. 'use VERSION' makes machines boot that version from their next start on, 'use newest' always the
        newest. 'rm VERSION' removes one; machines that run on it go on.
        """,
        examples=(
            ("berth system kernel", "which there are; USED has a * for those that machines boot"),
            ("berth system kernel fetch", "after a security update of the distribution's kernel"),
            ("berth system kernel use 6.1.0-56-cloud-amd64", "stay with this one"),
            ("berth system kernel fetch --platform linux/arm64", "for machines of the other architecture"),
        ),
        more="""
        A kernel of your own belongs to a machine: 'berth set kernel=PATH', or --kernel of 'berth create'. It is a
        bzImage, a vmlinux or, for arm64, an Image, with everything built in that a VM needs (docs/kernels.md).

        In JSON each kernel has the keys version, platform, size (bytes on disk), source, used, path and problem; the
        problem of a whole one is null. A damaged kernel is mended by 'fetch'.
        """,
    )
    parser.argument("deed", nargs="?", choices=("ls", "list", "fetch", "use", "rm"), default="ls",
                    metavar="ls|fetch|use|rm", help="what to do (ls)")  # fmt: skip
    parser.argument("version", nargs="?", metavar="VERSION", help="of use and rm: as ls shows it")
    parser.option("--platform", metavar="OS/ARCH", help="kernels for this platform (this host's); ls shows all")
    add_format(parser)
    parser.add_common(progress=True)
    return _do


def _do(args: argparse.Namespace) -> int:
    from berth import host
    from berth.kernels.store import Kernels
    from berth.layout import Layout

    kernels = Kernels(Layout.from_environment())
    given = None if args.platform is None else parse_platform(args.platform).partition("/")[2]
    arch = given or host.architecture()
    if args.deed in ("use", "rm"):
        if args.version is None:
            raise InvalidArgumentError(
                f"'berth system kernel {args.deed}' needs a version", hint="berth system kernel ls"
            )
        return _do_use(kernels, args.version, arch) if args.deed == "use" else _do_rm(kernels, args.version, arch)
    if args.version is not None:
        raise InvalidArgumentError(
            f"'berth system kernel {args.deed}' takes no version", hint="berth system kernel --help"
        )
    return _do_fetch(kernels, arch, args.progress) if args.deed == "fetch" else _do_ls(kernels, given, args)


def _do_ls(kernels: Kernels, given: str | None, args: argparse.Namespace) -> int:
    found = [kernel for kernel in kernels.list() if given in (None, kernel.arch)]
    problems = kernels.problems()
    if args.format == "json":
        rows = [_to_json(kernels, kernel) for kernel in found]
        rows += [
            {"version": problem.version, "platform": f"linux/{problem.arch}", "size": None, "source": None,
             "used": False, "path": str(problem.path), "problem": problem.error.message}
            for problem in problems
        ]  # fmt: skip
        emit_json([row["version"] for row in rows] if args.quiet else rows)
    elif args.quiet:
        for kernel in found:
            emit(kernel.version)
    else:
        cells = [
            (kernel.version, f"linux/{kernel.arch}", format_size(kernels.size(kernel)), kernel.source,
             "*" if _is_used(kernels, kernel) else "")
            for kernel in found
        ]  # fmt: skip
        emit_table(("VERSION", "PLATFORM", "SIZE", "SOURCE", "USED"), cells)
        for problem in problems:
            say(f"berth: kernel '{problem.version}': {problem.error.message}")
            say(f"hint: berth system kernel fetch --platform linux/{problem.arch}")
    return 0


def _to_json(kernels: Kernels, kernel: Kernel) -> dict[str, object]:
    return {
        "version": kernel.version, "platform": f"linux/{kernel.arch}", "size": kernels.size(kernel),
        "source": kernel.source, "used": _is_used(kernels, kernel), "path": str(kernel.image.parent), "problem": None,
    }  # fmt: skip


def _is_used(kernels: Kernels, kernel: Kernel) -> bool:
    return kernels.find(kernel.arch) == kernel


def _do_fetch(kernels: Kernels, arch: str, mode: str) -> int:
    with progress.display(mode) as shown:
        kernel = kernels.fetch(arch, shown)
    emit(kernel.version)
    chosen = kernels.chosen(arch)
    if chosen and chosen != kernel.version:
        say(f"hint: machines boot {chosen}; to change that: berth system kernel use {_NEWEST}")
    return 0


def _do_use(kernels: Kernels, version: str, arch: str) -> int:
    kernels.use(None if version == _NEWEST else version, arch)
    used = kernels.find(arch)
    emit(used.version if used else _NEWEST)
    return 0


def _do_rm(kernels: Kernels, version: str, arch: str) -> int:
    kernels.remove(version, arch)
    emit(version)
    return 0
