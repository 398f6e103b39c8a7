"""Images from registries into the store. Owns the order of a pull; `oci.fetch` calls it.

Source: OCI distribution-spec v1.1, "Pulling manifests", "Pulling blobs".
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

from berth.errors import MAKE_ROOM, BerthError, ImageFormatError, NotFoundError, RegistryError
from berth.log import log
from berth.names import ImageReference
from berth.oci import spec
from berth.oci.choose import Chosen, choose
from berth.oci.digest import Digest, digest_of
from berth.oci.registry.authfile import find_credentials
from berth.oci.registry.client import Client
from berth.oci.registry.hosts import load_registries
from berth.oci.registry.parallel import Tally, in_parallel
from berth.oci.registry.sockets import explain
from berth.oci.registry.transport import BROKEN, Response
from berth.oci.registry.watchdog import Watchdog
from berth.oci.spec import Descriptor, Platform
from berth.oci.store import BlobWriter, Ingest
from berth.progress import Progress
from berth.units import format_size

_MANIFEST_MAX = 4 * 1024 * 1024  # bytes: the least that registries have to take, the most that any takes
_LAYERS_MAX = 1000  # docker makes at most 127
_BREAKS_MAX = 5  # of the connection, without _PROGRESS between them
_PROGRESS = 1024 * 1024
_DOCUMENT_BREAKS_MAX = 3
_ACCEPTED = (spec.INDEX, spec.MANIFEST, spec.DOCKER_INDEX, spec.DOCKER_MANIFEST)
_FAILED = (RegistryError, NotFoundError, ImageFormatError)  # what another endpoint may do better


class Arrivals(Protocol):
    """Who wants an image's layers before all of it is there. The methods are quick and never raise."""

    def expect(self, image: Digest, layers: Sequence[Descriptor]) -> None:
        """Be told what the image of this manifest is going to have, lowest layer first."""
        ...

    def arrived(self, blob: Digest, open_blob: Callable[[Digest], int]) -> None:
        """Be told, by any thread, of a layer that is whole and verified, and can be opened now."""
        ...


def pull(
    reference: ImageReference, ingest: Ingest, *, platform: Platform | None, progress: Progress, registries: Path,
    arrivals: Arrivals | None = None,
) -> Descriptor:  # fmt: skip
    """Copy an image out of a registry, complete in `ingest`; what the store has is not fetched again.

    registries: registries.toml. arrivals: told of the layers as they come. Raises NotFoundError, RegistryError,
    ImageFormatError, StateFormatError.
    """
    config = load_registries(registries)
    name, _, repository = reference.path.partition("/")
    watchdog = Watchdog()
    with contextlib.ExitStack() as stack:
        stack.callback(watchdog.stop)
        clients: list[Client] = []
        for endpoint in config.endpoints(name):
            find = functools.partial(find_credentials, endpoint.name, endpoint.prefix + repository)
            found = Client(endpoint, repository, watchdog, find)
            stack.callback(found.close)
            clients.append(found)
        work = _Pull(reference, clients, ingest, progress, arrivals)
        return work.run(platform, config.parallel_layers, watchdog)


