"""One repository at one endpoint: requests with authorization, redirects, and errors that name both. `pull`, `push`
and `login` speak through it; threads may share a client.

Sources: OCI distribution-spec v1.1, "API", "Error Codes"; RFC 9110, section 15.4 (redirects).
"""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import cast

from berth.errors import BerthError, NotFoundError, RegistryError
from berth.oci.registry.auth import Authorizer, Scopes
from berth.oci.registry.authfile import Credentials
from berth.oci.registry.hosts import Endpoint, is_loopback
from berth.oci.registry.sockets import ContactError, Place, place_of
from berth.oci.registry.transport import BROKEN, Request, Response, Transport
from berth.oci.registry.watchdog import Watchdog

_REDIRECTS_MAX = 5
_REFUSALS_MAX = 2  # first without, then with a token that may have expired
_ERROR_MAX = 64 * 1024  # bytes of an error's document


class Client:
    """What speaks to one endpoint about one repository; `repository` has the endpoint's prefix."""

    def __init__(
        self, endpoint: Endpoint, repository: str, watchdog: Watchdog, find: Callable[[], Credentials | None]
    ) -> None:
        self.endpoint = endpoint
        self.repository = endpoint.prefix + repository
        self.where = f"registry {endpoint.name}"
        self.transport = Transport(watchdog, insecure=endpoint.insecure, authorities=endpoint.authorities)
        self._authorizer = Authorizer(endpoint.name, self.transport, find)
        self._lock = threading.Lock()
        self._place: Place | None = None

    def close(self) -> None:
        self.transport.close()

    def scopes(self, actions: str) -> Scopes:
        return (f"repository:{self.repository}:{actions}",)

    def url(self, path: str) -> str:
        """Return the address of something of the repository: ``manifests/latest``; "" is the API's own."""
        return f"{_origin(self.place())}/v2/{f'{self.repository}/{path}' if path else ''}"

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        url: str,
        *,
        scopes: Scopes,
        what: str,
        ok: Sequence[int] = (200,),
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Iterable[bytes]] | None = None,
        length: int = 0,
        document: bool = False,
    ) -> Generator[Response]:
        """Send a request, authorized; the response has one of the statuses `ok`. what: what it is about, for messages.

        Raises NotFoundError and RegistryError; one of BROKEN while the body is read.
        """
        with contextlib.ExitStack() as stack:
            for refused in range(_REFUSALS_MAX + 1):
                authorization = self._authorizer.header(scopes) if self._is_ours(url) else ""
                given = {"Authorization": authorization} if authorization else {}
                sent = {**(headers or {}), **given}
                request = Request(method, url, sent, body, length, document, once=method == "PATCH")
                response = self._enter(stack, request)
                if response.status != 401 or not self._is_ours(response.url) or refused == _REFUSALS_MAX:
                    break
                challenges = response.headers.get_all("WWW-Authenticate") or []
                stack.close()
                plain = self.place().scheme == "http"
                self._authorizer.answer(challenges, scopes, used=authorization, plain=plain)
            else:
                raise AssertionError("the last refusal breaks")
            if response.status not in ok:
                raise self._error(response, what)
            yield response

    def place(self) -> Place:
        """Return whom to speak to: HTTPS, or plain HTTP where the endpoint allows that and TLS is not spoken."""
        with self._lock:
            if self._place is None:
                try:
                    self._place = self._find_place()
                except ContactError as error:
                    raise self.unreachable(error) from error
            return self._place

    def unreachable(self, error: ContactError) -> RegistryError:
        hint = error.hint or self._way_out()
        if error.not_tls:
            hint = f'where plain HTTP is meant, in registries.toml: [registry."{self.endpoint.name}"] insecure = true'
        return RegistryError(f"can't reach {self.where}: {error}", hint=hint)

    def _way_out(self) -> str:
        if is_loopback(self.endpoint.host):
            return f"start it, or name another: curl http://{self.endpoint.name}/v2/ tells whether it answers"
        return (
            "check the spelling and the network (https_proxy is honoured); a mirror goes into registries.toml, and "
            "rootfs:FILE, oci-archive:FILE or bootstrap:debian/bookworm need no registry"
        )

    def _find_place(self) -> Place:
        secure = Place("https", self.endpoint.host, self.endpoint.port or 443)
        if not self.endpoint.plain:
            return secure
        try:
            self.transport.contact(secure)
            return secure
        except ContactError as error:
            if error.hint:  # it speaks TLS: whoever answers in plain then is not to be trusted
                raise
            plain = Place("http", self.endpoint.host, self.endpoint.port or 80)
            try:
                self.transport.contact(plain)
            except ContactError:
                raise error from None
            return plain

    def _enter(self, stack: contextlib.ExitStack, request: Request) -> Response:
        """Send a request and go where it is redirected to; only the registry itself is shown our authorization."""
        for _ in range(_REDIRECTS_MAX):
            try:
                response = stack.enter_context(self.transport.send(request))
            except ContactError as error:
                if self._is_ours(request.url):
                    raise self.unreachable(error) from error
                raise RegistryError(
                    f"{self.where} sends us to {place_of(request.url).host}, which can't be reached: {error}"
                ) from error
            target = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or request.method not in ("GET", "HEAD") or not target:
                return response
            stack.close()
            request = self._redirected(request, target)
        raise RegistryError(f"{self.where} redirects more than {_REDIRECTS_MAX} times")

    def _redirected(self, request: Request, target: str) -> Request:
        url = self.join(request.url, target)
        if place_of(request.url).scheme == "https" and place_of(url).scheme != "https":
            raise RegistryError(f"{self.where} redirects from HTTPS to plain HTTP, to {place_of(url).host}")
        headers = dict(request.headers)
        if not self._is_ours(url):
            headers.pop("Authorization", None)
        return Request(request.method, url, headers, document=request.document)

    def join(self, base: str, target: str) -> str:
        """Return where a Location header leads. Raises RegistryError for nonsense."""
        try:
            url = urllib.parse.urldefrag(urllib.parse.urljoin(base, target)).url
        except ValueError as error:
            raise RegistryError(f"{self.where} sends us to an invalid address") from error
        place_of(url)
        return url

    def _is_ours(self, url: str) -> bool:
        return place_of(url) == self.place()

    def _error(self, response: Response, what: str) -> BerthError:
        said = _message(response)
        tail = f": {said}" if said else ""
        match response.status:
            case 404:
                return NotFoundError(f"{what} not found in {self.where}")
            case 401 | 403:
                return RegistryError(
                    f"{self.where} denies access to {what}: {said or 'it does not exist, or wants a login'}",
                    hint=f"berth login {self.endpoint.name}",
                )
            case 429:
                return RegistryError(
                    f"{self.where} allows no more requests for now{tail}",
                    hint=f"wait, or 'berth login {self.endpoint.name}': accounts may have more",
                )
            case status:
                return RegistryError(f"{self.where} answered {status} for {what}{tail}")


def _origin(place: Place) -> str:
    host = f"[{place.host}]" if ":" in place.host else place.host
    usual = place.port == (443 if place.scheme == "https" else 80)
    return f"{place.scheme}://{host}{'' if usual else f':{place.port}'}"


def _message(response: Response) -> str:
    """Return the first error that the registry tells, one line. Source: distribution-spec, "Error Codes"."""
    try:
        document: object = json.loads(response.document(_ERROR_MAX))
    except (*BROKEN, RegistryError, RecursionError):
        return ""
    errors = cast("dict[str, object]", document).get("errors") if isinstance(document, dict) else None
    first = cast("list[object]", errors)[0] if isinstance(errors, list) and errors else None
    if not isinstance(first, dict):
        return ""
    members = cast("dict[str, object]", first)
    said = members.get("message") or members.get("code")
    return " ".join(said.split())[:200] if isinstance(said, str) else ""
