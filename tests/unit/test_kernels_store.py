"""The store of kernels, over a source in memory; and the command line over the store."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from berth import host, locks, proc
from berth.cli.main import main
from berth.errors import BerthError, InvalidArgumentError, NotFoundError, StateFormatError, UnsupportedError
from berth.kernels import apt, build, record
from berth.kernels.gather import PACKED_IMAGE, Gathered
from berth.kernels.store import Kernels
from berth.layout import Layout
from berth.progress import Progress, Silent
from kernelimages import arm_image, bzimage, elf, lz4_legacy


@dataclasses.dataclass
class FakeOffer:
    """An offer of the package source: a kernel with one module, or an error."""

    version: str = "6.1.0-5"
    revision: str = "1"
    fails: str = ""
    image: bytes = b""

    @property
    def source(self) -> str:
        return f"linux-image-{self.version} {self.revision}"

    def gather(self, folder: Path, _progress: Progress) -> Gathered:
        assert list(folder.iterdir()) == [], "what failed before must be gone"
        modules = folder / "lib/modules" / self.version
        modules.mkdir(parents=True)
        (modules / "modules.dep").write_text("kernel/a.ko:\n")
        if self.fails:
            raise BerthError(self.fails)
        (folder / PACKED_IMAGE).write_bytes(self.image or bzimage(b"no known codec"))
        (folder / "e2fsck").write_bytes(b"check")
        return Gathered(self.version, self.source)


class Source:
    """What `apt.offers` yields, in place of it."""

    def __init__(self) -> None:
        self.offers = [FakeOffer()]
        self.asked = 0

    def __call__(self, _arch: str, work: Path, _progress: Progress) -> Iterator[FakeOffer]:
        assert work.is_dir()
        for offer in self.offers:
            self.asked += 1
            yield offer


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    def make_disk(_modules: Path, target: Path) -> None:
        target.write_bytes(b"disk")

    fake = Source()
    monkeypatch.setattr(apt, "is_there", lambda: True)
    monkeypatch.setattr(apt, "offers", fake)
    monkeypatch.setattr(build, "make_module_disk", make_disk)
    return fake


@pytest.fixture
def kernels(layout: Layout, source: Source) -> Kernels:
    assert source
    return Kernels(layout)


def names(layout: Layout) -> set[str]:
    return {path.name for path in layout.kernels.iterdir()} - {"kernels.lock"}


def test_nothing_stored(layout: Layout) -> None:
    kernels = Kernels(layout)
    assert (kernels.list(), kernels.problems(), kernels.find("amd64"), kernels.chosen("amd64")) == ([], [], None, None)
    assert not layout.kernels.exists(), "asking makes nothing"


def test_fetch(layout: Layout, kernels: Kernels, source: Source) -> None:
    kernel = kernels.fetch("amd64", Silent())
    folder = layout.kernels / "6.1.0-5-amd64"
    assert dataclasses.astuple(kernel) == (
        "6.1.0-5", "amd64", folder / "image", None, folder / "lib/modules/6.1.0-5", folder / "modules.ext4",
        folder / "e2fsck", "linux-image-6.1.0-5 1",
    )  # fmt: skip
    assert kernels.find("amd64") == kernels.ensure("amd64", Silent()) == kernel
    assert source.asked == 1
    assert kernels.find("arm64") is None
    assert names(layout) == {"6.1.0-5-amd64"}
    assert layout.kernels.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_pvh_kernel(kernels: Kernels, source: Source) -> None:
    import gzip

    source.offers = [FakeOffer(image=bzimage(gzip.compress(elf())))]
    kernel = kernels.fetch("amd64", Silent())
    assert kernel.vmlinux
    assert kernel.vmlinux.read_bytes() == elf()


def test_fetch_again_changes_nothing(layout: Layout, kernels: Kernels) -> None:
    kernel = kernels.fetch("amd64", Silent())
    inode = kernel.image.stat().st_ino
    assert kernels.fetch("amd64", Silent()) == kernel
    assert kernel.image.stat().st_ino == inode
    assert names(layout) == {"6.1.0-5-amd64"}


def test_a_new_build_of_the_same_version_takes_its_place(layout: Layout, kernels: Kernels, source: Source) -> None:
    kernels.fetch("amd64", Silent())
    source.offers = [FakeOffer(revision="2")]
    assert kernels.fetch("amd64", Silent()).source == "linux-image-6.1.0-5 2"
    assert names(layout) == {"6.1.0-5-amd64"}


def test_lists_out_of_date_are_not_the_end(kernels: Kernels, source: Source) -> None:
    source.offers = [FakeOffer(fails="404"), FakeOffer("6.1.0-6")]
    assert kernels.fetch("amd64", Silent()).version == "6.1.0-6"


def test_a_failure_leaves_nothing(layout: Layout, kernels: Kernels, source: Source) -> None:
    for offer, message in (
        (FakeOffer(fails="the mirror is away"), "the mirror is away"),
        (FakeOffer(image=b"junk"), "begins like none"),
        (FakeOffer(image=arm_image()), "is for linux/arm64, not for linux/amd64"),
    ):
        source.offers = [offer]
        with pytest.raises(BerthError, match=message):
            kernels.fetch("amd64", Silent())
        assert names(layout) == set()
    with pytest.raises(UnsupportedError, match="riscv64"):
        kernels.fetch("riscv64", Silent())


@pytest.mark.parametrize("name", ["image", "modules.ext4", "e2fsck"])
def test_damage_is_seen_and_mended(name: str, layout: Layout, kernels: Kernels) -> None:
    kernel = kernels.fetch("amd64", Silent())
    path = layout.kernels / "6.1.0-5-amd64" / name
    path.write_bytes(path.read_bytes()[:-1])
    assert kernels.list() == []
    (problem,) = kernels.problems()
    assert (problem.version, problem.arch) == ("6.1.0-5", "amd64")
    assert f"{name} is damaged" in problem.error.message
    assert kernels.ensure("amd64", Silent()) == kernel
    assert kernels.problems() == []


def test_damage_of_the_same_size_is_mended_by_fetch(kernels: Kernels) -> None:
    kernel = kernels.fetch("amd64", Silent())
    data = kernel.image.read_bytes()
    kernel.image.write_bytes(data[:-1] + b"!")
    assert kernels.find("amd64"), "the cheap check looks at sizes only"
    with pytest.raises(StateFormatError):
        record.load(kernel.image.parent, digests=True)
    kernels.fetch("amd64", Silent())
    assert kernel.image.read_bytes() == data


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"schema": 1}', '{"schema": 2}',
     '{"schema": 1, "version": "6.1.0-5", "arch": "amd64", "source": "x", "files": {}}',
     '{"schema": 1, "version": "../x", "arch": "amd64", "source": "x", "files": {"image": {}}}',
     '{"schema": 1, "version": "6.2", "arch": "amd64", "source": "x", "files": {}}'],
)  # fmt: skip
def test_a_damaged_record(text: str, layout: Layout, kernels: Kernels) -> None:
    kernels.fetch("amd64", Silent())
    (layout.kernels / "6.1.0-5-amd64/kernel.json").write_text(text)
    (layout.kernels / "no-kernel").mkdir()
    assert [problem.version for problem in kernels.problems()] == ["6.1.0-5"]
    assert kernels.find("amd64") is None


def test_what_the_killed_left_is_swept(layout: Layout, kernels: Kernels) -> None:
    """A kernel has its name only when it is whole, so SIGKILL leaves the store as it was, or done."""
    kernels.fetch("amd64", Silent())
    for name in ("fetch.partial", "6.0-amd64.trash", "custom-x.partial"):
        (layout.kernels / name / "lib").mkdir(parents=True)
    (layout.kernels / "chosen.json.999999999.partial").touch()
    assert [kernel.version for kernel in kernels.list()] == ["6.1.0-5"]
    assert kernels.problems() == []
    kernels.use("6.1.0-5", "amd64")
    assert names(layout) == {"6.1.0-5-amd64", "chosen.json"}


def test_choosing(layout: Layout, kernels: Kernels, source: Source) -> None:
    for version in ("6.1.0-5", "6.1.0-10", "6.1.0-9"):
        source.offers = [FakeOffer(version)]
        kernels.fetch("amd64", Silent())

    def found() -> str:
        kernel = kernels.find("amd64")
        assert kernel
        return kernel.version

    assert [kernel.version for kernel in kernels.list()] == ["6.1.0-10", "6.1.0-9", "6.1.0-5"]
    assert found() == "6.1.0-10"
    kernels.use("6.1.0-5", "amd64")
    assert (found(), kernels.chosen("amd64"), kernels.chosen("arm64")) == ("6.1.0-5", "6.1.0-5", None)
    for version, arch in (("6.2", "amd64"), ("6.1.0-5", "arm64"), ("../x", "amd64")):
        with pytest.raises(NotFoundError):
            kernels.use(version, arch)
        with pytest.raises(NotFoundError):
            kernels.remove(version, arch)
    kernels.remove("6.1.0-5", "amd64")
    assert (found(), kernels.chosen("amd64")) == ("6.1.0-10", None)
    kernels.use("6.1.0-9", "amd64")
    (layout.kernels / "chosen.json").write_text("junk")
    assert found() == "6.1.0-10"


def test_a_kernel_of_ones_own(layout: Layout, kernels: Kernels, scratch: Path) -> None:
    path = scratch / "mine"
    path.write_bytes(elf())
    path.chmod(0o600)
    kernel = kernels.custom(path)
    assert (kernel.version, kernel.arch, kernel.modules, kernel.source) == ("6.1.0-test", "amd64", None, str(path))
    assert kernel.vmlinux
    assert kernel.vmlinux.read_bytes() == kernel.image.read_bytes() == elf()
    assert kernel.image.stat().st_mode & 0o777 == 0o644, "an unprivileged QEMU reads it"
    assert kernels.custom(path) == kernel
    assert kernels.list() == []
    assert kernels.problems() == []
    path.write_bytes(arm_image())
    assert kernels.custom(path).arch == "arm64"
    path.write_bytes(b"no kernel")
    with pytest.raises(InvalidArgumentError, match="begins like none"):
        kernels.custom(path)
    with pytest.raises(InvalidArgumentError, match="can't be read"):
        kernels.custom(scratch / "absent")
    assert len(names(layout)) == 2, "one for each content, nothing of the failures"


def test_old_copies_of_ones_own_go(layout: Layout, kernels: Kernels, scratch: Path) -> None:
    made: list[Path] = []
    for number in range(8):
        path = scratch / f"mine-{number}"
        path.write_bytes(elf())
        made.append(kernels.custom(path).image)
        os.utime(made[-1].parent, (number, number))
    assert len(names(layout)) == 4
    assert [path.exists() for path in made] == [False] * 4 + [True] * 4


@pytest.mark.skipif(proc.find_program("lz4") is None, reason="needs the program lz4")
def test_a_bzimage_of_ones_own_is_unpacked(kernels: Kernels, scratch: Path) -> None:
    plain = elf() + bytes(500)
    (scratch / "mine").write_bytes(bzimage(lz4_legacy(plain) + len(plain).to_bytes(4, "little")))
    kernel = kernels.custom(scratch / "mine")
    assert kernel.vmlinux
    assert kernel.vmlinux.read_bytes() == plain


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def berth(kernels: Kernels, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(host, "architecture", lambda: "amd64")
    assert kernels

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["system", "kernel", *words])
        out, err = capfd.readouterr()
        return status, out, err

    return run


class TestCommandLine:
    def test_the_way_of_a_kernel(self, layout: Layout, berth: Run, source: Source) -> None:
        assert berth("-q") == (0, "", "")
        assert berth("fetch") == (0, "6.1.0-5\n", "making the disk with the modules of 6.1.0-5 …\n")
        source.offers = [FakeOffer("6.1.0-6")]
        assert berth("fetch", "--progress", "none") == (0, "6.1.0-6\n", "")
        _, text, _ = berth()
        rows = [line.split() for line in text.splitlines()]
        assert rows[0] == ["VERSION", "PLATFORM", "SIZE", "SOURCE", "USED"]
        assert [(row[0], row[-1]) for row in rows[1:]] == [("6.1.0-6", "*"), ("6.1.0-5", "-")]
        assert berth("use", "6.1.0-5") == (0, "6.1.0-5\n", "")
        assert berth("fetch")[2] == "hint: machines boot 6.1.0-5; to change that: berth system kernel use newest\n"
        assert [row["used"] for row in json.loads(berth("ls", "--format", "json")[1])] == [False, True]
        assert berth("use", "newest") == (0, "6.1.0-6\n", "")
        assert berth("rm", "6.1.0-6") == (0, "6.1.0-6\n", "")
        assert berth("list", "-q") == (0, "6.1.0-5\n", "")
        assert berth("ls", "-q", "--platform", "linux/arm64") == (0, "", "")
        assert layout.kernels.exists()

    def test_a_damaged_one_is_shown(self, layout: Layout, berth: Run) -> None:
        berth("fetch")
        (layout.kernels / "6.1.0-5-amd64/image").unlink()
        status, text, said = berth("ls")
        assert (status, len(text.splitlines())) == (0, 1)
        assert "6.1.0-5" in said
        assert said.endswith("hint: berth system kernel fetch --platform linux/amd64\n")
        (row,) = json.loads(berth("ls", "--format", "json")[1])
        assert set(row) == {"version", "platform", "size", "source", "used", "path", "problem"}
        assert "image is damaged" in row["problem"]

    @pytest.mark.parametrize(
        ("words", "status", "message"),
        [
            (("use",), 2, "needs a version"),
            (("rm",), 2, "needs a version"),
            (("fetch", "6.1"), 2, "takes no version"),
            (("mend",), 2, "invalid choice"),
            (("use", "9.9"), 1, "kernel '9.9' for linux/amd64 not found"),
            (("fetch", "--platform", "linux/riscv64"), 1, "no kernels for linux/riscv64"),
        ],
    )
    def test_wrong(self, words: tuple[str, ...], status: int, message: str, berth: Run) -> None:
        done, out, err = berth(*words)
        assert (done, out) == (status, "")
        assert message in err.splitlines()[0]
        assert "hint: " in err


def test_who_waits_is_told(layout: Layout, kernels: Kernels) -> None:
    steps: list[str] = []

    class Notes(Silent):
        def step(self, text: str) -> None:
            steps.append(text)
            if "waiting" in text:
                held.__exit__(None, None, None)

    layout.kernels.mkdir(parents=True)
    held = locks.hold(layout.kernels / "kernels.lock")
    held.__enter__()
    assert kernels.fetch("amd64", Notes()).version == "6.1.0-5"
    assert steps[0] == "waiting for another berth command that changes the kernels"