class _Pull:
    """One image on its way. clients: the mirrors in order, the registry itself last."""

    def __init__(
        self, reference: ImageReference, clients: Sequence[Client], ingest: Ingest, progress: Progress,
        arrivals: Arrivals | None,
    ) -> None:  # fmt: skip
        self._reference = reference
        self._clients = list(clients)
        self._ingest = ingest
        self._progress = progress
        self._arrivals = arrivals
        self._tally = Tally()

    def run(self, platform: Platform | None, threads: int, watchdog: Watchdog) -> Descriptor:
        chosen = self._choose(platform)
        manifest = chosen.manifest
        if len(manifest.layers) > _LAYERS_MAX:
            raise ImageFormatError(f"'{self._reference.familiar}' has {len(manifest.layers)} layers")
        self._ingest.add_bytes(chosen.document)
        self._ingest.add_bytes(chosen.config)
        needed = {item.digest: item for item in manifest.layers}
        missing = [item for item in needed.values() if not self._ingest.has(item)]
        total = sum(item.size for item in missing)
        self._check_room(total)
        if self._arrivals:
            self._arrivals.expect(chosen.descriptor.digest, manifest.layers)
            for item in needed.values():
                if item not in missing:
                    self._arrivals.arrived(item.digest, self._ingest.open)
        if missing:
            self._say(len(manifest.layers), sum(item in missing for item in manifest.layers))
            in_parallel(
                self._fetch, _in_order(missing, wanted=self._arrivals is not None), threads=threads, stop=watchdog.stop,
                tick=lambda: self._progress.advance(self._tally.done, total),
            )  # fmt: skip
        return chosen.descriptor

    def _choose(self, platform: Platform | None) -> Chosen:
        """Find the image at the first endpoint that has it; that one is asked first for the layers too."""
        for client in list(self._clients):
            try:
                remote = _Remote(client, self._ingest, self._reference)
                return choose(remote, remote.top(), platform)
            except _FAILED as error:
                if client is self._clients[-1] or len(self._clients) == 1:
                    raise
                log.debug("pull: %s: %s", client.where, error.message)
                self._clients.remove(client)
        raise AssertionError("the last endpoint returns or raises")

    def _say(self, count: int, fetched: int) -> None:
        if fetched < count:
            here = f"{count - fetched} of its {count} layers are here already"
            self._progress.step(f"pulling {self._reference.familiar}, {here}")

    def _check_room(self, total: int) -> None:
        status = os.statvfs(self._ingest.path)
        room = status.f_bavail * status.f_frsize
        if total > room:
            raise BerthError(
                f"can't pull '{self._reference.familiar}': it takes {format_size(total)}, and there are "
                f"{format_size(room)} left at {self._ingest.path.parent}",
                hint=MAKE_ROOM,
            )

    def _fetch(self, blob: Descriptor) -> None:
        self._bring(blob)
        if self._arrivals:
            self._arrivals.arrived(blob.digest, self._ingest.open)

    def _bring(self, blob: Descriptor) -> None:
        """Bring one blob, from the first endpoint that gives it whole."""
        for client in self._clients:
            with self._ingest.writer() as writer:
                try:
                    self._fill(client, blob, writer)
                    writer.finish(where=client.where, expected=blob)
                    return
                except _FAILED as error:
                    if client is self._clients[-1]:
                        raise
                    log.debug("pull: %s: %s", client.where, error.message)
                    self._tally.add(-writer.size)

    def _fill(self, client: Client, blob: Descriptor, writer: BlobWriter) -> None:
        """Write the blob, going on where the connection breaks."""
        breaks = 0
        while writer.size < blob.size:
            start = writer.size
            try:
                self._go_on(client, blob, writer)
            except BROKEN as error:
                breaks = 1 if writer.size - start >= _PROGRESS else breaks + 1
                if breaks == _BREAKS_MAX:
                    raise RegistryError(
                        f"the connection to {client.where} broke after {writer.size} of {blob.size} bytes of blob "
                        f"{blob.digest}: {explain(error)}",
                        hint="try again",
                    ) from error
                log.debug("pull: %s at %d: %s", blob.digest, writer.size, explain(error))
                client.transport.wait(breaks)

    def _go_on(self, client: Client, blob: Descriptor, writer: BlobWriter) -> None:
        start = writer.size
        headers = {"Range": f"bytes={start}-"} if start else {}
        with client.open(
            "GET", client.url(f"blobs/{blob.digest}"), scopes=client.scopes("pull"), ok=(200, 206), headers=headers,
            what=f"blob {blob.digest} of '{self._reference.familiar}'",
        ) as response:  # fmt: skip
            skipped = _check_range(client, response, blob, start)
            for chunk in response.chunks():
                wanted = chunk[skipped:]  # of a registry that knows no ranges: what we have already
                skipped -= len(chunk) - len(wanted)
                if writer.size + len(wanted) > blob.size:
                    raise ImageFormatError(f"{client.where}: blob {blob.digest} is longer than {blob.size} bytes")
                writer.write(wanted)
                self._tally.add(len(wanted))
        if writer.size < blob.size:
            raise http.client.IncompleteRead(b"", blob.size - writer.size)


