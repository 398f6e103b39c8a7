"""Templates that a killed berth never finished go with a prune; those that somebody makes now stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from berth import locks
from berth.layout import Layout
from berth.lifecycle import Machines

PARTIAL = "sha256-0123.partial"


@pytest.fixture(params=["templates", "disks"])
def folder(request: pytest.FixtureRequest, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where templates of one engine are, with one that is half-made, of an image that a machine uses."""
    monkeypatch.setattr(Machines, "images_in_use", lambda _self: {"sha256:0123": ["dev"]})
    found = layout.data / str(request.param)
    (found / PARTIAL / "rootfs").mkdir(parents=True)
    (found / f"{request.param}.lock").touch()
    return found


def test_they_go(layout: Layout, folder: Path) -> None:
    Machines(layout).prune_templates()
    assert not (folder / PARTIAL).exists()


def test_one_that_is_being_made_stays(layout: Layout, folder: Path) -> None:
    with locks.hold(folder / f"{folder.name}.lock"):
        Machines(layout).prune_templates()
        assert (folder / PARTIAL / "rootfs").exists()


@pytest.mark.parametrize("folder", ["templates", "disks"])
def test_what_a_killed_prune_has_renamed_is_in_nobodys_way(layout: Layout, folder: str) -> None:
    places = [layout.data / folder / name for name in ("sha256-0123", "sha256-0123.doomed", "sha256-4567.doomed")]
    for place in places:
        (place / "rootfs").mkdir(parents=True)
    Machines(layout).prune_templates()
    assert not [place for place in places if place.exists()]
