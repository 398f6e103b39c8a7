"""Where connections lead and how they come to be: addresses, proxies, time-outs. Used by `registry` only; layer 2.

Sources: RFC 9110, section 9.3.6 (CONNECT); curl's and docker's meaning of the proxy variables.
"""

from __future__ import annotations

import base64
import dataclasses
import http.client
import socket
import threading
import time
import urllib.parse
import urllib.request
from typing import NamedTuple

from berth.errors import RegistryError
from berth.oci.registry.hosts import is_loopback

CONNECT_S = 5.0  # to resolve a name and connect to any of its addresses
_TUNNEL_HEAD_MAX = 16 * 1024


class Place(NamedTuple):
    """Whom a connection leads to."""

    scheme: str
    host: str
    port: int


class ContactError(Exception):
    """No connection came to be; the message says why, for people. not_tls: something answered, but not in TLS."""

    def __init__(self, message: str, *, not_tls: bool = False, hint: str | None = None) -> None:
        super().__init__(message)
        self.not_tls = not_tls
        self.hint = hint


@dataclasses.dataclass(frozen=True, slots=True)
class Proxy:
    host: str
    port: int
    authorization: str = dataclasses.field(default="", repr=False)


def place_of(url: str) -> Place:
    """Return whom a URL leads to. Raises RegistryError for one that is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urllib.parse.urlsplit("")
    is_plain_text = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or parts.username or not is_plain_text:
        raise RegistryError(f"invalid address '{shown(url)}'")
    return Place(parts.scheme, host, port or (443 if parts.scheme == "https" else 80))


def find_proxy(place: Place) -> Proxy | None:
    """Return the proxy that the environment names for a place; loopback needs none. Raises ContactError."""
    named = urllib.request.getproxies_environment()
    url = named.get(place.scheme) or named.get("all")
    if not url or is_loopback(place.host) or urllib.request.proxy_bypass(place.host):
        return None
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise ContactError(f"berth can't use a proxy of the kind '{parts.scheme}'", hint="an http:// proxy will do")
    pair = f"{urllib.parse.unquote(parts.username or '')}:{urllib.parse.unquote(parts.password or '')}"
    authorization = f"Basic {base64.b64encode(pair.encode()).decode()}" if parts.username else ""
    return Proxy(parts.hostname, parts.port or 80, authorization)


def open_socket(host: str, port: int) -> socket.socket:
    """Connect to any address of a host, within CONNECT_S all together. Raises ContactError."""
    deadline = time.monotonic() + CONNECT_S
    last: Exception = TimeoutError()
    addresses = _resolve(host, port)
    for number, (family, address) in enumerate(addresses):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # A share for each, so that one that never answers leaves time for the next; the last gets the rest.
            sock.settimeout(left if number == len(addresses) - 1 else max(left / 2, 0.5))
            sock.connect(address)
            sock.settimeout(CONNECT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            last = error
    raise ContactError(explain(last)) from last


def _resolve(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    """Look a name up. In a thread: getaddrinfo has no time-out, and waits for a silent name server."""
    found: list[tuple[int, tuple[str, int]]] = []
    failed: list[Exception] = []

    def look_up() -> None:
        try:
            for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                found.append((int(family), (str(address[0]), port)))
        except (OSError, UnicodeError) as error:
            failed.append(error)

    thread = threading.Thread(target=look_up, daemon=True, name="registry-resolve")
    thread.start()
    thread.join(CONNECT_S)
    if not found:
        raise ContactError("its name can't be resolved") from (failed[0] if failed else None)
    return list(found)


def tunnel(sock: socket.socket, place: Place, proxy: Proxy) -> None:
    """Have an HTTP proxy connect us through. Source: RFC 9110, section 9.3.6."""
    host = f"[{place.host}]" if ":" in place.host else place.host
    lines = [f"CONNECT {host}:{place.port} HTTP/1.1", f"Host: {host}:{place.port}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)  # no more than the head: what follows is TLS
        head += byte
        if not byte or len(head) > _TUNNEL_HEAD_MAX:
            raise ContactError(f"the proxy {proxy.host}:{proxy.port} ended the connection")
    words = head.split(b"\r\n", 1)[0].decode(errors="replace").split(None, 2)
    if len(words) < 2 or words[1] != "200":
        raise ContactError(f"the proxy {proxy.host}:{proxy.port} answered {' '.join(words[1:])[:100]}")


def explain(error: Exception) -> str:
    """Say in a few words what went wrong with a connection."""
    match error:
        case ConnectionRefusedError():
            return "connection refused"
        case TimeoutError():
            return str(error) if str(error) not in ("", "timed out") else "no answer in time"
        case http.client.IncompleteRead():
            return "it ended too soon"
        case http.client.RemoteDisconnected():
            return "it ended without an answer"
        case OSError():
            return (error.strerror or str(error) or type(error).__name__).lower()
        case _:
            return f"it does not speak HTTP ({type(error).__name__})"


def host_of(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2]


def shown(url: str) -> str:
    # Queries hold signatures and tokens.
    return url.partition("?")[0][:200]
