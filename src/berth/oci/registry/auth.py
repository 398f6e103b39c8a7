"""Authorization at a registry: what it challenges us with, and what we answer. Owns tokens; `client` uses it.

Sources: RFC 9110, section 11 (challenges), RFC 7617 (Basic); distribution, "Token Authentication Specification" and its
"OAuth2 Token Authentication" (identity tokens).
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from berth.errors import RegistryError
from berth.oci.registry.authfile import Credentials
from berth.oci.registry.sockets import ContactError, explain, place_of
from berth.oci.registry.transport import BROKEN, Request, Transport

_TOKEN_MAX = 1024 * 1024  # bytes of the token server's answer
_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_SCHEME = re.compile(r"\s*,?\s*([A-Za-z][A-Za-z0-9_-]*)(?=[\s,]|$)")

Scopes = tuple[str, ...]  # ``repository:library/debian:pull``


@dataclasses.dataclass(frozen=True, slots=True)
class Challenge:
    """One way to be authorized. scheme: in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(headers: Sequence[str]) -> list[Challenge]:
    """Read WWW-Authenticate headers; what can't be read ends the reading."""
    found: list[Challenge] = []
    for header in headers:
        place = 0
        while place < len(header):
            parameter = _PARAMETER.match(header, place)
            scheme = None if parameter else _SCHEME.match(header, place)
            if parameter and found:
                value = parameter[3] if parameter[2] is None else re.sub(r"\\(.)", r"\1", parameter[2])
                cast("dict[str, str]", found[-1].parameters)[parameter[1].lower()] = value
                place = parameter.end()
            elif scheme:
                found.append(Challenge(scheme[1].lower(), {}))
                place = scheme.end()
            else:
                break
    return found


class Authorizer:
    """The authorization at one endpoint. Threads share it, and each token is asked for once."""

    def __init__(self, name: str, transport: Transport, find: Callable[[], Credentials | None]) -> None:
        self._name = name
        self._transport = transport
        self._find = find
        self._lock = threading.Lock()
        self._headers: dict[Scopes, str] = {}
        self._basic = ""

    def header(self, scopes: Scopes) -> str:
        """Return what to send in Authorization, "" when nothing has been asked for yet."""
        with self._lock:
            return self._headers.get(scopes, self._basic)

    def answer(self, headers: Sequence[str], scopes: Scopes, *, used: str, plain: bool) -> None:
        """Make `header` satisfy the challenge. used: what was refused. plain: the endpoint itself is plain HTTP.

        Raises RegistryError when there is nothing more to show.
        """
        with self._lock:
            if self._headers.get(scopes, self._basic) != used:
                return  # another thread has been here
            challenges = {challenge.scheme: challenge for challenge in reversed(parse_challenges(headers))}
            if "bearer" in challenges:
                self._headers[scopes] = self._fetch_token(challenges["bearer"].parameters, scopes, plain=plain)
            elif "basic" in challenges and not used:
                self._basic = self._make_basic()
            else:
                raise self.denied("the user name or the password is wrong" if used else "")

    def denied(self, why: str = "") -> RegistryError:
        return RegistryError(
            f"registry {self._name} denies access{f': {why}' if why else ''}", hint=f"berth login {self._name}"
        )

    def _make_basic(self) -> str:
        credentials = self._find()
        if credentials is None or not credentials.username:
            raise self.denied("it wants a user name and a password")
        return basic(credentials)

    def _fetch_token(self, parameters: Mapping[str, str], scopes: Scopes, *, plain: bool) -> str:
        realm = parameters.get("realm", "")
        if place_of(realm).scheme != "https" and not plain:
            raise RegistryError(f"registry {self._name} wants its tokens to be fetched without TLS, from {realm[:200]}")
        request = self._token_request(realm, parameters.get("service", ""), scopes)
        try:
            with self._transport.send(request) as response:
                if response.status in (400, 401, 403):
                    raise self.denied("the user name or the password is wrong" if self._find() else "")
                if response.status != 200:
                    raise RegistryError(f"the token server of registry {self._name} answered {response.status}")
                return f"Bearer {_parse_token(response.document(_TOKEN_MAX), self._name)}"
        except ContactError as error:
            raise RegistryError(f"can't reach the token server of registry {self._name}: {error}") from error
        except BROKEN as error:
            raise RegistryError(f"the token server of registry {self._name} failed: {explain(error)}") from error

    def _token_request(self, realm: str, service: str, scopes: Scopes) -> Request:
        credentials = self._find()
        if credentials is not None and credentials.identity_token:
            form = {
                "grant_type": "refresh_token", "service": service, "scope": " ".join(scopes), "client_id": "berth",
                "refresh_token": credentials.identity_token,
            }  # fmt: skip
            data = urllib.parse.urlencode(form).encode()
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            return Request("POST", realm, headers, lambda: [data], len(data), document=True)
        query = [("service", service)] if service else []
        query += [("scope", scope) for scope in scopes]
        if credentials is not None:
            query.append(("account", credentials.username))
        url = f"{realm}{'&' if '?' in realm else '?'}{urllib.parse.urlencode(query)}"
        return Request("GET", url, {"Authorization": basic(credentials)} if credentials else {}, document=True)


def basic(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.password}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _parse_token(data: bytes, name: str) -> str:
    try:
        document: object = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    members = cast("dict[str, object]", document) if isinstance(document, dict) else {}
    token = members.get("token") or members.get("access_token")
    if not isinstance(token, str) or not (token.isascii() and token.isprintable() and " " not in token):
        raise RegistryError(f"the token server of registry {name} gave no token")
    return token
