"""`berth login` and `berth logout`."""

from __future__ import annotations

import argparse
import sys

from berth.cli import common
from berth.cli.ending import say
from berth.cli.parser import Handler, Parser
from berth.errors import InvalidArgumentError
from berth.layout import Layout

_DEFAULT = "docker.io"
_PASSWORD_MAX = 64 * 1024  # tokens can be long


def _login(parser: Parser) -> Handler:
    parser.describe(
        """
        Checks a user name and password at a registry and keeps them for 'berth create', 'berth image pull' and
        'berth image push'. They are kept where docker or podman keep theirs, so what is logged in to there is logged in
        to here: in podman's auth.json where there is one, else in ~/.docker/config.json, or in the credential helper
        that the file names. $REGISTRY_AUTH_FILE and $DOCKER_CONFIG name another place.

        Without a credential helper the file holds the password as it is, for you alone to read.
        """,
        examples=(
            ("berth login registry.example.com:5000", "asks for the user name and the password"),
            ("berth login --username me --password-stdin docker.io", "for scripts"),
        ),
    )
    parser.argument("host", nargs="?", metavar="HOST", default=_DEFAULT, help=f"the registry; default: {_DEFAULT}")
    parser.option("-u", "--username", metavar="NAME", help="the user name; it is asked for otherwise")
    parser.option("--password-stdin", action="store_true", help="read the password, or a token, from stdin")
    parser.add_common()
    return _do_login


def _do_login(args: argparse.Namespace) -> int:
    from berth.oci.registry.hosts import parse_host
    from berth.oci.registry.login import login

    host = parse_host(args.host)
    username: str = args.username or _ask_username(host, piped=args.password_stdin)
    place = login(host, username, _password(args, host), registries=Layout.from_environment().registries)
    say(f"logged in to {host} as {username}; kept in {place}")
    return 0


def _ask_username(host: str, *, piped: bool) -> str:
    if piped or not common.can_ask():
        raise InvalidArgumentError("no user name was given", hint=f"berth login --username NAME {host}")
    sys.stderr.write(f"User name at {host}: ")
    sys.stderr.flush()
    username = sys.stdin.readline().strip()
    if not username:
        raise InvalidArgumentError("no user name was given")
    return username


def _password(args: argparse.Namespace, host: str) -> str:
    if args.password_stdin:
        password = sys.stdin.read(_PASSWORD_MAX).removesuffix("\n").removesuffix("\r")
    elif common.can_ask():
        import getpass

        password = getpass.getpass(f"Password at {host}: ", stream=sys.stderr)
    else:
        raise InvalidArgumentError("stdin is no terminal to ask for the password on", hint="give --password-stdin")
    if not password:
        raise InvalidArgumentError("no password was given", hint="berth login --password-stdin HOST < FILE")
    return password


def _logout(parser: Parser) -> Handler:
    parser.describe(
        """
        Forgets the user name and password for a registry, wherever docker or podman or berth kept them.
        """,
        examples=(("berth logout registry.example.com:5000", "what berth login kept"),),
    )
    parser.argument("host", nargs="?", metavar="HOST", default=_DEFAULT, help=f"the registry; default: {_DEFAULT}")
    parser.add_common()
    return _do_logout


def _do_logout(args: argparse.Namespace) -> int:
    from berth.oci.registry.login import logout

    places = logout(args.host)
    say(f"forgotten in {', '.join(places)}" if places else f"there was no login to {args.host}")
    return 0


COMMANDS = {"login": _login, "logout": _logout}