def _in_order(layers: Sequence[Descriptor], *, wanted: bool) -> list[Descriptor]:
    """Say in which order to fetch layers, which come lowest first. wanted: somebody waits for the lowest.

    The largest goes first, with the others beside it and not behind it: the small ones last, or the lowest first.
    """
    largest = sorted(layers, key=lambda item: -item.size)
    return [largest[0], *(item for item in layers if item is not largest[0])] if wanted else largest


def _check_range(client: Client, response: Response, blob: Descriptor, start: int) -> int:
    """Check what is said of the bytes that come; return how many of them are before `start`."""
    skipped = start if response.status == 200 else 0
    if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise RegistryError(f"{client.where} sends another part of blob {blob.digest} than it was asked for")
    expected = blob.size - start + skipped
    if response.length() not in (None, expected):
        raise ImageFormatError(
            f"{client.where}: blob {blob.digest} has {response.length()} bytes there, not {expected}"
        )
    return skipped


class _Remote:
    """The documents of one repository, as `choose` reads them."""

    def __init__(self, client: Client, ingest: Ingest, reference: ImageReference) -> None:
        self.where = client.where
        self._client = client
        self._ingest = ingest
        self._what = f"image '{reference.familiar}'"
        self._reference = reference.digest or reference.tag or "latest"
        self._top: tuple[Descriptor, bytes] | None = None

    def top(self) -> Descriptor:
        """Return what the reference names: an index, or a manifest."""
        headers = {"Accept": ", ".join(_ACCEPTED)}
        data, media_type, said = self._get(f"manifests/{self._reference}", headers)
        digest = digest_of(data)
        asked = self._reference if self._reference.startswith("sha256:") else digest
        if digest != asked or (said.startswith("sha256:") and said != digest):
            raise ImageFormatError(f"{self.where}: the manifest of {self._what} is damaged: its digest is {digest}")
        descriptor = Descriptor(_media_type(data, media_type, f"{self.where}: {self._what}"), digest, len(data))
        self._top = (descriptor, data)
        return descriptor

    def read(self, descriptor: Descriptor) -> bytes:
        if self._top is not None and self._top[0].digest == descriptor.digest:
            return self._top[1]
        if self._ingest.has(descriptor):
            return self._ingest.read(descriptor)
        if descriptor.media_type in spec.INDEXES | spec.MANIFESTS:
            return self._get(f"manifests/{descriptor.digest}", {"Accept": ", ".join(_ACCEPTED)})[0]
        return self._get(f"blobs/{descriptor.digest}", {})[0]

    def _get(self, path: str, headers: dict[str, str]) -> tuple[bytes, str, str]:
        """Return a document, its media type and its digest, as they are said to be."""
        breaks = 0
        while True:
            try:
                with self._client.open(
                    "GET", self._client.url(path), scopes=self._client.scopes("pull"), what=self._what,
                    headers=headers, document=True,
                ) as response:  # fmt: skip
                    data = response.document(_MANIFEST_MAX)
                    media_type = response.headers.get_content_type()
                    return data, media_type, response.headers.get("Docker-Content-Digest", "")
            except BROKEN as error:
                breaks += 1
                if breaks == _DOCUMENT_BREAKS_MAX:
                    raise RegistryError(f"the connection to {self.where} broke: {explain(error)}") from error
                self._client.transport.wait(breaks)


def _media_type(data: bytes, said: str, where: str) -> str:
    """Return what a document is: it says so itself, or else the response's header. Source: manifest.md, mediaType."""
    document = spec.parse_json(data, where=where)
    members = cast("dict[str, object]", document) if isinstance(document, dict) else {}
    if members.get("schemaVersion") == 1:
        raise ImageFormatError(f"{where}: a docker schema 1 manifest, which nobody writes since 2017")
    if "manifests" in members and "layers" in members:
        raise ImageFormatError(f"{where}: it is an index and a manifest at once")
    media_type = members.get("mediaType")
    return media_type if isinstance(media_type, str) else said
