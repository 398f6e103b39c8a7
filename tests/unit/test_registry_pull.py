"""Pulling from a registry in this process, a good one and hostile ones: everything is refused within bounds."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import pytest

from berth import proc
from berth.errors import BerthError, ImageFormatError, NotFoundError, RegistryError
from berth.images import Images
from berth.layout import Layout
from berth.oci import spec
from berth.oci.digest import Digest, digest_of
from berth.oci.registry import pull, sockets, transport
from berth.oci.spec import Descriptor
from registries import Exchange, FakeRegistry, clear_environment, make_certificate
from tars import rootfs

MIB = 1024 * 1024
T = TypeVar("T")


class Heard:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []
        self.advances: list[tuple[int, int | None]] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def advance(self, done: int, total: int | None) -> None:
        self.advances.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clear_environment(monkeypatch.delenv, monkeypatch.setenv, tmp_path / "home")
    monkeypatch.setattr(transport, "_BACK_OFF_S", 0.01)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(*(tmp_path / name for name in ("data", "run", "config", "cache")))


@pytest.fixture
def images(layout: Layout) -> Images:
    return Images(layout)


def left_in(layout: Layout) -> list[str]:
    """What imports have left behind."""
    return os.listdir(layout.images / "ingest")


# What works


@pytest.mark.parametrize("docker", [False, True])
def test_an_image_is_pulled_as_it_is(registry: FakeRegistry, images: Images, docker: bool) -> None:
    layers = [rootfs(), os.urandom(300_000), b""]
    put = registry.put_image("team/dev:1", *layers, docker=docker)
    heard = Heard()
    image = images.ensure(f"{registry.host}/team/dev:1", progress=heard)
    assert (image.digest, image.problem) == (put.digest, "")
    assert image.reference == f"{registry.host}/team/dev:1"
    assert heard.advances[-1] == (sum(map(len, layers)), sum(map(len, layers)))
    with images.opened_layers(image) as opened:
        assert [os.pread(fd, MIB, 0) for fd, _ in opened] == layers
    assert images.ensure(f"{registry.host}/team/dev@{put.digest}").digest == put.digest


def test_what_the_store_has_is_not_fetched_again(registry: FakeRegistry, images: Images) -> None:
    shared = os.urandom(100_000)
    registry.put_image("dev:1", shared)
    registry.put_image("dev:2", shared, b"new", b"new")
    images.ensure(f"{registry.host}/dev:1")
    registry.seen.clear()
    heard = Heard()
    images.ensure(f"{registry.host}/dev:2", progress=heard)
    layers = [path for path in registry.paths() if "/blobs/" in path]
    assert len(layers) == 2  # the config, and one new layer: two of the same are one
    assert heard.steps[-1].endswith("1 of its 3 layers are here already")
    assert heard.advances[-1] == (3, 3)
    registry.seen.clear()
    images.ensure(f"{registry.host}/dev:2")
    assert registry.seen == []


def test_pull_asks_what_the_name_means_now(registry: FakeRegistry, images: Images) -> None:
    name = f"{registry.host}/dev:1"
    registry.put_image("dev:1", b"old")
    first = images.pull(name)
    assert images.pull(name).digest == first.digest
    registry.put_image("dev:1", b"new")
    assert images.ensure(name).digest == first.digest
    assert images.pull(name).digest != first.digest
    registry.behaviours.append(lambda exchange: exchange.answer(403))
    heard = Heard()
    assert images.pull(name, progress=heard).digest != first.digest
    assert "stays as it is in the store" in heard.notes[0]


def test_the_platform_is_chosen_from_an_index(registry: FakeRegistry, images: Images) -> None:
    found = {name: registry.put_image(f"dev:{name}", name.encode(), architecture=name) for name in ("amd64", "arm64")}
    entries = [{**item.to_json(), "platform": {"os": "linux", "architecture": name}} for name, item in found.items()]
    inner = registry.put_index("dev:inner", *entries)
    registry.put_index("dev:latest", inner.to_json())
    arm = images.ensure(f"{registry.host}/dev", platform="linux/arm64")
    assert (arm.digest, arm.platform) == (found["arm64"].digest, "linux/arm64")
    registry.put_index("dev:arm", entries[1])
    with pytest.raises(NotFoundError, match="no image for linux/amd64") as caught:
        images.ensure(f"{registry.host}/dev:arm", platform="linux/amd64")
    assert caught.value.hint == "it has linux/arm64"


def test_three_layers_at_once(registry: FakeRegistry, images: Images, layout: Layout) -> None:
    def linger(exchange: Exchange) -> bool:
        if "/blobs/" in exchange.path:
            with exchange.registry.counted():
                time.sleep(0.05)
        return False

    registry.behaviours.append(linger)
    registry.put_image("dev:1", *(bytes([number]) for number in range(9)))
    images.ensure(f"{registry.host}/dev:1")
    assert registry.at_once == 3
    layout.config.mkdir()
    layout.registries.write_text("parallel-layers = 1\n")
    registry.at_once = 0
    registry.put_image("dev:2", *(bytes([number]) for number in range(20, 24)))
    images.ensure(f"{registry.host}/dev:2")
    assert registry.at_once == 1


class Arrivals:
    """Remembers what a pull tells, and reads each layer at once."""

    def __init__(self) -> None:
        self.expected: list[tuple[str, list[str]]] = []
        self.came: list[bytes] = []

    def expect(self, image: Digest, layers: Sequence[Descriptor]) -> None:
        self.expected.append((image, [layer.digest for layer in layers]))

    def arrived(self, blob: Digest, open_blob: Callable[[Digest], int]) -> None:
        with open(open_blob(blob), "rb") as file:
            self.came.append(file.read())


def test_layers_are_told_of_when_they_are_whole(registry: FakeRegistry, images: Images, layout: Layout) -> None:
    layout.config.mkdir()
    layout.registries.write_text("parallel-layers = 1\n")
    layers = [b"1" * 50, b"2" * 10, b"3" * 90, b"4" * 70]
    registry.put_image("dev:0", b"elsewhere", b"2" * 10)
    images.ensure(f"{registry.host}/dev:0")
    put = registry.put_image("dev:1", *layers, layers[0])
    arrivals = Arrivals()
    images.ensure(f"{registry.host}/dev:1", arrivals=arrivals)
    assert arrivals.expected == [(put.digest, [digest_of(layer) for layer in (*layers, layers[0])])]
    # What is in the store, the largest, and then the lowest first.
    assert arrivals.came == [layers[1], layers[2], layers[0], layers[3]]


def test_a_damaged_layer_is_not_told_of(registry: FakeRegistry, images: Images) -> None:
    registry.put_image("dev:1", b"good", b"bad")
    registry.blobs[digest_of(b"bad")] = b"dab"
    arrivals = Arrivals()
    with pytest.raises(ImageFormatError, match="is damaged"):
        images.ensure(f"{registry.host}/dev:1", arrivals=arrivals)
    assert b"dab" not in arrivals.came


# Broken connections


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_gone_on_with(registry: FakeRegistry, images: Images, ranges: bool) -> None:
    layer = os.urandom(500_000)
    put = registry.put_image("dev:1", layer)
    broken: list[str] = []

    def cut(exchange: Exchange) -> bool:
        if "/blobs/" not in exchange.path or exchange.path.endswith(put.digest):
            return False
        data = registry.blobs[exchange.path.rpartition("/")[2]]
        if data == layer and len(broken) < 3:
            broken.append(exchange.headers.get("Range", ""))
            start = int(broken[-1][6:-1] or 0) if ranges else 0
            exchange.send_response(206 if start else 200)
            exchange.send_header("Content-Length", str(len(data) - start))
            if start:
                exchange.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            exchange.end_headers()
            exchange.wfile.write(data[start : start + 100_000])
            exchange.wfile.flush()
            return exchange.hang_up()
        return not ranges and data == layer and exchange.answer(200, data)

    registry.behaviours.append(cut)
    heard = Heard()
    image = images.ensure(f"{registry.host}/dev:1", progress=heard)
    assert image.problem == ""
    assert len(broken) == 3
    assert broken[1].startswith("bytes=")
    assert heard.advances[-1] == (500_000, 500_000)  # no byte is counted twice


def test_retry_after_is_honoured(registry: FakeRegistry, images: Images) -> None:
    registry.put_image("dev:1", b"x")
    refused: list[float] = []

    def busy(exchange: Exchange) -> bool:
        if len(refused) == 2:
            return False
        refused.append(time.monotonic())
        return exchange.answer(429 if len(refused) == 1 else 503, retry_after="1" if len(refused) == 1 else "nonsense")

    registry.behaviours.append(busy)
    began = time.monotonic()
    images.ensure(f"{registry.host}/dev:1")
    assert 1.0 <= time.monotonic() - began < 5


def test_who_asks_to_wait_for_long_is_not_waited_for(registry: FakeRegistry, images: Images) -> None:
    registry.behaviours.append(lambda exchange: exchange.answer(429, retry_after="86400"))
    with pytest.raises(RegistryError, match="allows no more requests for now"):
        images.ensure(f"{registry.host}/dev:1")
    assert len(registry.seen) == 1


def test_a_registry_that_fails_is_given_up(registry: FakeRegistry, images: Images) -> None:
    registry.behaviours.append(
        lambda exchange: exchange.answer(500, b'{"errors":[{"code":"X","message":"no\\nluck\\u001b[2J"}]}')
    )
    with pytest.raises(RegistryError, match=rf"registry {registry.host} answered 500 for image .*: no luck"):
        images.ensure(f"{registry.host}/dev:1")
    assert len(registry.seen) == 5


def test_what_is_not_there(registry: FakeRegistry, images: Images) -> None:
    with pytest.raises(NotFoundError, match=f"image '{registry.host}/dev:1' not found in registry {registry.host}"):
        images.ensure(f"{registry.host}/dev:1")


def test_nobody_there_is_known_at_once(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it a port that nobody listens at, a name server that is silent, or addresses that swallow all."""
    monkeypatch.setattr(sockets, "CONNECT_S", 0.5)
    began = time.monotonic()
    with pytest.raises(RegistryError, match=r"can't reach registry 127\.0\.0\.1:1: connection refused"):
        images.ensure("127.0.0.1:1/dev:1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **_options: _wait(1.5, []))
    with pytest.raises(RegistryError, match=r"can't reach registry silent\.test: its name can't be resolved"):
        images.ensure("silent.test/dev:1")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        address = deaf.getsockname()
        # Its queue is full: the kernel drops what else comes.
        waiting = [_begin_to_connect(address) for _ in range(3)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)] * 12
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **_options: found)
        with pytest.raises(RegistryError, match=r"can't reach registry deaf\.test:\d+: no answer in time"):
            images.ensure(f"deaf.test:{address[1]}/dev:1")
        for sock in waiting:
            sock.close()
    assert time.monotonic() - began < 3


