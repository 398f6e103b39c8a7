"""Which paths of a home hold credentials, and what a machine that mounts it must therefore not see.

Owns the documented list (docs/security.md shows it; a test compares). Layer 2; the engines enforce it on the host's
side. A hidden folder is replaced by one of the machine's own, so that tools in the machine can still write there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

DIRECTORIES = (
    ".ssh", ".gnupg", ".pki", ".password-store", ".aws", ".azure", ".kube", ".oci", ".docker", ".terraform.d",
    ".minikube", ".vault-token.d", ".config/gcloud", ".config/gh", ".config/glab-cli", ".config/op", ".config/doctl",
    ".config/hub", ".config/containers", ".config/rclone", ".config/sops", ".config/age", ".config/helm",
    ".local/share/keyrings", ".local/share/kwalletd", ".mozilla", ".thunderbird", ".config/google-chrome",
    ".config/chromium", ".config/BraveSoftware", ".config/microsoft-edge", ".config/vivaldi", ".config/opera",
    ".config/Signal", ".config/1Password", ".config/Bitwarden", ".config/keepassxc", ".var/app", "snap/firefox",
    "snap/chromium",
)  # fmt: skip
FILES = (
    ".netrc", ".git-credentials", ".config/git/credentials", ".npmrc", ".yarnrc.yml", ".pypirc", ".pgpass", ".my.cnf",
    ".vault-token", ".boto", ".s3cfg", ".rclone.conf", ".cargo/credentials", ".cargo/credentials.toml",
    ".gem/credentials", ".m2/settings.xml", ".gradle/gradle.properties", ".composer/auth.json", ".databrickscfg",
    ".config/rclone/rclone.conf", ".Xauthority", ".ICEauthority",
    ".claude/.credentials.json", ".codex/auth.json",
)  # fmt: skip


class View(NamedTuple):
    """A folder of the host that a machine mounts: real path on the host, path in the machine."""

    source: str
    destination: str


class Hidden(NamedTuple):
    """One path that is covered in the machine. path: in the machine; relative: below the home (its stable name)."""

    path: str
    relative: str
    directory: bool


def plan_hidden(home: str, views: Sequence[View], expose: Iterable[str], own: Sequence[str] = ()) -> list[Hidden]:
    """Say which paths in the machine must be covered; reads the host's file system, changes nothing.

    Symbolic links are followed to where the secret really lies. A path that the user asked to `expose` (relative to
    the home or absolute), or mounted itself, is left open; so is what lies outside every view.
    own: berth's own directories, absolute. They are never open: a machine could become another one by them.
    """
    exposed = {os.path.normpath(os.path.join(home, path)) for path in expose}
    found: dict[str, Hidden] = {}
    wanted = [(path.strip("/"), path, True) for path in own]
    wanted += [
        (relative, path, directory)
        for relative, directory in _listed()
        if (path := os.path.join(home, relative)) not in exposed
    ]
    for relative, path, directory in wanted:
        if not _is_kind(path, directory=directory):
            continue
        real = os.path.realpath(path)
        for view in views:
            below = _below(view.source, real)
            if below and not _covered(os.path.join(view.destination, below), found):
                place = os.path.join(view.destination, below)
                found[place] = Hidden(place, relative, directory)
    return sorted(found.values())


def _listed() -> list[tuple[str, bool]]:
    # Folders first: a file inside a hidden folder needs no cover of its own.
    return [(path, True) for path in DIRECTORIES] + [(path, False) for path in FILES]


def _is_kind(path: str, *, directory: bool) -> bool:
    return os.path.isdir(path) if directory else os.path.isfile(path)


def _below(parent: str, path: str) -> str:
    """Return `path` relative to `parent` when it is strictly inside, else ""."""
    prefix = parent.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else ""


def _covered(place: str, found: Iterable[str]) -> bool:
    return any(place == other or place.startswith(other + "/") for other in found)
