"""Images from the store to registries. Owns the order of a push; `Images.push` calls it.

Source: OCI distribution-spec v1.1, "Pushing blobs", "Mounting a blob from another repository", "Pushing manifests".
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from berth.errors import NotFoundError, RegistryError
from berth.log import log
from berth.names import ImageReference
from berth.oci.digest import Digest
from berth.oci.registry.authfile import find_credentials
from berth.oci.registry.client import Client
from berth.oci.registry.hosts import load_registries
from berth.oci.registry.parallel import Tally, in_parallel
from berth.oci.registry.sockets import explain
from berth.oci.registry.transport import BROKEN, Response
from berth.oci.registry.watchdog import Watchdog
from berth.oci.spec import Descriptor
from berth.progress import Progress

_READ = 256 * 1024
_PIECE = 16 * 1024 * 1024  # bytes of a chunk, once the whole blob at once has failed
_BREAKS_MAX = 5
_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,18})")
_OCTETS = {"Content-Type": "application/octet-stream"}


@dataclasses.dataclass(frozen=True, slots=True)
class Outgoing:
    """An image to push. document: its manifest as it is written; blobs: config and layers, open for reading.

    known: repositories of the same registry that should have a blob already.
    """

    manifest: Descriptor
    document: bytes
    blobs: Mapping[Digest, tuple[Descriptor, int]]
    known: Mapping[Digest, Sequence[str]]


def push(reference: ImageReference, image: Outgoing, *, progress: Progress, registries: Path) -> None:
    """Put an image into a registry under `reference`; blobs that are there already are not sent.

    registries: registries.toml; mirrors are not pushed to. Raises RegistryError, NotFoundError, StateFormatError.
    """
    config = load_registries(registries)
    name, _, repository = reference.path.partition("/")
    endpoint = config.origin(name)
    watchdog = Watchdog()
    client = Client(endpoint, repository, watchdog, lambda: find_credentials(endpoint.name, repository))
    with contextlib.ExitStack() as stack:
        stack.callback(watchdog.stop)
        stack.callback(client.close)
        work = _Push(client, reference, image)
        total = sum(blob.size for blob, _ in image.blobs.values())
        progress.step(f"pushing {reference.familiar}")
        in_parallel(
            work.send, list(image.blobs), threads=config.parallel_layers, stop=watchdog.stop,
            tick=lambda: progress.advance(work.tally.done, total),
        )  # fmt: skip
        work.put_manifest()


class _Push:
    """One image on its way."""

    def __init__(self, client: Client, reference: ImageReference, image: Outgoing) -> None:
        self.tally = Tally()
        self._client = client
        self._reference = reference
        self._image = image
        self._scopes = client.scopes("pull,push")

    def send(self, digest: Digest) -> None:
        """Have the registry have a blob: it has it, mounts it from another repository, or is sent it."""
        blob, fd = self._image.blobs[digest]
        location = None if self._has(blob) else self._begin(blob)
        if location is None:
            self.tally.add(blob.size)
        else:
            self._upload(blob, fd, location)

    def put_manifest(self) -> None:
        manifest, document = self._image.manifest, self._image.document
        name = self._reference.tag or self._reference.digest or "latest"
        with self._request(
            "PUT", self._client.url(f"manifests/{name}"), ok=(200, 201), headers={"Content-Type": manifest.media_type},
            data=document, document=True,
        ) as response:  # fmt: skip
            said = response.headers.get("Docker-Content-Digest", manifest.digest)
        if said.startswith("sha256:") and said != manifest.digest:
            raise RegistryError(f"{self._client.where} changed the manifest: its digest there is {said[:80]}")

    def _has(self, blob: Descriptor) -> bool:
        try:
            with self._request("HEAD", self._client.url(f"blobs/{blob.digest}"), ok=(200,)) as response:
                return response.length() in (None, blob.size)
        except NotFoundError:
            return False

    def _begin(self, blob: Descriptor) -> str | None:
        """Begin an upload and return its address; None when the registry has mounted the blob instead."""
        known = [name for name in self._image.known.get(blob.digest, ()) if name != self._client.repository]
        if known:
            mount = urllib.parse.urlencode({"mount": blob.digest, "from": known[0]})
            # Whoever may not read there is not let mount from there: the plain way remains.
            with contextlib.suppress(RegistryError, NotFoundError):
                return self._post(f"blobs/uploads/?{mount}", (*self._scopes, f"repository:{known[0]}:pull"))
        location = self._post("blobs/uploads/", self._scopes)
        if location is None:
            raise RegistryError(f"{self._client.where} began no upload of blob {blob.digest}")
        return location

    def _post(self, path: str, scopes: tuple[str, ...]) -> str | None:
        with self._request("POST", self._client.url(path), ok=(201, 202), data=b"", scopes=scopes) as response:
            return None if response.status == 201 else self._location(response)

    def _upload(self, blob: Descriptor, fd: int, location: str) -> None:
        """Send a blob: all at once, and after a failure in pieces from where the registry is."""
        done, breaks, piece = 0, 0, max(blob.size, 1)
        while done < blob.size or blob.size == 0:
            try:
                location, done = self._send_piece(blob, fd, location, done, min(piece, blob.size - done))
                breaks = 0
                if blob.size == 0:
                    break
            except (*BROKEN, RegistryError) as error:
                breaks += 1
                why = error.message if isinstance(error, RegistryError) else explain(error)
                if breaks == _BREAKS_MAX:
                    raise RegistryError(f"can't push blob {blob.digest} to {self._client.where}: {why}") from error
                log.debug("push: %s at %d: %s", blob.digest, done, why)
                self._client.transport.wait(breaks)
                piece = min(piece, _PIECE) // (1 if breaks == 1 else 4)
                reached, location = self._ask(blob, location)
                self.tally.add(reached - done)
                done = reached
        address = f"{location}{'&' if '?' in location else '?'}{urllib.parse.urlencode({'digest': blob.digest})}"
        with self._request("PUT", address, ok=(201, 204), data=b"", document=True):
            pass

    def _send_piece(self, blob: Descriptor, fd: int, location: str, start: int, length: int) -> tuple[str, int]:
        """Send bytes of a blob; return where to go on, and from which byte."""
        end = start + length
        # Of a blob in one piece nobody says so: some registries take a range for chunks that are still to come.
        said = {} if length == blob.size else {"Content-Range": f"{start}-{end - 1}"}
        counted = 0

        def body() -> Iterator[bytes]:
            nonlocal counted
            self.tally.add(-counted)  # an attempt before this one
            counted = 0
            place = start
            while place < end:
                data = os.pread(fd, min(_READ, end - place), place)
                if not data:
                    raise RegistryError(f"blob {blob.digest} of the image store is truncated")
                place += len(data)
                counted += len(data)
                self.tally.add(len(data))
                yield data

        try:
            with self._client.open(
                "PATCH", location, scopes=self._scopes, what=self._what, ok=(202, 204), headers={**_OCTETS, **said},
                body=body, length=length,
            ) as response:  # fmt: skip
                reached = _RANGE.fullmatch(response.headers.get("Range", ""))
                place = min(int(reached[1]) + 1, end) if reached and length else end
                self.tally.add(place - end)
                return self._location(response), place
        except BaseException:
            self.tally.add(-counted)
            raise

    def _ask(self, blob: Descriptor, location: str) -> tuple[int, str]:
        """Ask how far an upload is; return that, and where to go on. One that is lost is begun anew."""
        try:
            with self._request("GET", location, ok=(204,)) as response:
                reached = _RANGE.fullmatch(response.headers.get("Range", ""))
                done = int(reached[1]) + 1 if reached else 0
                # A range of 0-0 may mean no byte or one; sending one byte twice is refused, so begin anew.
                if 1 < done <= blob.size:
                    return done, self._location(response, location)
        except (NotFoundError, RegistryError) as error:
            log.debug("push: %s: %s", blob.digest, error.message)
        again = self._post("blobs/uploads/", self._scopes)
        if again is None:
            raise RegistryError(f"{self._client.where} began no upload of blob {blob.digest}")
        return 0, again

    def _location(self, response: Response, default: str = "") -> str:
        target = response.headers.get("Location") or default
        if not target:
            raise RegistryError(f"{self._client.where} does not say where to upload to")
        return self._client.join(response.url, target)

    @property
    def _what(self) -> str:
        return f"'{self._reference.familiar}'"

    def _request(
        self,
        method: str,
        url: str,
        *,
        ok: Sequence[int],
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
        scopes: tuple[str, ...] = (),
        document: bool = False,
    ) -> contextlib.AbstractContextManager[Response]:
        return self._client.open(
            method, url, scopes=scopes or self._scopes, what=self._what, ok=ok, headers=headers, document=document,
            body=None if data is None else lambda: [data] if data else [], length=len(data or b""),
        )  # fmt: skip