def _wait(seconds: float, found: T) -> T:
    time.sleep(seconds)
    return found


def _begin_to_connect(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    sock.connect_ex(address)
    return sock


# Mirrors


def mirrored(layout: Layout, registry: FakeRegistry, *mirrors: str) -> None:
    layout.config.mkdir()
    listed = ", ".join(f'"{mirror}"' for mirror in mirrors)
    layout.registries.write_text(f'[registry."{registry.host}"]\nmirrors = [{listed}]\n')


def test_mirrors_go_first_and_fail_without_harm(registry: FakeRegistry, images: Images, layout: Layout) -> None:
    good, bad = os.urandom(50_000), os.urandom(50_000)
    put = registry.put_image("team/dev:1", good, bad)
    with FakeRegistry().serving() as mirror, FakeRegistry().serving() as empty:
        mirror.put_image("cache/team/dev:1", good, bad)
        mirror.blobs = {key: data if data != bad else b"x" * len(bad) for key, data in mirror.blobs.items()}
        mirrored(layout, registry, "127.0.0.1:1", empty.host, f"{mirror.host}/cache")
        image = images.ensure(f"{registry.host}/team/dev:1")
        assert (image.digest, image.problem) == (put.digest, "")
        assert len(empty.seen) == 1
        assert len(registry.paths()) == 1  # the layer that is damaged at the mirror
        assert all(path.startswith("/v2/cache/team/dev/") for path in mirror.paths())


def test_the_registry_has_the_last_word(registry: FakeRegistry, images: Images, layout: Layout) -> None:
    with FakeRegistry().serving() as mirror:
        mirrored(layout, registry, mirror.host)
        with pytest.raises(NotFoundError, match=f"not found in registry {registry.host}"):
            images.ensure(f"{registry.host}/dev:1")


# Redirects


def test_a_redirect_takes_no_authorization_elsewhere(registry: FakeRegistry, images: Images) -> None:
    registry.put_image("dev:1", b"x" * 1000)
    with FakeRegistry().serving() as storage:
        storage.blobs = registry.blobs

        def redirect(exchange: Exchange) -> bool:
            if not exchange.headers.get("Authorization"):
                return exchange.answer(401, www_authenticate='Basic realm="x"')
            return "/blobs/" in exchange.path and exchange.answer(
                307, location=f"http://{storage.host}{exchange.path}?signature=1"
            )

        registry.behaviours.append(redirect)
        _log_in(registry)
        images.ensure(f"{registry.host}/dev:1")
        assert storage.seen
        assert not any(seen.authorization for seen in storage.seen)


def _log_in(registry: FakeRegistry) -> None:
    folder = Path(os.environ["HOME"]) / ".docker"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"auths": {{"{registry.host}": {{"auth": "dTpw"}}}}}}')  # u:p


