"""Registries against the world: Debian's docker-registry on loopback, skopeo and umoci as other writers and readers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from berth import proc
from berth.errors import RegistryError
from berth.images import Images
from berth.layout import Layout
from berth.oci.registry.login import login, logout
from person import Person
from registries import PASSWORD, USER, Served, clear_environment, docker_registry
from support import need
from tars import rootfs


@pytest.fixture(autouse=True)
def _needs(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    if proc.find_program("docker-registry") is None:
        pytest.skip("needs docker-registry")
    clear_environment(monkeypatch.delenv, monkeypatch.setenv, scratch / "home")


@pytest.fixture
def registry(scratch: Path) -> Generator[Served]:
    with docker_registry(scratch / "registry") as served:
        yield served


@pytest.fixture
def images(layout: Layout) -> Images:
    return Images(layout)


@pytest.fixture
def image(images: Images, scratch: Path) -> str:
    """An image in the store, of a small root file system."""
    (scratch / "r.tar").write_bytes(rootfs())
    return images.import_(scratch / "r.tar", "base:1").reference


def skopeo(*argv: str) -> bytes:
    need("skopeo")
    return proc.run(["skopeo", "--insecure-policy", *argv]).stdout


def elsewhere(scratch: Path) -> Images:
    """The images of a store that has nothing yet."""
    return Images(Layout(*(scratch / "elsewhere" / name for name in ("data", "run", "config", "cache"))))


def test_there_and_back(registry: Served, images: Images, image: str, scratch: Path) -> None:
    for name in (f"{registry.host}/team/dev:1", f"{registry.host}/other/dev:2"):  # the second is mounted
        assert images.push(image, name) == name
    other = elsewhere(scratch)
    assert other.pull(f"{registry.host}/other/dev:2").digest == images.find(image).digest
    digest = other.find(f"{registry.host}/other/dev:2").digest
    assert other.ensure(f"{registry.host}/team/dev@{digest}").problem == ""


@pytest.mark.parametrize("form", ["oci", "v2s2"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_what_skopeo_pushes_berth_pulls(
    registry: Served, images: Images, image: str, layout: Layout, scratch: Path, form: str, compression: str
) -> None:
    if (form, compression) == ("v2s2", "zstd"):
        pytest.skip("docker's manifests have no zstd with skopeo")
    skopeo(
        "copy", "--dest-tls-verify=false", "--dest-compress", f"--dest-compress-format={compression}", "--format", form,
        f"oci:{layout.images}:{image}", f"docker://{registry.host}/{form}/{compression}:1",
    )  # fmt: skip
    pulled = elsewhere(scratch).pull(f"{registry.host}/{form}/{compression}:1")
    assert (pulled.problem, pulled.platform) == ("", images.find(image).platform)
    shown = skopeo("inspect", "--tls-verify=false", f"docker://{registry.host}/{form}/{compression}:1")
    assert json.loads(shown)["Digest"] == pulled.digest


def test_what_berth_pushes_skopeo_copies_and_umoci_unpacks(
    registry: Served, images: Images, image: str, scratch: Path
) -> None:
    images.push(image, f"{registry.host}/team/dev:1")
    skopeo(
        "copy",
        "--all",
        "--preserve-digests",
        "--src-tls-verify=false",
        f"docker://{registry.host}/team/dev:1",
        f"oci:{scratch}/copy:x",
    )
    assert images.ensure(f"oci:{scratch}/copy:x").digest == images.find(image).digest
    if os.geteuid() == 0 and proc.find_program("umoci"):
        proc.run(["umoci", "unpack", "--image", f"{scratch}/copy:x", f"{scratch}/bundle"])
        assert (scratch / "bundle/rootfs").is_dir()


def test_tls_and_login(images: Images, image: str, layout: Layout, scratch: Path) -> None:
    with docker_registry(scratch / "secure", tls=True, login=True) as served:
        name = f"{served.host}/team/dev:1"
        with pytest.raises(RegistryError, match="its certificate is not trusted") as caught:
            images.push(image, name)
        assert "ca =" in (caught.value.hint or "")
        layout.config.mkdir()
        layout.registries.write_text(f'[registry."{served.host}"]\nca = "{served.authority}"\n')
        with pytest.raises(RegistryError, match="denies access") as caught:
            images.push(image, name)
        assert caught.value.hint == f"berth login {served.host}"
        with pytest.raises(RegistryError, match="denies access"):
            login(served.host, USER, "wrong", registries=layout.registries)
        place = login(served.host, USER, PASSWORD, registries=layout.registries)
        images.push(image, name)
        assert images.pull(name).digest == images.find(image).digest
        # Another program takes the same file for its own.
        skopeo("inspect", f"--authfile={place}", "--tls-verify=false", f"docker://{name}")
        assert logout(served.host) == [place]
        with pytest.raises(RegistryError, match="denies access"):
            images.push(image, name)
        layout.registries.write_text(f'[registry."{served.host}"]\ninsecure = true\n')
        with pytest.raises(RegistryError, match="denies access"):
            images.push(image, name)


def test_what_skopeo_logs_in_to_berth_is_logged_in_to(images: Images, image: str, scratch: Path) -> None:
    with docker_registry(scratch / "locked", login=True) as served:
        auth = Path(os.environ["HOME"]) / ".config/containers/auth.json"
        auth.parent.mkdir(parents=True)
        skopeo("login", f"--authfile={auth}", "--tls-verify=false", "-u", USER, "-p", PASSWORD, served.host)
        images.push(image, f"{served.host}/dev:1")


def test_a_mirror_that_is_a_cache(registry: Served, images: Images, image: str, scratch: Path) -> None:
    images.push(image, f"{registry.host}/team/dev:1")
    with docker_registry(scratch / "cache", proxied=f"http://{registry.host}") as cache:
        other = elsewhere(scratch)
        config = scratch / "elsewhere/config"
        config.mkdir(parents=True)
        (config / "registries.toml").write_text(f'[registry."{registry.host}"]\nmirrors = ["{cache.host}"]\n')
        assert other.pull(f"{registry.host}/team/dev:1").digest == images.find(image).digest
        assert any((scratch / "cache/store").rglob("data"))


def test_several_processes_pull_and_clean_up_at_once(
    registry: Served, images: Images, image: str, person: Person
) -> None:
    """Collection runs while pulls of the same layers do: each pull ends with a whole image."""
    if person.isolation != "container":
        pytest.skip("images are the same for all machines")
    for number in range(3):
        images.push(image, f"{registry.host}/dev:{number}")
    script = (
        "from berth.images import Images; from berth.layout import Layout; import sys\n"
        "images = Images(Layout.from_environment())\n"
        "for _ in range(15):\n"
        "    if sys.argv[1] == 'prune': images.prune(dict, unused=True)\n"
        f"    else: assert images.pull('{registry.host}/dev:' + sys.argv[1]).reference\n"
    )
    workers = [
        subprocess.Popen(person.command([*person.python, "-c", script, word], {}, None), stderr=subprocess.PIPE)
        for word in ("0", "1", "2", "prune", "prune")
    ]
    said = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 5, said


def test_a_machine_from_a_registry(registry: Served, images: Images, alpine_tar: Path, person: Person) -> None:
    stored = images.import_(alpine_tar, "alpine:3")
    name = images.push(stored.reference, f"{registry.host}/team/alpine:3")
    made = person.berth("create", name, "--name", "from-registry")
    assert made.strip() == "from-registry"
    assert person.berth("run", "-n", "from-registry", "--", "cat", "/etc/alpine-release").strip() == "3.20.3"
    person.berth("rm", "--force", "from-registry")
    person.berth("image", "rm", name)
