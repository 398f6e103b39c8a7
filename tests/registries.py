"""Registries on loopback for tests: Debian's docker-registry, and one in this process that can be told to misbehave."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import re
import signal
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from berth import proc
from berth.oci import spec
from berth.oci.digest import digest_of
from berth.oci.registry import sockets, transport
from berth.oci.registry.hosts import is_loopback
from berth.oci.registry.sockets import ContactError
from berth.oci.spec import Descriptor, ImageConfig, Platform

USER, PASSWORD = "somebody", "s3cret"
# htpasswd -nbB somebody s3cret
_HTPASSWD = "somebody:$2y$05$abcdefghijklmnopqrstuuLK7U1u6pVRmL7L1BBM2aS35PSZnDXlK"
_START_S = 20.0


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """A docker-registry at work. authority: the certificate to trust, of one with TLS."""

    host: str
    folder: Path
    authority: Path | None = None


@contextlib.contextmanager
def docker_registry(folder: Path, *, tls: bool = False, login: bool = False, proxied: str = "") -> Generator[Served]:
    """Run Debian's docker-registry on loopback. proxied: the registry that it is a pull-through cache of."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    lines = [
        "version: 0.1", "log: {level: error, accesslog: {disabled: true}}",
        f"storage: {{filesystem: {{rootdirectory: {folder}/store}}, delete: {{enabled: true}}}}",
        "http:", f"  addr: 127.0.0.1:{port}",
    ]  # fmt: skip
    if tls:
        certificate, key = make_certificate(folder)
        lines.append(f"  tls: {{certificate: {certificate}, key: {key}}}")
    if login:
        (folder / "htpasswd").write_text(f"{_HTPASSWD}\n")
        lines.append(f"auth: {{htpasswd: {{realm: tests, path: {folder}/htpasswd}}}}")
    if proxied:
        lines.append(f"proxy: {{remoteurl: {proxied}}}")
    (folder / "config.yml").write_text("\n".join(lines) + "\n")
    with (folder / "log").open("wb") as log:
        process = proc.spawn(["docker-registry", "serve", f"{folder}/config.yml"], stdout=log, stderr=log)
    with process:
        try:
            _await(port)
            yield Served(f"127.0.0.1:{port}", folder, folder / "certificate.pem" if tls else None)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1, localhost and registry.test that is its own CA."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    proc.run([
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", "/CN=berth tests", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:registry.test",
        "-keyout", str(key), "-out", str(certificate),
    ])  # fmt: skip
    return certificate, key


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _await(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


# A registry in this process


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """A request as it came. authorization: "" when it had none."""

    method: str
    path: str
    range: str
    authorization: str
    content_range: str = ""


Behaviour = Callable[["Exchange"], bool]  # True: it has answered


class FakeRegistry:
    """A registry whose every answer can be replaced: the first behaviour that has answered ends it."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}  # ``repository/reference`` -> media type, document
        self.seen: list[Seen] = []
        self.behaviours: list[Behaviour] = []
        self.uploads: dict[str, bytearray] = {}
        self.at_once = 0  # most blobs on their way at the same time
        self._now = 0
        self._lock = threading.Lock()
        registry = self

        class Handler(Exchange):
            @property
            def registry(self) -> FakeRegistry:
                return registry

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def serving(self, context: ssl.SSLContext | None = None) -> Generator[FakeRegistry]:
        if context:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        thread = threading.Thread(target=lambda: self._server.serve_forever(0.02))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def put_blob(self, data: bytes) -> Descriptor:
        digest = digest_of(data)
        self.blobs[digest] = data
        return Descriptor(spec.LAYER, digest, len(data))

    def put_document(self, name: str, document: dict[str, object], media_type: str) -> Descriptor:
        """Put a manifest or an index under ``repository:tag`` and its digest."""
        data = spec.encode_json({**document, "mediaType": media_type})
        repository, _, tag = name.partition(":")
        found = Descriptor(media_type, digest_of(data), len(data))
        for reference in (tag, found.digest):
            self.manifests[f"{repository}/{reference}"] = (media_type, data)
        return found

    def put_image(self, name: str, *layers: bytes, architecture: str = "", docker: bool = False) -> Descriptor:
        """Put an image with these uncompressed layers."""
        platform = Platform("linux", architecture) if architecture else spec.host_platform()
        config = ImageConfig(platform, diff_ids=tuple(digest_of(layer) for layer in layers))
        described = [self.put_blob(layer) for layer in layers]
        of_config = dataclasses.replace(
            self.put_blob(spec.encode_json(config.to_json())), media_type=spec.DOCKER_CONFIG if docker else spec.CONFIG
        )
        if docker:
            described = [dataclasses.replace(layer, media_type=spec.DOCKER_LAYER) for layer in described]
        manifest = spec.Manifest(of_config, tuple(described)).to_json()
        return self.put_document(name, manifest, spec.DOCKER_MANIFEST if docker else spec.MANIFEST)

    def put_index(self, name: str, *manifests: dict[str, object]) -> Descriptor:
        return self.put_document(name, {"schemaVersion": 2, "manifests": list(manifests)}, spec.INDEX)

    def paths(self, method: str = "GET") -> list[str]:
        return [seen.path for seen in self.seen if seen.method == method]

    @contextlib.contextmanager
    def counted(self) -> Generator[None]:
        with self._lock:
            self._now += 1
            self.at_once = max(self.at_once, self._now)
        yield
        with self._lock:
            self._now -= 1


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are what the tests are about."""


class Exchange(http.server.BaseHTTPRequestHandler):
    """One connection to a FakeRegistry."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def registry(self) -> FakeRegistry:
        raise NotImplementedError

    def handle(self) -> None:
        # A client that tries TLS gets an end, not a wait for the end of a line.
        if not isinstance(self.connection, ssl.SSLSocket) and self.connection.recv(1, socket.MSG_PEEK) == b"\x16":
            return
        super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> bool:
        """Send a whole answer; ``content_type`` is the header Content-Type."""
        self.send_response(status)
        given = {name.replace("_", "-").title(): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(body)), **given}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return True

    def hang_up(self) -> bool:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def work(self) -> None:
        header = self.headers.get
        self.registry.seen.append(
            Seen(self.command, self.path, header("Range", ""), header("Authorization", ""), header("Content-Range", ""))
        )
        if any(behaviour(self) for behaviour in self.registry.behaviours):
            return
        self.serve()

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = work  # noqa: N815 (the names that http.server looks for)

    def serve(self) -> None:
        """Be a good registry."""
        parts = urllib.parse.urlsplit(self.path)
        match = re.fullmatch(r"/v2/(?:(.+)/(manifests|blobs|blobs/uploads)/([^/]*))?", parts.path)
        if match is None:
            self.answer(404)
        elif not match[1]:
            self.answer(200, b"{}")
        elif match[2] == "manifests":
            self._serve_manifest(f"{match[1]}/{match[3]}")
        elif match[2] == "blobs/uploads" and not match[3]:
            self._begin_upload(match[1])
        elif match[2] == "blobs":
            self._serve_blob(match[3])
        else:
            self._serve_upload(match[3], urllib.parse.parse_qs(parts.query))

    def _serve_manifest(self, name: str) -> None:
        if self.command == "PUT":
            data = self.body()
            self.registry.manifests[name] = (self.headers["Content-Type"], data)
            self.answer(201, docker_content_digest=digest_of(data))
        elif name in self.registry.manifests:
            media_type, data = self.registry.manifests[name]
            self.answer(200, data, content_type=media_type, docker_content_digest=digest_of(data))
        else:
            self.answer(404, json.dumps({"errors": [{"code": "MANIFEST_UNKNOWN", "message": "none"}]}).encode())

    def _serve_blob(self, digest: str) -> None:
        data = self.registry.blobs.get(digest)
        if data is None:
            self.answer(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        with self.registry.counted():
            if asked:
                start = int(asked[1])
                self.answer(206, data[start:], content_range=f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.answer(200, data)

    def _begin_upload(self, repository: str) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        self.body()
        if query.get("mount", [""])[0] in self.registry.blobs:
            self.answer(201, location=f"/v2/{repository}/blobs/{query['mount'][0]}")
            return
        name = f"u{len(self.registry.uploads)}"
        self.registry.uploads[name] = bytearray()
        self.answer(202, location=f"/v2/{repository}/blobs/uploads/{name}?state=x")

    def _serve_upload(self, name: str, query: dict[str, list[str]]) -> None:
        data = self.registry.uploads.get(name)
        if data is None:
            self.answer(404)
            return
        here = self.path.partition("?")[0]
        if self.command == "PATCH":
            for chunk in self._body_chunks():
                data += chunk
            self.answer(202, location=f"{here}?state=y", range=f"0-{len(data) - 1}")
        elif self.command == "GET":
            self.answer(204, location=f"{here}?state=z", range=f"0-{len(data) - 1}")
        elif digest_of(bytes(data)) == query["digest"][0]:
            self.registry.blobs[query["digest"][0]] = bytes(data)
            self.answer(201)
        else:
            self.answer(400, b'{"errors":[{"message":"digest invalid"}]}')

    def _body_chunks(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            chunk = self.rfile.read(min(left, 65536))
            if not chunk:
                return
            left -= len(chunk)
            yield chunk


def refuse_the_world(patch: pytest.MonkeyPatch) -> None:
    """Have every place but loopback be out of reach, as on a host without a network."""
    reach = sockets.open_socket

    def open_socket(host: str, port: int) -> socket.socket:
        if not is_loopback(host):
            raise ContactError("its name can't be resolved")
        return reach(host, port)

    patch.setattr(transport, "open_socket", open_socket)


def clear_environment(patch: Callable[[str], None], set_home: Callable[[str, str], None], home: Path) -> None:
    """Have no credentials and no proxies but the test's own. patch: removes a variable."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_CONFIG_HOME"):
            patch(name)
    set_home("HOME", str(home))
    set_home("XDG_RUNTIME_DIR", str(home / "run"))