def test_redirects_have_an_end(registry: FakeRegistry, images: Images) -> None:
    registry.behaviours.append(lambda exchange: exchange.answer(302, location=f"{exchange.path}/x"))
    with pytest.raises(RegistryError, match="redirects more than 5 times"):
        images.ensure(f"{registry.host}/dev:1")


@pytest.mark.parametrize("target", ["ftp://x/", "http://u:p@h/", "http://[x/", "http://h:99999/", "http://a b/"])
def test_redirects_to_nonsense(registry: FakeRegistry, images: Images, target: str) -> None:
    registry.behaviours.append(lambda exchange: exchange.answer(302, location=target))
    with pytest.raises(RegistryError):
        images.ensure(f"{registry.host}/dev:1")


# Hostile registries


def blob_answer(registry: FakeRegistry, size: int, **headers: str) -> None:
    """Have every blob of that size answered with other bytes, or other headers."""

    def behave(exchange: Exchange) -> bool:
        data = registry.blobs.get(exchange.path.rpartition("/")[2], b"")
        if len(data) != size:
            return False
        sent = {"x": b"x" * size, "longer": data + b"x", "short": data[:-1]}.get(headers.get("kind", "x"), data)
        return exchange.answer(200, sent, **{key: value for key, value in headers.items() if key != "kind"})

    registry.behaviours.append(behave)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"kind": "x"}, "is damaged: its digest is"),
        ({"kind": "longer"}, "has 5001 bytes there, not 5000"),
        ({"kind": "short"}, "has 4999 bytes there, not 5000"),
        ({"kind": "short", "content_length": "5000", "connection": "close"}, "broke after 4999 of 5000 bytes"),
        ({"kind": "longer", "content_length": "nonsense", "connection": "close"}, "is longer than 5000 bytes"),
    ],
)
def test_wrong_blobs(
    registry: FakeRegistry, images: Images, layout: Layout, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(transport, "SILENCE_S", 1.0)
    registry.put_image("dev:1", os.urandom(5000), os.urandom(100))
    blob_answer(registry, 5000, **headers)
    with pytest.raises(BerthError, match=message):
        images.ensure(f"{registry.host}/dev:1")
    assert images.list() == []
    assert left_in(layout) == []


def test_another_part_than_asked_for(registry: FakeRegistry, images: Images) -> None:
    registry.put_image("dev:1", b"x" * 5000)
    registry.behaviours.append(
        lambda exchange: (
            "/blobs/" in exchange.path
            and len(registry.blobs[exchange.path.rpartition("/")[2]]) == 5000
            and exchange.answer(206, b"x" * 5000, content_range="bytes 7-5006/9999")
        )
    )
    with pytest.raises(RegistryError, match="sends another part"):
        images.ensure(f"{registry.host}/dev:1")


@pytest.mark.parametrize("announced", [True, False])
def test_a_manifest_of_100_megabytes(registry: FakeRegistry, images: Images, announced: bool) -> None:
    sent: list[int] = []

    def flood(exchange: Exchange) -> bool:
        exchange.send_response(200)
        exchange.send_header("Content-Type", spec.MANIFEST)
        exchange.send_header("Content-Length" if announced else "X-Nothing", str(100 * MIB))
        exchange.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(100):
                exchange.wfile.write(b" " * MIB)
                sent.append(MIB)
        return exchange.hang_up()

    registry.behaviours.append(flood)
    tracemalloc.start()
    try:
        with pytest.raises(RegistryError, match="document of"):
            images.ensure(f"{registry.host}/dev:1")
        assert tracemalloc.get_traced_memory()[1] < 24 * MIB
    finally:
        tracemalloc.stop()
    assert sum(sent) < 60 * MIB


def test_slow_drips_are_cut_off(registry: FakeRegistry, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SILENCE_S", 0.4)
    monkeypatch.setattr(pull, "_BREAKS_MAX", 2)
    registry.put_image("dev:1", b"x" * 100_000)

    def drip(exchange: Exchange) -> bool:
        if "/blobs/" not in exchange.path or len(registry.blobs[exchange.path.rpartition("/")[2]]) != 100_000:
            return False
        exchange.send_response(200)
        exchange.send_header("Content-Length", "100000")
        exchange.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(200):
                exchange.wfile.write(b"x")
                exchange.wfile.flush()
                time.sleep(0.05)
        return exchange.hang_up()

    registry.behaviours.append(drip)
    began = time.monotonic()
    with pytest.raises(RegistryError, match=r"broke after \d+ of 100000 bytes .*too slow"):
        images.ensure(f"{registry.host}/dev:1")
    assert time.monotonic() - began < 4


def test_headers_that_drip_are_cut_off(registry: FakeRegistry, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "DOCUMENT_S", 0.3)
    monkeypatch.setattr(transport, "_ATTEMPTS", 2)

    def drip(exchange: Exchange) -> bool:
        with contextlib.suppress(OSError):
            for _ in range(100):
                exchange.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                time.sleep(0.05)
        return exchange.hang_up()

    registry.behaviours.append(drip)
    began = time.monotonic()
    with pytest.raises(RegistryError, match="no answer in time"):
        images.ensure(f"{registry.host}/dev:1")
    assert time.monotonic() - began < 4


def test_an_index_in_a_loop(registry: FakeRegistry, images: Images) -> None:
    """A digest can't name itself; a registry can serve a new index for ever, or claim that it is one."""
    put = registry.put_image("dev:none", b"x", architecture="riscv64")
    for depth in range(8):
        put = registry.put_index(f"dev:{depth}", put.to_json())
    with pytest.raises(ImageFormatError, match="nested deeper than 4"):
        images.ensure(f"{registry.host}/dev:7")
    many = [registry.put_index(f"dev:m{number}").to_json() for number in range(200)]
    registry.put_index("dev:wide", *many)
    registry.seen.clear()
    with pytest.raises((ImageFormatError, NotFoundError)):
        images.ensure(f"{registry.host}/dev:wide")
    assert len(registry.seen) < 100


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
        ({"schemaVersion": 2, "manifests": [], "layers": [], "config": {}}, "an index and a manifest at once"),
        ({"schemaVersion": 2, "config": {}, "layers": []}, "not an OCI descriptor"),
        ([], "is no image but text/html"),
    ],
)
def test_documents_that_are_none(registry: FakeRegistry, images: Images, document: object, message: str) -> None:
    data = spec.encode_json(cast("dict[str, object]", document)) if document else b"[]"
    kind = spec.MANIFEST if document else "text/html"
    registry.behaviours.append(lambda exchange: exchange.answer(200, data, content_type=kind))
    with pytest.raises(ImageFormatError, match=message):
        images.ensure(f"{registry.host}/dev:1")


