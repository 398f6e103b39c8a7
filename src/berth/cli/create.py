"""`berth create`."""

from __future__ import annotations

import argparse
import os

from berth.cli import common, progress
from berth.cli.output import emit
from berth.cli.parser import DIRECTORY, FILE, IMAGE, Handler, Parser
from berth.config import ISOLATIONS, KEYS, BootConfig, Key, parse_platform
from berth.errors import InvalidArgumentError
from berth.names import parse_machine_name, parse_reference

_KINDS = {"mount": DIRECTORY, "expose": FILE, "kernel": FILE}


def _configure(parser: Parser) -> Handler:
    parser.describe(
        """
        Makes a machine from an image, boots it and prints its name. An image that is not in the store is pulled
        first; if its registry can't be reached and it is a release of a distribution that can be bootstrapped
        (debian:12), it is made from the distribution's package mirror instead. An image without an init is given one
        by its distribution's package manager, once: the next machine of it is made from the result.

        The first machine becomes the default: the one that commands mean when none is named. A create that fails
        leaves nothing behind.
        """,
        examples=(
            ("berth create debian:12", "a Debian 12 machine, named debian-12"),
            ("berth create debian:12 --name dev --cpus 2 --memory 4G", "with limits"),
            ("berth create alpine:3.20 --home-mount none", "a machine that sees nothing of your home"),
            ("berth create debian:12 --mount ~/src:/src:ro", "with a folder of yours, read-only"),
            ("berth create rootfs:./rootfs.tar.gz --name box", "from the archive of a root file system"),
        ),
        more="""
        IMAGE is a name as docker writes it (debian:12, host:5000/name:tag, name@sha256:…), or one of oci:PATH[:TAG],
        oci-archive:FILE, docker-archive:FILE, rootfs:DIR-OR-TAR, bootstrap:debian/bookworm[?include=pkg,pkg].

        Sizes are written 512M, 8G, 1.5G or in plain bytes. What is set here can be changed later with 'berth set'.
        """,
    )
    parser.argument("image", metavar="IMAGE", kind=IMAGE, help="what to make it from")
    parser.option("-n", "--name", metavar="NAME", help="its name: 1 to 63 lower-case letters, digits and '-'; "
                  "without it one is made from the image's name")  # fmt: skip
    parser.option("--set-default", action="store_true", help="make it the default machine")
    parser.option("--no-boot", action="store_true", help="only make it")
    parser.option("--isolation", choices=("auto", *ISOLATIONS), metavar="auto|vm|container",
                  help="a kernel of its own (vm) or this host's (container); auto is vm where the hardware can, "
                  "else container; default: $BERTH_ISOLATION, else auto")  # fmt: skip
    for key in KEYS:
        if key.flag:
            _add_key(parser, key, key.flag)
    parser.option("--platform", metavar="OS/ARCH", help="take the image for this platform (linux/arm64)")
    parser.option("--adapt", choices=("auto", "never"), default="auto", metavar="auto|never",
                  help="give an image without an init one (auto), or make berth's agent its init (never)")  # fmt: skip
    parser.add_common(progress=True)
    return _create


def _add_key(parser: Parser, key: Key, flag: str) -> None:
    flags = ("-e", flag) if key.name == "env" else (flag,)
    words = key.help.removesuffix("; empty: all").removesuffix("; empty: berth's choice")
    if key.boolean:
        parser.option(*flags, dest=key.field, action="store_true", help=words)
    elif "+=" in key.operators:
        parser.option(*flags, dest=key.field, action="append", default=[], metavar=key.metavar,
                      kind=_KINDS.get(key.name), help=f"{words}; may be given again")  # fmt: skip
    else:
        parser.option(*flags, dest=key.field, metavar=key.metavar, kind=_KINDS.get(key.name), help=words)


def boot_config(args: argparse.Namespace) -> BootConfig:
    """Build the boot configuration from the flags, by the table that `set` uses."""
    boot = BootConfig()
    for key in KEYS:
        given: object = getattr(args, key.field, None)
        if key.boolean:
            boot = key.apply(boot, "=", "true") if given else boot
        elif isinstance(given, list):
            for value in given:  # pyright: ignore[reportUnknownVariableType]  (argparse: a list of str)
                boot = key.apply(boot, "+=", str(value))  # pyright: ignore[reportUnknownArgumentType]
        elif given is not None:
            if not given:
                raise InvalidArgumentError(f"option {key.flag} needs a value", hint="berth create --help")
            boot = key.apply(boot, "=", str(given))
    return boot


def _create(args: argparse.Namespace) -> int:
    name: str | None = args.name
    if name is not None:
        parse_machine_name(name)
    parse_reference(args.image)
    platform = parse_platform(args.platform) if args.platform is not None else None
    boot = boot_config(args)
    isolation = args.isolation or os.environ.get("BERTH_ISOLATION") or "auto"
    with progress.display(args.progress) as shown:
        made = common.machines().create(
            args.image, name=name, boot_config=boot, isolation=isolation, platform=platform,
            boot=not args.no_boot, set_default=args.set_default, adapt=args.adapt, progress=shown,
        )  # fmt: skip
    emit(made)
    return 0


COMMANDS = {"create": _configure}
