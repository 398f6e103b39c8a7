"""What is bootstrapped, and how: names, the host's apt sources, mmdebstrap's command line. Nothing is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from berth.errors import BerthError, InvalidArgumentError, RegistryError, UnsupportedError
from berth.images import Images
from berth.layout import Layout
from berth.oci import bootstrap
from berth.oci.aptsources import AptSource, read_apt_sources
from berth.oci.bootstrap import Recipe, is_bootstrappable, mmdebstrap_command, parse_recipe, plan_sources
from registries import refuse_the_world
from tars import rootfs

KEY = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEBIAN = [
    AptSource("http://mirror/debian", "bookworm", ("main", "contrib"), KEY),
    AptSource("http://mirror/debian", "bookworm-updates", ("main",), KEY),
    AptSource("http://mirror/debian-security", "bookworm-security", ("main",), KEY),
    AptSource("http://mirror/debian", "bookworm-backports", ("main",), KEY),
    AptSource("http://other/linux/debian", "bookworm", ("stable",), "/etc/apt/keyrings/other.gpg"),
    AptSource("http://third/debian/12/prod", "bookworm", ("main",), "/etc/apt/keyrings/third.gpg"),
    AptSource("http://fourth/deb", "stable", ("main",)),
]
UBUNTU = [
    AptSource("http://mirror/ubuntu/", "noble", ("main", "universe"), "/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
    AptSource("http://mirror/ubuntu/", "noble-security", ("main",), "/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
]


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("debian:12", "debian/bookworm"), ("debian:bookworm", "debian/bookworm"), ("debian:12-slim", "debian/bookworm"),
        ("debian:13", "debian/trixie"), ("debian:trixie-slim", "debian/trixie"), ("debian:sid", "debian/sid"),
        ("debian:unstable", "debian/sid"), ("debian:testing", "debian/testing"), ("debian", "debian/trixie"),
        ("ubuntu:22.04", "ubuntu/jammy"), ("ubuntu:noble", "ubuntu/noble"), ("ubuntu:24.04", "ubuntu/noble"),
        ("debian:12.5", None), ("alpine:3", None), ("me/debian:12", None), ("example.com/debian:12", None),
        ("debian@sha256:" + "0" * 64, None), ("rootfs:/debian", None), ("ubuntu:bookworm", None),
    ],
)  # fmt: skip
def test_which_references_can_be_bootstrapped(reference: str, name: str | None) -> None:
    assert is_bootstrappable(reference) == name


def test_recipes() -> None:
    assert parse_recipe("debian/bookworm") == Recipe("debian", "bookworm")
    assert parse_recipe("debian/unstable").suite == "sid"
    recipe = parse_recipe("debian/trixie?include=git,g++,libc6:i386&init=openrc")
    assert recipe == Recipe("debian", "trixie", "openrc", ("git", "g++", "libc6:i386"))
    assert {"openrc", "sysvinit-core", "sudo", "git"} <= set(recipe.packages)
    assert "systemd-sysv" in Recipe("debian", "bookworm").packages
    assert "systemd-sysv" not in Recipe("debian", "bookworm", "sysvinit").packages


@pytest.mark.parametrize(
    "text",
    ["", "debian", "fedora/40", "debian/", "debian/../x", "debian/bookworm?", "debian/bookworm?x",
     "debian/bookworm?x=1", "debian/bookworm?init=upstart", "debian/bookworm?include=--evil",
     "debian/bookworm?include=a;b", "Debian/bookworm"],
)  # fmt: skip
def test_bad_recipes(text: str) -> None:
    if text == "debian/bookworm?":
        assert parse_recipe(text).suite == "bookworm"
        return
    with pytest.raises(InvalidArgumentError, match="invalid"):
        parse_recipe(text)


def suites(recipe: Recipe, host: list[AptSource], codename: str = "") -> list[str]:
    return [f"{source.uri} {source.suite}" for source in plan_sources(recipe, host, codename)]


def test_the_hosts_archive_with_another_suite() -> None:
    assert suites(Recipe("debian", "trixie"), DEBIAN) == [
        "http://mirror/debian trixie", "http://mirror/debian trixie-updates",
        "http://mirror/debian-security trixie-security",
    ]  # fmt: skip
    assert suites(Recipe("debian", "sid"), DEBIAN) == ["http://mirror/debian sid"]
    assert suites(Recipe("ubuntu", "jammy"), UBUNTU) == [
        "http://mirror/ubuntu/ jammy",
        "http://mirror/ubuntu/ jammy-security",
    ]


def test_a_snapshot_and_a_suite_by_its_role() -> None:
    snapshot = [AptSource("http://s/archive/debian/20250520T000000Z/", "stable", ("main",))]
    assert suites(Recipe("debian", "bookworm"), snapshot) == ["http://s/archive/debian/20250520T000000Z/ bookworm"]


@pytest.mark.parametrize(
    ("distribution", "host"), [("ubuntu", DEBIAN), ("debian", UBUNTU), ("debian", []), ("debian", DEBIAN[4:])]
)
def test_a_host_without_that_archive(distribution: str, host: list[AptSource]) -> None:
    with pytest.raises(UnsupportedError, match=f"no {distribution.capitalize()} mirror") as caught:
        plan_sources(Recipe(distribution, "bookworm" if distribution == "debian" else "noble"), host, "")
    assert caught.value.hint


def test_apt_sources_in_both_formats(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://commented main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://one/debian bookworm main contrib # why\n"
        "deb-src http://one/debian bookworm main\n"
        "deb http://two/debian bookworm main\n"
        "garbage\n"
    )
    (tmp_path / "sources.list.d/a.sources").write_text(
        "Types: deb deb-src\nURIs: http://three/debian http://four/debian\n# a comment\nSuites: sid sid-x\n"
        "Components: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\n \n"
        "Enabled: no\nTypes: deb\nURIs: http://off\nSuites: x\nComponents: main\n\n"
        "Types: deb-src\nURIs: http://source\nSuites: x\n\n"
        "types: deb\nuris: http://five/\nsuites: y\ncomponents: main\nsigned-by: /a.gpg, /b.gpg\n"
    )
    (tmp_path / "sources.list.d/off.sources.disabled").write_text("Types: deb\nURIs: http://no\nSuites: x\n")
    assert [source.line() for source in read_apt_sources(tmp_path)] == [
        "deb [signed-by=/k.gpg] http://one/debian bookworm main contrib",
        "deb http://two/debian bookworm main",
        "deb http://three/debian sid main",
        "deb http://three/debian sid-x main",
        "deb http://four/debian sid main",
        "deb http://four/debian sid-x main",
        "deb [signed-by=/a.gpg] http://five/ y main",
    ]
    assert read_apt_sources(tmp_path / "none") == []


def test_the_command() -> None:
    recipe = Recipe("debian", "trixie", include=("git",))
    host = {"Acquire::http::Proxy": "http://proxy:3142", "Acquire::Check-Valid-Until": "false"}
    argv = mmdebstrap_command(recipe, plan_sources(recipe, DEBIAN, ""), root=False, host_apt=host)
    assert argv[:6] == ["setpriv", "--pdeathsig=TERM", "--", "mmdebstrap", "--mode=unshare", "--variant=minbase"]
    assert argv[-5:] == [
        "trixie", "-", f"deb [signed-by={KEY}] http://mirror/debian trixie main contrib",
        f"deb [signed-by={KEY}] http://mirror/debian trixie-updates main",
        f"deb [signed-by={KEY}] http://mirror/debian-security trixie-security main",
    ]  # fmt: skip
    assert '--aptopt=Acquire::http::Proxy "http://proxy:3142"' in argv
    hook = next(option for option in argv if option.startswith("--customize-hook="))
    assert "proxy" not in hook  # the builder's own: it does not come along
    assert 'Check-Valid-Until "false"' in hook
    as_root = mmdebstrap_command(recipe, [], root=True, host_apt={})
    assert as_root[3:5] == ["unshare", "--mount"]  # its mounts go with it
    assert "--mode=root" in as_root
    bookworm = mmdebstrap_command(Recipe("debian", "bookworm"), [], root=True, host_apt={})
    assert "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr" in bookworm


# With a program in mmdebstrap's place: what comes of its success and of its failures.


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/mmdebstrap"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(bootstrap, "_check_programs", lambda _platform: None)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    monkeypatch.setattr(bootstrap, "read_apt_sources", lambda: DEBIAN)
    monkeypatch.setattr(bootstrap, "_host_apt", dict[str, str])
    (tmp_path / "rootfs.tar").write_bytes(rootfs())
    return program


class Heard:
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def advance(self, done: int, total: int | None) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_the_world(monkeypatch)


def images_at(tmp_path: Path) -> Images:
    return Images(Layout(*(tmp_path / name for name in ("data", "run", "config", "cache"))))


def test_a_distribution_is_bootstrapped_where_its_registry_is_out_of_reach(fake: Path, tmp_path: Path) -> None:
    fake.write_text(f"#!/bin/sh\necho 'I: installing remaining packages...' >&2\ncat {tmp_path}/rootfs.tar\n")
    heard = Heard()
    image = images_at(tmp_path).ensure("debian:12", progress=heard)
    assert image.reference == "docker.io/library/debian:12"
    assert image.annotations["dev.berth.bootstrap"] == "debian/bookworm"
    assert len(heard.notes) == 1
    assert "bootstrapping debian/bookworm from the package mirror instead" in heard.notes[0]
    assert "bootstrapping debian/bookworm: installing remaining packages" in heard.steps
    assert images_at(tmp_path).ensure("bootstrap:debian/bookworm").reference == "bootstrap:debian/bookworm"


def test_what_can_neither_be_pulled_nor_bootstrapped(fake: Path, tmp_path: Path) -> None:
    fake.write_text("#!/bin/sh\nexit 1\n")
    heard = Heard()
    with pytest.raises(
        RegistryError, match=r"can't reach registry docker\.io: .*; nor can it be bootstrapped: .* no Ubuntu mirror"
    ) as caught:
        images_at(tmp_path).ensure("ubuntu:24.04", progress=heard)
    assert caught.value.hint
    assert heard.notes == []


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'I: x...' >&2; echo 'E: no mirror' >&2; echo 'E: late' >&2; exit 25", "failed: no mirror"),
        ("head -c 1000 ROOTFS; echo 'E: half' >&2; exit 1", "failed: half"),
        ("cat ROOTFS; exit 3", "failed with status 3"),
        ("head -c 1000 ROOTFS", "is truncated"),
        ("kill -KILL $$", "signal 9"),
        ("exit 0", "no root file system"),
        ("head -c 5000000 /dev/urandom; exec sleep 600", "is damaged"),
    ],
)
def test_a_bootstrap_that_fails_leaves_nothing(fake: Path, tmp_path: Path, script: str, why: str) -> None:
    fake.write_text("#!/bin/sh\n" + script.replace("ROOTFS", f"{tmp_path}/rootfs.tar") + "\n")
    images = images_at(tmp_path)
    with pytest.raises(BerthError, match=why):
        images.ensure("bootstrap:debian/trixie")
    assert images.list() == []
    assert images.size() == 0
    assert os.listdir(tmp_path / "data/images/ingest") == []
