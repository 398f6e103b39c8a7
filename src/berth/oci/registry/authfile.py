"""Credentials as docker and podman keep them. Owns the reading and writing of their files, and of helpers; layer 2.

Sources: containers-auth.json(5) for podman's files and the keys in them; docker's reference of `docker login` for
config.json, credsStore, credHelpers and the protocol of credential helpers. Nothing secret gets into messages or logs.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from berth import proc
from berth.errors import BerthError, RegistryError, StateFormatError
from berth.files import make_private_directory, write_atomic
from berth.oci.registry.hosts import canonical

_DOCKER_KEY = "https://index.docker.io/v1/"  # what docker calls docker.io in its file
_HELPER = re.compile(r"[A-Za-z0-9._-]+")
_HELPER_S = 60.0  # it may ask the person to unlock something
_TOKEN_USER = "<token>"  # noqa: S105 (a helper says so that the secret is an identity token)

_Members = dict[str, object]


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """A user name with its password, or an identity token that is changed for access tokens."""

    username: str
    password: str = dataclasses.field(repr=False)
    identity_token: str = dataclasses.field(default="", repr=False)


def find_credentials(registry: str, repository: str = "") -> Credentials | None:
    """Look up what to show to `registry`; podman's files may have an entry for a part of its repositories.

    Raises StateFormatError for a damaged file, RegistryError when a credential helper fails.
    """
    for path in _files():
        found = _AuthFile.load(path).find(registry, repository)
        if found is not None:
            return found
    return None


def save_credentials(registry: str, credentials: Credentials) -> str:
    """Keep credentials in the file that docker or podman use, or in its credential helper; return where they are."""
    return _AuthFile.load(_file_to_write()).put(registry, credentials)


def remove_credentials(registry: str) -> list[str]:
    """Forget the credentials for `registry` wherever they are; return the places that had some."""
    return [place for path in _files() for place in _AuthFile.load(path).remove(registry)]


def _files() -> list[Path]:
    """Return the files to look into, the one that counts first. REGISTRY_AUTH_FILE is the only one where it is set."""
    named = os.environ.get("REGISTRY_AUTH_FILE")
    if named:
        return [Path(named)]
    if os.environ.get("DOCKER_CONFIG"):  # whoever sets it means it
        return [_docker_file(), *_podman_files()]
    return [*_podman_files(), _docker_file()]


def _file_to_write() -> Path:
    """Return podman's file where there is one, else docker's; what the environment names goes before."""
    first = _files()[0]
    if os.environ.get("REGISTRY_AUTH_FILE") or os.environ.get("DOCKER_CONFIG"):
        return first
    return next((path for path in _podman_files() if path.exists()), _docker_file())


def _docker_file() -> Path:
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else Path.home() / ".docker") / "config.json"


def _podman_files() -> list[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    first = Path(runtime) / "containers" if runtime else Path(f"/run/containers/{os.getuid()}")
    return [first / "auth.json", Path(config) / "containers/auth.json"]


class _AuthFile:
    """One file, with all its members: those that we do not know are kept as they are."""

    def __init__(self, path: Path, members: _Members) -> None:
        self._path = path
        self._members = members

    @classmethod
    def load(cls, path: Path) -> _AuthFile:
        try:
            document: object = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return cls(path, {})
        except OSError as error:
            raise StateFormatError(f"can't read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            # Not what the parser says: it may quote the file.
            raise StateFormatError(f"{path} is damaged: it is not JSON") from error
        if not isinstance(document, dict):
            raise StateFormatError(f"{path} is damaged: it is no JSON object")
        return cls(path, cast("_Members", document))

    def find(self, registry: str, repository: str) -> Credentials | None:
        helper = self._helper(registry)
        if helper:
            found = _ask_helper(helper, _key(registry))
            if found is not None:
                return found
        entries = {_normal(key): value for key, value in self._table("auths").items()}
        names = [registry, *(part for part in repository.split("/") if part)]
        for count in range(len(names), 0, -1):
            entry = entries.get("/".join(names[:count]))
            if isinstance(entry, dict):
                found = self._decode(cast("_Members", entry))
                if found is not None:
                    return found
        return None

    def put(self, registry: str, credentials: Credentials) -> str:
        helper = self._helper(registry)
        entry: _Members = {}
        if helper:
            secret = credentials.identity_token or credentials.password
            user = _TOKEN_USER if credentials.identity_token else credentials.username
            request = {"ServerURL": _key(registry), "Username": user, "Secret": secret}
            _run_helper(helper, "store", json.dumps(request))
        else:
            pair = f"{credentials.username}:{credentials.password}"
            entry["auth"] = base64.b64encode(pair.encode()).decode()
            if credentials.identity_token:
                entry["identitytoken"] = credentials.identity_token
        kept = {key: value for key, value in self._table("auths").items() if _normal(key) != registry}
        self._save({**self._members, "auths": {**kept, self._own_key(registry): entry}})
        return f"credential helper {helper}" if helper else str(self._path)

    def remove(self, registry: str) -> list[str]:
        places: list[str] = []
        helper = self._helper(registry)
        if helper and _ask_helper(helper, _key(registry)) is not None:
            _run_helper(helper, "erase", _key(registry))
            places.append(f"credential helper {helper}")
        auths = self._table("auths")
        kept = {key: value for key, value in auths.items() if _normal(key) != registry}
        if len(kept) < len(auths):
            self._save({**self._members, "auths": kept})
            places += [] if places else [str(self._path)]
        return places

    def _own_key(self, registry: str) -> str:
        # Podman reads both spellings, docker only its own.
        return _key(registry) if self._path.name == "config.json" else registry

    def _helper(self, registry: str) -> str:
        chosen = {_normal(key): value for key, value in self._table("credHelpers").items()}
        name = chosen.get(registry) or self._members.get("credsStore") or ""
        if not isinstance(name, str) or (name and not _HELPER.fullmatch(name)):
            raise StateFormatError(f"{self._path} is damaged: the name of a credential helper is none")
        return name

    def _table(self, name: str) -> _Members:
        table = self._members.get(name)
        return cast("_Members", table) if isinstance(table, dict) else {}

    def _decode(self, entry: _Members) -> Credentials | None:
        token = _text(entry.get("identitytoken"))
        user, password = _text(entry.get("username")), _text(entry.get("password"))
        if _text(entry.get("auth")):
            try:
                user, _, password = base64.b64decode(_text(entry.get("auth")), validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError) as error:
                raise StateFormatError(
                    f"{self._path} is damaged: an entry's 'auth' is not base64 of user:password"
                ) from error
        return Credentials(user, password.rstrip("\0"), token) if user or token else None

    def _save(self, members: Mapping[str, object]) -> None:
        path = Path(os.path.realpath(self._path))  # a link stays one
        try:
            if not path.parent.is_dir():
                make_private_directory(path.parent)
            write_atomic(path, json.dumps(members, indent="\t").encode() + b"\n", mode=0o600)
        except OSError as error:
            raise BerthError(f"can't write {path}: {error.strerror}") from error


def _ask_helper(helper: str, key: str) -> Credentials | None:
    answered = _run_helper(helper, "get", key)
    if answered is None:
        return None
    try:
        document: object = json.loads(answered)
    except ValueError as error:
        raise RegistryError(f"credential helper {helper} answered something that is not JSON") from error
    members = cast("_Members", document) if isinstance(document, dict) else {}
    user, secret = _text(members.get("Username")), _text(members.get("Secret"))
    if user == _TOKEN_USER:
        return Credentials("", "", secret)
    return Credentials(user, secret) if user else None


def _run_helper(helper: str, verb: str, text: str) -> str | None:
    """Run a credential helper; return what it says, None when it has no credentials for that.

    It is a program of the person's own and sees all of their environment.
    """
    argv = [f"docker-credential-{helper}", verb]
    try:
        done = proc.run(argv, input=text.encode(), env=dict(os.environ), timeout_s=_HELPER_S, success=range(-64, 256))
    except BerthError as error:
        raise RegistryError(f"credential helper {helper} failed: {error.message}") from error
    said = done.stdout.decode(errors="replace")
    if done.status == 0:
        return said
    # Source: docker-credential-helpers: errors go to stdout, and all helpers have these words for what they don't have.
    if "credentials not found" in said:
        return None
    why = " ".join((said + done.stderr.decode(errors="replace")).split())[:200] or f"status {done.status}"
    raise RegistryError(f"credential helper {helper} failed: {why}")


def _key(registry: str) -> str:
    return _DOCKER_KEY if registry == "docker.io" else registry


def _normal(key: str) -> str:
    """Return what a key of `auths` stands for: ``https://index.docker.io/v1/`` is docker.io."""
    name = key.removeprefix("https://").removeprefix("http://").rstrip("/")
    host, slash, rest = name.partition("/")
    return canonical(host) + (f"/{rest}" if slash and rest not in ("v1", "v2") else "")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
