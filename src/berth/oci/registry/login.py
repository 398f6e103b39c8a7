"""Logging in to a registry and out again. Owns the check of credentials; `cli` calls it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from berth.oci.registry.authfile import Credentials, remove_credentials, save_credentials
from berth.oci.registry.client import Client
from berth.oci.registry.hosts import load_registries, parse_host
from berth.oci.registry.watchdog import Watchdog


def login(host: str, username: str, password: str, *, registries: Path) -> str:
    """Check a user name and password at a registry and keep them; return the place where they are kept.

    Raises RegistryError when it refuses them or can't be reached, InvalidArgumentError for no host.
    """
    name = parse_host(host)
    credentials = Credentials(username, password)
    watchdog = Watchdog()
    client = Client(load_registries(registries).origin(name), "", watchdog, lambda: credentials)
    with contextlib.ExitStack() as stack:
        stack.callback(watchdog.stop)
        stack.callback(client.close)
        with client.open("GET", client.url(""), scopes=(), what="the registry", document=True):
            pass
    return save_credentials(name, credentials)


def logout(host: str) -> list[str]:
    """Forget the credentials for a registry; return the places that had some. Raises InvalidArgumentError."""
    return remove_credentials(parse_host(host))