def test_a_manifest_with_another_digest(registry: FakeRegistry, images: Images) -> None:
    put = registry.put_image("dev:1", b"x")
    other = registry.put_image("dev:2", b"y")
    registry.manifests[f"dev/{put.digest}"] = registry.manifests[f"dev/{other.digest}"]
    with pytest.raises(ImageFormatError, match="is damaged: its digest is"):
        images.ensure(f"{registry.host}/dev@{put.digest}")


def test_more_than_the_disk_has(registry: FakeRegistry, images: Images, layout: Layout) -> None:
    config = b'{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["sha256:' + b"0" * 64 + b'"]}}'
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "config": {**registry.put_blob(config).to_json(), "mediaType": spec.CONFIG},
        "layers": [{"mediaType": spec.LAYER, "digest": "sha256:" + "1" * 64, "size": 10**17}],
    }
    registry.put_document("dev:1", manifest, spec.MANIFEST)
    with pytest.raises(BerthError, match=r"it takes 9\d*T, and there are"):
        images.ensure(f"{registry.host}/dev:1")
    assert left_in(layout) == []


def test_what_is_no_http(images: Images) -> None:
    with FakeRegistry().serving() as registry:
        registry.behaviours.append(lambda exchange: bool(exchange.wfile.write(b"SSH-2.0-x\r\n")) and exchange.hang_up())
        with pytest.raises(RegistryError, match="does not speak HTTP"):
            images.ensure(f"{registry.host}/dev:1")


