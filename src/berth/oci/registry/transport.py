"""Connections to registries: proxies, TLS, deadlines, retries. Owns every socket of a pull, push or login; layer 2.

The stdlib's `http.client` speaks HTTP. What it has no notion of is here: connections are opened within seconds whatever
the name server and the many addresses of a host do; a watchdog ends exchanges that are slower than a floor, wherever
they hang; everything can be ended at once. docs/registries.md tells why no other library.

Sources: RFC 9110, 9112; PEP 476.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import http.client
import math
import random
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path

from berth.errors import RegistryError
from berth.log import log
from berth.oci.registry.sockets import (
    CONNECT_S,
    ContactError,
    Place,
    Proxy,
    explain,
    find_proxy,
    host_of,
    open_socket,
    place_of,
    shown,
    tunnel,
)  # fmt: skip
from berth.oci.registry.watchdog import Guard, StoppedError, Watchdog
from berth.version import VERSION

SILENCE_S = 30.0  # a response begins within that, and then brings _FLOOR bytes in each such time
DOCUMENT_S = 60.0  # a whole document
_FLOOR = 32 * 1024
_CHUNK = 256 * 1024
_ATTEMPTS = 5
_BACK_OFF_S = 0.5  # doubled with each attempt
_WAIT_MAX_S = 60.0  # who asks for more (Retry-After) is told to the person instead
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_HEADERS = {"User-Agent": f"berth/{VERSION}", "Accept-Encoding": "identity"}
_IDLE_MAX = 8  # connections kept
_DRAINED_MAX = 64 * 1024  # bytes read to no end, to keep a connection

# What a socket, TLS or http.client raise when the other side fails; ValueError: of a header that is none.
BROKEN = (OSError, http.client.HTTPException, ValueError)


@dataclasses.dataclass(slots=True)
class Request:
    """One request. body: gives the bytes anew for each attempt; length goes into Content-Length.

    document: the answer is one, and has DOCUMENT_S for all of it. once: what has arrived of it must not arrive again.
    """

    method: str
    url: str
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    body: Callable[[], Iterable[bytes]] | None = None
    length: int = 0
    document: bool = False
    once: bool = False


class Transport:
    """The connections of one piece of work with one endpoint, and with whom it redirects to. Threads may share it."""

    def __init__(self, watchdog: Watchdog, *, insecure: bool = False, authorities: tuple[Path, ...] = ()) -> None:
        self._watchdog = watchdog
        self._insecure = insecure
        self._authorities = authorities
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._idle: dict[Place, list[_Connection]] = {}
        self._reached: set[Place] = set()

    def close(self) -> None:
        with self._lock:
            for connection in [item for idle in self._idle.values() for item in idle]:
                connection.close()
            self._idle.clear()

    def contact(self, place: Place) -> None:
        """Open a connection and keep it for the next request. Raises ContactError."""
        self._give_back(place, self._open(place))

    @contextlib.contextmanager
    def send(self, request: Request) -> Generator[Response]:
        """Send a request, again and again where that may help; the response ends with the block.

        Raises ContactError when the place was never reached, else RegistryError; what is sent once, one of BROKEN.
        """
        response = self._send(request)
        try:
            yield response
        finally:
            response.close()

    def _send(self, request: Request) -> Response:
        for attempt in range(1, _ATTEMPTS + 1):
            last = attempt == _ATTEMPTS or request.once
            try:
                response = self._exchange(request)
            except BROKEN as error:
                if request.once:
                    raise
                if last:
                    raise RegistryError(f"the connection to {host_of(request.url)} broke: {explain(error)}") from error
                log.debug("registry: %s %s: %s", request.method, shown(request.url), explain(error))
                self.wait(attempt)
                continue
            if response.status not in _TRANSIENT or last:
                return response
            asked = _retry_after(response.headers.get("Retry-After"))
            if asked is not None and asked > _WAIT_MAX_S:
                return response
            response.close()
            self.wait(attempt, asked)
        raise AssertionError("the last attempt returns or raises")

    def wait(self, attempt: int, asked: float | None = None) -> None:
        """Back off before the attempt after this one; `asked` is what the other side wants, in seconds."""
        seconds = _BACK_OFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0) if asked is None else asked  # noqa: S311
        if self._watchdog.stopped.wait(seconds):
            raise StoppedError

    def _exchange(self, request: Request) -> Response:
        """Send a request once; a connection that was kept and has ended meanwhile does not count."""
        place = place_of(request.url)
        while True:
            connection = self._take(place)
            kept = connection is not None
            if connection is None:
                try:
                    connection = self._open(place)
                except ContactError as error:
                    if place not in self._reached:
                        raise
                    raise OSError(str(error)) from error
            self._reached.add(place)
            try:
                return self._talk(place, connection, request)
            except BaseException as error:
                connection.close()
                if not kept or request.once or not isinstance(error, ConnectionError):
                    raise

    def _talk(self, place: Place, connection: _Connection, request: Request) -> Response:
        guard = Guard(self._watchdog, connection.sock)
        guard.give(DOCUMENT_S if request.document else SILENCE_S)
        headers = {**_HEADERS, **request.headers, **connection.proxy_headers()}
        body = None
        if request.body is not None:
            headers["Content-Length"] = str(request.length)
            body = _guarded(guard, request.body())
        try:
            # Who does not want the body answers and hangs up: the answer is there to be read.
            with contextlib.suppress(BrokenPipeError):
                connection.request(request.method, connection.target(request.url), body=body, headers=headers)
            answer = connection.getresponse()
        except BaseException as error:
            guard.release()
            if isinstance(error, BROKEN):
                raise guard.reason(error) from error
            raise
        return Response(answer, request, guard, lambda: self._give_back(place, connection), connection.close)

    def _take(self, place: Place) -> _Connection | None:
        with self._lock:
            idle = self._idle.get(place)
            return idle.pop() if idle else None

    def _give_back(self, place: Place, connection: _Connection) -> None:
        with self._lock:
            idle = self._idle.setdefault(place, [])
            if len(idle) < _IDLE_MAX and not self._watchdog.stopped.is_set():
                idle.append(connection)
                return
        connection.close()

    def _open(self, place: Place) -> _Connection:
        if self._watchdog.stopped.is_set():
            raise StoppedError
        proxy = find_proxy(place)
        near = Place("http", proxy.host, proxy.port) if proxy else place
        sock = open_socket(near.host, near.port)
        try:
            self._watchdog.guard(sock, CONNECT_S)
            if proxy and place.scheme == "https":
                tunnel(sock, place, proxy)
            self._watchdog.release(sock)
            if place.scheme == "https":
                sock = self._encrypt(sock, place)
        except BROKEN as error:
            self._watchdog.release(sock)
            sock.close()
            raise ContactError(explain(error)) from error
        except BaseException:
            self._watchdog.release(sock)
            sock.close()
            raise
        sock.settimeout(SILENCE_S)
        return _Connection(place, sock, proxy)

    def _encrypt(self, sock: socket.socket, place: Place) -> socket.socket:
        secured = self._secure().wrap_socket(sock, server_hostname=place.host, do_handshake_on_connect=False)
        try:
            self._watchdog.guard(secured, CONNECT_S)
            secured.do_handshake()
        except ssl.SSLCertVerificationError as error:
            secured.close()
            raise ContactError(
                f"its certificate is not trusted: {error.verify_message}",
                hint=f'name its CA in registries.toml: [registry."{place.host}:{place.port}"] ca = "FILE"',
            ) from error
        except ssl.SSLError as error:
            secured.close()
            raise ContactError("it does not speak TLS", not_tls=True) from error
        except BaseException:
            secured.close()
            raise
        finally:
            self._watchdog.release(secured)
        return secured

    def _secure(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                self._context = self._make_context()
            return self._context

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        for path in self._authorities:
            try:
                context.load_verify_locations(path)
            except OSError as error:
                raise RegistryError(f"can't read the CA {path}: {error.strerror or 'no certificate in it'}") from error
        if self._insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


class Response:
    """The answer to a request. Used by one thread; `Transport.send` closes it."""

    def __init__(
        self,
        answer: http.client.HTTPResponse,
        request: Request,
        guard: Guard,
        keep: Callable[[], None],
        drop: Callable[[], None],
    ) -> None:
        self.status = answer.status
        self.headers = answer.headers
        self.url = request.url
        self._answer = answer
        self._is_document = request.document
        self._guard = guard
        self._keep = keep
        self._drop = drop
        self._is_read = request.method == "HEAD" or answer.length == 0

    def length(self) -> int | None:
        """Return how long the body is said to be."""
        said = self.headers.get("Content-Length", "")
        return int(said) if said.isascii() and said.isdecimal() and len(said) < 20 else None

    def chunks(self) -> Iterator[bytes]:
        """Yield the body as it comes. Raises one of BROKEN when the connection breaks or is slower than the floor."""
        brought = 0
        self._renew()
        try:
            while data := self._answer.read1(_CHUNK):
                brought += len(data)
                if brought >= _FLOOR:
                    self._renew()
                    brought = 0
                yield data
            if self._answer.length:
                raise http.client.IncompleteRead(b"", self._answer.length)
        except BROKEN as error:
            raise self._guard.reason(error) from error
        self._is_read = True

    def document(self, limit: int) -> bytes:
        """Return the body, of which more than `limit` bytes are an error. Raises what `chunks` does, RegistryError."""
        if (self.length() or 0) > limit:
            raise RegistryError(f"{host_of(self.url)} announces a document of {self.length()} bytes: more than {limit}")
        data = bytearray()
        for chunk in self.chunks():
            data += chunk
            if len(data) > limit:
                raise RegistryError(f"{host_of(self.url)} sends a document of more than {limit} bytes")
        return bytes(data)

    def close(self) -> None:
        """Keep the connection when all of the response has been read, or is short, else end it."""
        if not self._is_read and (self.length() or math.inf) <= _DRAINED_MAX:
            with contextlib.suppress(*BROKEN, StoppedError):
                for _ in self.chunks():
                    pass
        self._guard.release()
        self._answer.close()
        if self._is_read and not self._answer.will_close:
            self._keep()
        else:
            self._drop()

    def _renew(self) -> None:
        if not self._is_document:  # that has one time for all of it
            self._guard.give(SILENCE_S)


class _Connection(http.client.HTTPConnection):
    """A connection that is open from the beginning and never opened again."""

    sock: socket.socket

    def __init__(self, place: Place, sock: socket.socket, proxy: Proxy | None) -> None:
        super().__init__(place.host, place.port)
        self.auto_open = 0
        self.default_port = 443 if place.scheme == "https" else 80
        self.sock = sock
        self._proxy = proxy if place.scheme == "http" else None  # TLS goes through a tunnel

    def target(self, url: str) -> str:
        """Return what stands in the request's first line."""
        if self._proxy:
            return url
        parts = urllib.parse.urlsplit(url)
        return urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))

    def proxy_headers(self) -> dict[str, str]:
        return {"Proxy-Authorization": self._proxy.authorization} if self._proxy and self._proxy.authorization else {}


def _guarded(guard: Guard, body: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in body:
        guard.give(SILENCE_S)
        yield chunk
    guard.give(DOCUMENT_S)  # the other side looks at what it got


def _retry_after(value: str | None) -> float | None:
    """Read Retry-After: seconds, or a date. Source: RFC 9110, section 10.2.3."""
    if not value:
        return None
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
