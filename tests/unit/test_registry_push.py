"""Pushing to a registry in this process: nothing is sent twice, and broken uploads are gone on with."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from berth.errors import InvalidArgumentError, NotFoundError, RegistryError
from berth.images import Images
from berth.layout import Layout
from berth.oci.registry import push, transport
from registries import Exchange, FakeRegistry, clear_environment

BIG = 300_000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clear_environment(monkeypatch.delenv, monkeypatch.setenv, tmp_path / "home")
    monkeypatch.setattr(transport, "_BACK_OFF_S", 0.01)
    monkeypatch.setattr(push, "_PIECE", 100_000)


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(Layout(*(tmp_path / name for name in ("data", "run", "config", "cache"))))


@pytest.fixture
def image(images: Images) -> Generator[str]:
    """An image in the store that came from another registry: one large layer and an empty one."""
    with FakeRegistry().serving() as origin:
        origin.put_image("base:1", os.urandom(BIG), b"")
        yield images.ensure(f"{origin.host}/base:1").reference


def patches(registry: FakeRegistry) -> list[str]:
    return [seen.content_range for seen in registry.seen if seen.method == "PATCH"]


def test_an_image_is_pushed_and_is_the_same(registry: FakeRegistry, images: Images, image: str) -> None:
    name = f"{registry.host}/team/dev:2"
    assert images.push(image, name) == name
    digest = images.find(image).digest
    assert registry.manifests["team/dev/2"][1] == images._store.read(images._descriptor(images.find(image)))
    assert patches(registry) == [""] * 3
    registry.manifests[f"team/dev/{digest}"] = registry.manifests["team/dev/2"]
    assert images.pull(name).digest == digest
    registry.seen.clear()
    images.push(name)
    assert patches(registry) == []
    assert len(registry.paths("HEAD")) == 3


def test_what_another_repository_has_is_mounted(registry: FakeRegistry, images: Images, image: str) -> None:
    images.push(image, f"{registry.host}/base:1")
    images.pull(f"{registry.host}/base:1")
    registry.behaviours.append(lambda exchange: exchange.command == "HEAD" and exchange.answer(404))
    registry.seen.clear()
    images.push(image, f"{registry.host}/team/dev:1")
    mounts = [path for path in registry.paths("POST") if "mount=" in path]
    assert len(mounts) == 2  # the layers; the config is sent
    assert all(path.endswith("&from=base") for path in mounts)
    assert len(patches(registry)) == 1


def test_a_registry_that_mounts_nothing(registry: FakeRegistry, images: Images, image: str) -> None:
    images.push(image, f"{registry.host}/base:1")
    images.pull(f"{registry.host}/base:1")
    registry.behaviours.append(lambda exchange: exchange.command == "HEAD" and exchange.answer(404))
    registry.behaviours.append(lambda exchange: "mount=" in exchange.path and exchange.answer(403))
    images.push(image, f"{registry.host}/team/dev:1")
    assert "team/dev/1" in registry.manifests


@pytest.mark.parametrize("known", [True, False])
def test_a_broken_upload_is_gone_on_with(registry: FakeRegistry, images: Images, image: str, known: bool) -> None:
    broken: list[int] = []

    def cut(exchange: Exchange) -> bool:
        if exchange.command == "GET" and "/uploads/" in exchange.path and not known:
            return exchange.answer(404)
        if exchange.command != "PATCH" or len(broken) == 2 or int(exchange.headers["Content-Length"]) < 100_000:
            return False
        broken.append(len(exchange.rfile.read(50_000)))
        name = exchange.path.partition("?")[0].rpartition("/")[2]
        registry.uploads[name] += os.urandom(0) if not known else _first(images, image, registry, name, 50_000)
        return exchange.hang_up()

    registry.behaviours.append(cut)
    images.push(image, f"{registry.host}/dev:1")
    assert len(broken) == 2
    assert "dev/1" in registry.manifests
    assert any(said.endswith("-299999") for said in patches(registry))


def _first(images: Images, image: str, registry: FakeRegistry, name: str, count: int) -> bytes:
    """What the registry has kept of the large layer after another `count` bytes."""
    with images.opened_layers(images.find(image)) as layers:
        return os.pread(layers[0][0], count, len(registry.uploads[name]))


def test_a_body_that_is_too_large_is_sent_in_pieces(registry: FakeRegistry, images: Images, image: str) -> None:
    registry.behaviours.append(
        lambda exchange: (
            exchange.command == "PATCH"
            and int(exchange.headers["Content-Length"]) > 120_000
            and bool(exchange.body())
            and exchange.answer(413)
        )
    )
    images.push(image, f"{registry.host}/dev:1")
    assert [said for said in patches(registry) if said] == ["0-99999", "100000-199999", "200000-299999"]


@pytest.mark.parametrize("status", [400, 403, 405])
def test_refusals(registry: FakeRegistry, images: Images, image: str, status: int) -> None:
    registry.behaviours.append(
        lambda exchange: exchange.command != "HEAD" and bool([exchange.body()]) and exchange.answer(status)
    )
    with pytest.raises(RegistryError, match=f"registry {registry.host}") as caught:
        images.push(image, f"{registry.host}/dev:1")
    assert (caught.value.hint == f"berth login {registry.host}") == (status == 403)


def test_what_can_not_be_pushed(images: Images, image: str) -> None:
    with pytest.raises(NotFoundError):
        images.push("nothing:1")
    with pytest.raises(InvalidArgumentError):
        images.push(image, "oci:/tmp/x")