def test_an_interrupted_pull_ends_at_once(registry: FakeRegistry, images: Images, layout: Layout) -> None:
    """Ctrl-C arrives in the thread that shows the progress."""
    registry.put_image("dev:1", b"x" * 1000, b"y" * 1000)

    class Interrupted(Heard):
        def advance(self, done: int, total: int | None) -> None:
            super().advance(done, total)
            raise KeyboardInterrupt

    over = threading.Event()
    registry.behaviours.append(
        lambda exchange: (
            "/blobs/" in exchange.path
            and len(registry.blobs[exchange.path.rpartition("/")[2]]) == 1000
            and not over.wait(30)
        )
    )
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        images.ensure(f"{registry.host}/dev:1", progress=Interrupted())
    took = time.monotonic() - began
    over.set()
    assert took < 20, "it waited for the layers"
    assert left_in(layout) == []


# Proxies


def serve_proxy(server: socket.socket, target: tuple[str, int], heads: list[bytes]) -> None:
    """Be an HTTP proxy for one connection, which leads to `target` whatever is asked for."""
    client, _ = server.accept()
    with client:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        heads.append(head)
        with socket.create_connection(target) as far:
            client.sendall(b"HTTP/1.1 200 Connection established\r\nX-Proxy: tests\r\n\r\n")
            back = threading.Thread(target=relay, args=(far, client))
            back.start()
            relay(client, far)
            back.join()


def relay(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def test_a_proxy_and_an_own_ca(images: Images, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if proc.find_program("openssl") is None:
        pytest.skip("needs openssl")
    certificate, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    layout.config.mkdir()
    layout.registries.write_text(f'parallel-layers = 1\n[registry."registry.test"]\nca = "{certificate}"\n')
    heads: list[bytes] = []
    with FakeRegistry().serving(context) as registry, socket.socket() as server:
        registry.put_image("dev:1", b"x")
        server.bind(("127.0.0.1", 0))
        server.listen()
        host, _, port = registry.host.partition(":")
        proxy = threading.Thread(target=serve_proxy, args=(server, (host, int(port)), heads))
        proxy.start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:pa%40ss@127.0.0.1:{server.getsockname()[1]}")
        assert images.ensure("registry.test/dev:1").problem == ""
        proxy.join()
    lines = heads[0].decode().split("\r\n")
    assert lines[0] == "CONNECT registry.test:443 HTTP/1.1"
    assert "Proxy-Authorization: Basic bWU6cGFAc3M=" in lines
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(RegistryError, match="a proxy of the kind 'socks5'"):
        images.ensure("registry.test/dev:2")
