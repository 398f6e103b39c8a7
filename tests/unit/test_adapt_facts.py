"""What is found out about an image from its layers, or its files: init, shell, package managers, distribution."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from berth.adapt import facts as facts_module
from berth.adapt.facts import Facts, inspect, read_layers, read_tree, recall
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
    assert facts(member("etc/os-release", b"ID='a'\nPRETTY_NAME=x\x1b[31m\n# ID=c\nno\n=1\n")).name == "x[31m"
    assert facts(member("etc/os-release", b"ID=\x1b]0;x\x07\nID_LIKE=../../etc\n")).ids == ()


def tree(root: Path, files: dict[str, bytes], links: dict[str, str]) -> Path:
    """Make a directory with programs (and etc/os-release, which is none) and links."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
        (root / name).chmod(0o644 if name.endswith("-release") else 0o755)
    for name, target in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    return root


def facts_of(root: Path) -> Facts:
    fd = os.open(root, os.O_PATH)
    try:
        return read_tree(fd)
    finally:
        os.close(fd)


RELEASE = b'ID=ubuntu\nID_LIKE="debian other"\nPRETTY_NAME="Ubuntu 24.04"\n'


def test_files_say_what_layers_do(tmp_path: Path) -> None:
    programs = {"usr/bin/dash": PROGRAM, "usr/bin/apt-get": PROGRAM, "usr/lib/systemd/systemd": PROGRAM}
    links = {
        "bin": "usr/bin", "lib": "/usr/lib", "usr/bin/sh": "dash", "etc/os-release": "../usr/lib/os-release",
        "sbin/init": "/lib/systemd/systemd",
    }  # fmt: skip
    layer = b"".join(
        [
            *(program(name) for name in programs), *(symlink(name, target) for name, target in links.items()),
            member("usr/lib/os-release", RELEASE),
        ]
    )  # fmt: skip
    found = facts_of(tree(tmp_path, {**programs, "usr/lib/os-release": RELEASE}, links))
    assert found == facts(layer)
    assert found.has_init


def test_links_in_files_lead_nowhere_outside(tmp_path: Path) -> None:
    links = {"sbin/init": "/bin/sh", "bin/sh": "../../../../../../../../bin/sh", "etc/os-release": "/etc/os-release"}
    assert facts_of(tree(tmp_path, {}, links)) == Facts(has_init=False, has_shell=False, ids=("linux",))


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/os-release")
    (tmp_path / "sbin/init").mkdir(parents=True)
    assert facts_of(tmp_path) == Facts(has_init=False, has_shell=False, ids=("linux",))
    (tmp_path / "etc/os-release").unlink()
    (tmp_path / "etc/os-release").write_bytes(b"ID=x\n" + bytes(1 << 20))
    assert facts_of(tmp_path).ids == ("linux",)


def test_what_is_unpacked_is_looked_at(layout: Layout) -> None:
    digest = f"sha256:{'ab' * 32}"
    assert recall(layout, digest) is None
    template = layout.template(digest)
    tree(template / "rootfs", {"bin/sh": PROGRAM, "etc/os-release": RELEASE}, {})
    assert recall(layout, digest) is None  # half-made
    (template / "template.json").touch()
    found = recall(layout, digest)
    assert found is not None
    assert (found.has_shell, found.ids) == (True, ("ubuntu", "debian", "other"))
    (template / "template.json").unlink()
    assert recall(layout, digest) == found


@pytest.mark.parametrize("is_open", [True, False])
def test_what_is_being_unpacked_is_waited_for(layout: Layout, tmp_path: Path, *, is_open: bool) -> None:
    """Files that are closed to us (they are a machine's) are no obstacle: the layers tell as well."""
    tree(tmp_path, {"bin/sh": PROGRAM}, {})
    fd = os.open(tmp_path, os.O_PATH)
    opened: list[bool] = []

    @contextlib.contextmanager
    def layers() -> Generator[list[tuple[int, str]]]:
        opened.append(True)
        with file_of(program("bin/sh") + END) as layer:
            yield [(layer, spec.LAYER)]

    try:
        found = inspect(layout, f"sha256:{'cd' * 32}", layers, lambda: fd if is_open else -1)
    finally:
        os.close(fd)
    assert found.has_shell
    assert bool(opened) != is_open


def test_what_was_found_once_is_remembered(
    layout: Layout, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path_factory.mktemp("image") / "rootfs.tar"
    path.write_bytes(rootfs())
    images = Images(layout)
    image = images.ensure(f"rootfs:{path}")

    def look() -> Facts:
        return inspect(layout, image.digest, lambda: images.opened_layers(image))

    found = look()
    assert found.has_shell
    assert not found.has_init

    def never(_layers: object) -> Facts:
        raise AssertionError("it looked again")

    with monkeypatch.context() as patch:
        patch.setattr(facts_module, "read_layers", never)
        assert look() == found
    layout.inspection(image.digest).write_text('{"schema": 1, "has_init": "maybe"}')
    assert look() == found
