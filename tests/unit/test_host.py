"""Facts of the host: parsers on real text, and the facts of this very host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth import agentbinary, host
from berth.errors import UnsupportedError
from berth.layout import Layout


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("crun version 1.8.1\ncommit: f8a096be", "1.8.1"),
        ("nftables v1.0.6 (Lester Gooch #5)", "1.0.6"),
        ("Dnsmasq version 2.90  Copyright (c) 2000-2024 Simon Kelley", "2.90"),
        ("pasta unknown version\nCopyright Red Hat\nGNU GPL version 3", None),
        ("pasta 0.0~git20240220.1e6f92b", "0.0~git20240220.1e6f92b"),
        ("ip utility, iproute2-6.1.0, libbpf 1.1.0", "6.1.0"),
        ("QEMU emulator version 7.2.19 (Debian 1:7.2+dfsg-7+deb12u16)", "7.2.19"),
        ("\nmke2fs 1.47.0 (5-Feb-2023)", "1.47.0"),
        ("buildah version 1.28.2 (image-spec 1.1.0-rc2, runtime-spec 1.0.2-dev)", "1.28.2"),
        ("*** Zstandard CLI (64-bit) v1.5.4, by Yann Collet ***", "1.5.4"),
        ("", None),
        ("no digits", None),
    ],
)
def test_versions(said: str, version: str | None) -> None:
    assert host.parse_version(said) == version


@pytest.mark.parametrize(
    ("version", "minimum", "enough"),
    [
        ("1.8.1", (1, 5), True), ("1.5", (1, 5), True), ("1.4.9", (1, 5), False), ("1.10", (1, 5), True),
        ("2", (1, 5), True), ("1", (1, 5), False), ("1", (1, 0), True), ("1.5-rc1", (1, 5), True), ("x", (1,), False),
    ],
)  # fmt: skip
def test_version_comparison(version: str, minimum: tuple[int, ...], enough: bool) -> None:
    assert host.compare_version(version, minimum) is enough


@given(st.text(max_size=200))
def test_any_text_has_a_version_or_none(text: str) -> None:
    version = host.parse_version(text)
    assert version is None or version[0].isdigit()


def test_os_release() -> None:
    text = '# comment\nID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nA=\'b c\'\nB="x\\"y"\nnonsense\nC=""\n'
    assert host.parse_os_release(text) == {
        "ID": "debian", "PRETTY_NAME": "Debian GNU/Linux 12 (bookworm)", "A": "b c", "B": 'x"y', "C": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("release", "kernel"), [("6.1.0-18-amd64", (6, 1)), ("5.15.167.4-microsoft-standard-WSL2", (5, 15)), ("x", (0, 0))]
)
def test_kernel(release: str, kernel: tuple[int, int]) -> None:
    assert host.parse_kernel(release) == kernel


def test_this_host() -> None:
    facts = host.facts()
    assert facts.release == os.uname().release
    assert facts.platform == f"linux/{host.architecture()}"
    assert facts.name


@pytest.mark.parametrize(("machine", "name"), [("x86_64", "amd64"), ("aarch64", "arm64"), ("vax", "vax")])
def test_architecture_names(monkeypatch: pytest.MonkeyPatch, machine: str, name: str) -> None:
    real = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*real[:4], machine)))
    assert host.architecture() == name


def test_tool_version_runs_the_tool() -> None:
    assert host.tool_version(("sh", "-c", "echo thing version 3.4")) == "3.4"
    with pytest.raises(UnsupportedError):
        host.tool_version(("no-such-program", "--version"))


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries an agent for this host."""
    folder = tmp_path / "_agent"
    folder.mkdir()
    monkeypatch.setattr(agentbinary, "_CARRIED", folder)
    path = folder / f"berth-agent-linux-{host.architecture()}"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)
    return path


def test_the_carried_agent_is_used_as_it_is(layout: Layout, carried: Path) -> None:
    assert agentbinary.find_agent(layout) == carried


def test_an_agent_that_lost_its_bit_is_copied_once(layout: Layout, carried: Path) -> None:
    carried.chmod(0o644)
    if os.access(carried, os.X_OK):
        pytest.fail("access(2) lies about X_OK")
    copy = agentbinary.find_agent(layout)
    assert copy.parent == layout.agents
    assert os.access(copy, os.X_OK)
    assert copy.read_bytes() == carried.read_bytes()
    first = copy.stat()
    assert agentbinary.find_agent(layout) == copy
    assert copy.stat().st_ino == first.st_ino
    assert os.listdir(layout.agents) == [copy.name]


def test_a_damaged_copy_is_made_again(layout: Layout, carried: Path) -> None:
    carried.chmod(0o644)
    copy = agentbinary.find_agent(layout)
    copy.write_bytes(b"")
    assert agentbinary.find_agent(layout).read_bytes() == carried.read_bytes()


def test_a_missing_agent_is_told(layout: Layout, carried: Path) -> None:
    with pytest.raises(UnsupportedError, match="no guest agent for riscv64, only for"):
        agentbinary.find_agent(layout, "riscv64")
    carried.unlink()
    with pytest.raises(UnsupportedError, match="this installation of berth has no guest agent") as caught:
        agentbinary.find_agent(layout)
    assert "pip install" in (caught.value.hint or "")
