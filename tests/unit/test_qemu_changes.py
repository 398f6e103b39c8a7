"""What a VM machine has changed: what is believed of the VM that reads it, and of the guest that stands still."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from berth.bundle import Bundle
from berth.config import BootConfig, HostUser, MachineConfig
from berth.engine.base import Machine
from berth.engine.qemu import changes, freezing
from berth.engine.qemu.changes import Changes
from berth.engine.qemu.freezing import frozen
from berth.errors import BerthError, DeadlineError, InvalidStateError
from berth.layout import Layout
from berth.names import parse_machine_name
from berth.net.addresses import Address
from berth.wire.frames import STDERR, STDOUT
from berth.wire.messages import Exit, Started
from peer import Peer, played

NAME = parse_machine_name("dev")
USER = HostUser(name="ada", uid=1000, gid=1000, group="ada", home="/home/ada", shell="/bin/bash")
CONFIG = MachineConfig(
    name=NAME, id="0" * 32, image_reference="docker.io/library/base:1", image_digest="sha256:" + "0" * 64,
    platform="linux/amd64", isolation="vm", created="2026-01-01T00:00:00Z", user=USER,
)  # fmt: skip


def machine(layout: Layout) -> Machine:
    address = Address("10.209.0.2", 22, "10.209.0.1", "02:00:00:00:00:01", "bth2", "127.64.0.2")
    return Machine(Bundle(layout, NAME), CONFIG, BootConfig(), address)


def verdict(layout: Layout, tmp_path: Path, head: bytes, console: str = "") -> Changes:
    path = tmp_path / "out"
    path.write_bytes(head.ljust(4096, b"\0") + bytes(2048))
    with path.open("r+b") as out:
        try:
            return changes._verdict(machine(layout), out, console)  # pyright: ignore[reportPrivateUsage]
        finally:
            assert os.fstat(out.fileno()).st_size <= 4096 + 2048


def test_where_the_layer_is(layout: Layout, tmp_path: Path) -> None:
    said = json.dumps({"size": 1024, "entries": 0, "whiteouts": 0, "leftOut": 3}).encode()
    assert verdict(layout, tmp_path, said) == Changes(4096, 1024, 3)
    assert (tmp_path / "out").stat().st_size == 4096 + 1024


@pytest.mark.parametrize(
    "head",
    [
        b"~", b"[]", b"{}", b"null", b"\xff", b"[" * 4096, b'{"size": 1024}', b'{"size": 0, "leftOut": 0}',
        b'{"size": -1, "leftOut": 0}', b'{"size": 2049, "leftOut": 0}', b'{"size": 1e3, "leftOut": 0}',
        b'{"size": "1024", "leftOut": 0}', b'{"error": 7}', b'{"size": 99999999999999999999999, "leftOut": 0}',
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_no_layer(layout: Layout, tmp_path: Path, head: bytes) -> None:
    with pytest.raises(BerthError, match="does not say how it went"):
        verdict(layout, tmp_path, head)


def test_what_went_wrong_is_told_and_harmless_to_terminals(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(BerthError) as caught:
        verdict(layout, tmp_path, json.dumps({"error": "no \x1b[31mjournal\a\x9b" + "!" * 999}).encode())
    assert "no journal!!!" in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


def test_without_a_verdict_the_console_is_told(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(BerthError, match="can't be read: the root disk is damaged"):
        verdict(layout, tmp_path, b"", "the root disk is damaged")
    with pytest.raises(BerthError, match="ended early"):
        verdict(layout, tmp_path, b"")


def listen(written: bytes, until: bytes | None) -> bytes:
    reader, writer = os.pipe()
    try:
        os.write(writer, written)
        if until is None:
            os.close(writer)
        return changes._listen(reader, b"", until=until, timeout_s=0.05)  # pyright: ignore[reportPrivateUsage]
    finally:
        os.close(reader)
        with suppress(OSError):
            os.close(writer)


def test_the_console_is_kept_in_part() -> None:
    assert listen(b"x" * 60_000 + b"end", None) == b"x" * 4093 + b"end"


def test_a_reader_that_does_not_boot_is_noticed() -> None:
    assert listen(b"quiet\nberth: reading", b"berth: reading").endswith(b"reading")
    with pytest.raises(DeadlineError):
        listen(b"quiet\n", b"berth: reading")


# Standing still


def freeze(story: Callable[[Peer], None], inside: Callable[[], None] = lambda: None) -> None:
    def whole(peer: Peer) -> None:
        peer.accept()
        peer.send(Started(pid=7))
        story(peer)

    with played(whole) as sock, frozen(lambda: sock, NAME):
        inside()


def ends(status: int, words: bytes = b"", *, first: bytes = b"frozen\n") -> Callable[[Peer], None]:
    """Freeze until the end of stdin, then end."""

    def story(peer: Peer) -> None:
        peer.write(STDOUT, first)
        peer.read()
        peer.write(STDERR, words)
        peer.finish(Exit(code=status))

    return story


def test_it_stands_still_for_the_block() -> None:
    seen: list[str] = []

    def story(peer: Peer) -> None:
        ends(0)(peer)
        seen.append("thawed")

    freeze(story, lambda: seen.append("copied"))
    assert seen == ["copied", "thawed"]


def test_what_was_thawed_early_is_not_taken() -> None:
    with pytest.raises(InvalidStateError, match=r"changing: thawed too early$"):
        freeze(ends(1, b"thawed \x1btoo early\n"))


@pytest.mark.parametrize("words", [b"", b"usage: berth-agent boot", b"frozen", b"thawed\n", b"frozen\nfrozen\n" * 9999])
def test_what_does_not_freeze_is_refused(words: bytes) -> None:
    copied: list[str] = []

    def story(peer: Peer) -> None:
        peer.write(STDOUT, words)
        peer.finish(Exit(code=2))

    with pytest.raises(InvalidStateError, match="could not be kept from changing") as caught:
        freeze(story, lambda: copied.append("copied"))
    assert copied == []
    assert "berth stop dev" in str(caught.value.hint)


def test_a_guest_that_does_not_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezing, "_FREEZE_S", 0.05)
    monkeypatch.setattr(freezing, "_THAW_S", 0.05)
    left: list[bool] = []
    with pytest.raises(InvalidStateError, match="could not be kept from changing"):
        freeze(lambda peer: left.append(peer.is_left()))
    assert left == [True]
