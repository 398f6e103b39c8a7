"""What is found out about an image from its layers alone: init, shell, package managers, distribution."""

from __future__ import annotations

import contextlib

import pytest

from berth.adapt import facts as facts_module
from berth.adapt.facts import Facts, inspect, parse_os_release, read_layers
from berth.adapt.listing import Listing
from berth.errors import ImageFormatError
from berth.images import Images
from berth.layout import Layout
from berth.oci import spec
from berth.oci.stream import opened
from berth.oci.tar import TarReader
from tars import END, directory, elf, file_of, hardlink, member, rootfs, symlink

PROGRAM = elf()


def program(name: str) -> bytes:
    return member(name, PROGRAM, mode=0o755)


def listing(*layers: bytes, texts: tuple[bytes, ...] = ()) -> Listing:
    found = Listing(texts)
    for layer in layers:
        with file_of(layer + END) as fd, opened(fd, where="a layer") as data:
            found.add(TarReader(data), where="a layer")
    return found


def leads_to(found: Listing, path: str) -> bytes | None:
    item = found.find(path.encode())
    return item.path if item is not None and item.is_program else None


def facts(*layers: bytes) -> Facts:
    with contextlib.ExitStack() as stack:
        return read_layers([(stack.enter_context(file_of(layer + END)), spec.LAYER) for layer in layers])


SYSTEMD = program("usr/lib/systemd/systemd")
INIT = SYSTEMD + symlink("sbin/init", "../lib/systemd/systemd") + symlink("lib", "usr/lib")


def test_links_are_followed_inside_the_image() -> None:
    found = listing(INIT + symlink("absolute", "/sbin/init") + symlink("up", "../../../sbin/init"))
    for path in ("sbin/init", "/sbin/init", "absolute", "up", "./sbin//init"):
        assert leads_to(found, path) == b"usr/lib/systemd/systemd"


def test_dangling_links_and_loops_lead_nowhere() -> None:
    found = listing(symlink("sbin/init", "/lib/systemd/systemd") + symlink("a", "b") + symlink("b", "a"))
    assert leads_to(found, "sbin/init") is None
    assert leads_to(found, "a") is None
    assert leads_to(found, "a/b/c") is None


def test_only_files_that_can_be_executed_are_programs() -> None:
    found = listing(member("plain", PROGRAM) + member("empty", mode=0o755) + directory("folder") + program("real"))
    assert [leads_to(found, name) for name in ("plain", "empty", "folder", "real")] == [None, None, None, b"real"]


def test_a_hard_link_is_what_it_is_to() -> None:
    found = listing(program("bin/busybox") + hardlink("sbin/init", "bin/busybox") + hardlink("x", "gone"))
    assert leads_to(found, "sbin/init") == b"sbin/init"
    assert leads_to(found, "x") is None


@pytest.mark.parametrize(
    "upper",
    [
        member("usr/lib/systemd/.wh.systemd"),
        member("sbin/.wh.init"),
        member("usr/.wh.lib"),
        member("usr/lib/systemd/.wh..wh..opq"),
        member("usr/lib/systemd/systemd", PROGRAM),  # no program any more
        symlink("sbin/init", "/gone"),
    ],
)
def test_a_layer_takes_away(upper: bytes) -> None:
    assert leads_to(listing(INIT), "sbin/init")
    assert leads_to(listing(INIT, upper), "sbin/init") is None


def test_a_whiteout_does_not_hide_what_its_own_layer_brings() -> None:
    again = program("usr/lib/systemd/systemd")
    for upper in (member("usr/.wh.lib") + again, again + member("usr/lib/.wh..wh..opq")):
        assert leads_to(listing(INIT, upper), "sbin/init")


def test_a_directory_does_not_replace_the_links_of_a_merged_system() -> None:
    base = symlink("sbin", "usr/sbin") + program("usr/sbin/init")
    assert leads_to(listing(base, directory("sbin") + program("sbin/other")), "sbin/init") == b"usr/sbin/init"
    assert leads_to(listing(base, directory("sbin") + program("sbin/other")), "usr/sbin/other") == b"usr/sbin/other"


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("berth.adapt.listing._MEMORY_MAX", 10_000)
    for entries in ([program(f"p{n}") for n in range(100)], [member(f".wh.p{n}") for n in range(100)]):
        with pytest.raises(ImageFormatError, match="more programs and links"):
            listing(b"".join(entries))


def test_entries_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("berth.adapt.listing._ENTRIES_MAX", 3)
    with pytest.raises(ImageFormatError, match="a layer has more than 3 entries"):
        listing(directory("a") * 4)


def test_names_that_lead_upwards_are_refused() -> None:
    with pytest.raises(ImageFormatError, match=r"a layer: .*leads upwards"):
        listing(member("../x"))


def test_facts_of_a_distribution() -> None:
    release = b'ID=ubuntu\nID_LIKE="debian other"\nPRETTY_NAME="Ubuntu 24.04"\nBROKEN="x\n'
    layer = (
        program("usr/bin/dash") + symlink("bin", "usr/bin") + symlink("usr/bin/sh", "dash")
        + program("usr/bin/apt-get") + member("usr/lib/os-release", release)
        + symlink("etc/os-release", "../usr/lib/os-release")
    )  # fmt: skip
    expected = Facts(
        has_init=False, has_shell=True, managers=("apt-get",), ids=("ubuntu", "debian", "other"), name="Ubuntu 24.04"
    )
    assert facts(layer) == expected
    assert Facts.from_json(expected.to_json()) == expected
    assert facts(layer, INIT).has_init


def test_facts_of_one_static_binary() -> None:
    assert facts(program("hello")) == Facts(has_init=False, has_shell=False, ids=("linux",))


def test_os_release_of_a_stranger() -> None:
    assert parse_os_release(b"ID='a b'\nNAME=x\x1b[31m\n# ID=c\nno\n=1\nA-B=2\n") == {"ID": "a b", "NAME": "x[31m"}
    assert facts(member("etc/os-release", b"ID=\x1b]0;x\x07\nID_LIKE=../../etc\n")).ids == ()


def test_what_was_found_once_is_remembered(
    layout: Layout, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path_factory.mktemp("image") / "rootfs.tar"
    path.write_bytes(rootfs())
    images = Images(layout)
    image = images.ensure(f"rootfs:{path}")
    found = inspect(layout, images, image)
    assert found.has_shell
    assert not found.has_init

    def never(_layers: object) -> Facts:
        raise AssertionError("it looked again")

    with monkeypatch.context() as patch:
        patch.setattr(facts_module, "read_layers", never)
        assert inspect(layout, images, image) == found
    layout.inspection(image.digest).write_text('{"schema": 1, "has_init": "maybe"}')
    assert inspect(layout, images, image) == found
