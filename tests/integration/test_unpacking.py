"""Images unpacked while they are pulled: what is done when, and what is left when it goes wrong.

The registry of these tests holds its last layer back until the test has seen what it waits for: nothing is timed.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from berth.engine.unpacking import Ahead, sweep, unpack
from berth.errors import ImageFormatError
from berth.images import Images
from berth.layout import Layout
from berth.oci import spec
from berth.oci.digest import Digest, digest_of
from berth.oci.spec import Descriptor
from berth.progress import Silent
from person import Person
from registries import Exchange, FakeRegistry, clear_environment, docker_registry
from support import need
from tars import END, member

_DEADLINE_S = 60.0
LOWER = member("./etc/one", b"of layer 1", uid=0, gid=0) + member("./etc/both", b"of layer 1", uid=0, gid=0) + END
MIDDLE = member("./etc/two", b"of layer 2" * 1000, uid=5, gid=6) + END
UPPER = member("./etc/both", b"of layer 3", uid=0, gid=0) + END
only_containers = pytest.mark.container("what is unpacked ahead does not depend on the isolation")


@pytest.fixture
def layers() -> list[bytes]:
    """Layers that no other test has: the person's store keeps what it has seen."""
    return [member("./etc/unique", os.urandom(16), uid=0, gid=0) + layer for layer in (LOWER, MIDDLE, UPPER)]


@pytest.fixture
def registry() -> Generator[FakeRegistry]:
    with FakeRegistry().serving() as found:
        yield found


@pytest.fixture
def machine(person: Person) -> Generator[Callable[..., list[str]]]:
    """Give the words that create a machine, which is removed afterwards."""
    made: list[str] = []

    def words(image: str) -> list[str]:
        made.append(f"ahead-{len(made)}")
        return ["create", image, "--name", made[-1], "--no-boot", "--adapt", "never", "--progress", "plain"]

    yield words
    for name in made:
        person.try_berth("rm", "--force", name)
    assert not trees_of(person.layout)


def trees_of(layout: Layout) -> list[str]:
    """What there is of trees that are being made."""
    return sorted(os.listdir(layout.unpacking)) if layout.unpacking.exists() else []


def find(layout: Layout, path: str) -> os.stat_result | None:
    """Look for a file in a tree that is being made."""
    for rootfs in layout.unpacking.glob("*/rootfs"):
        with contextlib.suppress(FileNotFoundError):
            return (rootfs / path).stat()
    return None


class Gate:
    """Holds a blob of a registry back: until `look` gives something, which `seen` keeps, or until `open` is called."""

    def __init__(self, registry: FakeRegistry, blob: bytes, look: Callable[[], object] = lambda: None) -> None:
        self.reached = threading.Event()
        self.seen: object = None
        self._open = threading.Event()
        self._path = f"blobs/{digest_of(blob)}"
        self._look = look
        registry.behaviours.append(self._hold)

    def open(self) -> None:
        self._open.set()

    def _hold(self, exchange: Exchange) -> bool:
        if not exchange.path.endswith(self._path):
            return False
        self.reached.set()
        deadline = time.monotonic() + _DEADLINE_S
        while not self._open.wait(0.02):
            self.seen = self.seen or self._look()
            if self.seen:
                self.open()
            if time.monotonic() > deadline:
                return exchange.answer(403)  # and the pull fails
        return False


def test_the_first_layers_are_unpacked_before_the_last_is_here(
    person: Person, registry: FakeRegistry, machine: Callable[..., list[str]], layers: list[bytes]
) -> None:
    put = registry.put_image("team/dev:1", *layers)
    gate = Gate(registry, layers[2], lambda: find(person.layout, "etc/two"))
    person.berth(*machine(f"{registry.host}/team/dev:1"))
    assert isinstance(gate.seen, os.stat_result)
    assert not trees_of(person.layout)
    if person.isolation == "vm":
        assert list(person.layout.disk(put.digest).glob("root-*.raw"))
        return
    etc = person.layout.template(put.digest) / "rootfs/etc"
    assert (etc / "both").read_bytes() == b"of layer 3"
    assert (etc / "one").read_bytes() == b"of layer 1"
    kept = (etc / "two").stat()
    assert (kept.st_ino, kept.st_uid) == (gate.seen.st_ino, gate.seen.st_uid), "it was unpacked once more"


@only_containers
def test_an_image_of_a_real_registry(
    person: Person, machine: Callable[..., list[str]], layers: list[bytes], scratch: Path
) -> None:
    need("root")
    with (
        FakeRegistry().serving() as source,
        docker_registry(scratch / "registry", proxied=f"http://{source.host}") as it,
    ):
        put = source.put_image("team/real:1", *layers)
        # The cache asks for the last layer, and gets it, when the first one has been unpacked.
        gate = Gate(source, layers[2], lambda: find(person.layout, "etc/one"))
        person.berth(*machine(f"{it.host}/team/real:1"))
        assert gate.seen
    assert (person.layout.template(put.digest) / "rootfs/etc/both").read_bytes() == b"of layer 3"


@only_containers
def test_what_comes_damaged_at_the_end_becomes_nothing(
    person: Person, registry: FakeRegistry, machine: Callable[..., list[str]], layers: list[bytes]
) -> None:
    last = layers[2] + os.urandom(8)
    put = registry.put_image("team/bad:1", layers[0], layers[1], last)
    Gate(registry, last, lambda: find(person.layout, "etc/two"))
    registry.blobs[digest_of(last)] = last[:-1] + bytes([last[-1] ^ 1])
    done = person.try_berth(*machine(f"{registry.host}/team/bad:1"))
    assert done.status == 1
    assert b"is damaged: its digest is" in done.stderr
    assert not trees_of(person.layout)
    assert not person.layout.template(put.digest).exists()


@only_containers
def test_a_layer_that_can_not_be_unpacked_is_told_as_ever(
    person: Person, registry: FakeRegistry, machine: Callable[..., list[str]], layers: list[bytes]
) -> None:
    odd = member("./odd", b"x", uid=2_000_000, gid=0) + END  # an id that no namespace has
    registry.put_image("team/odd:1", layers[0], odd, layers[2])
    name = f"{registry.host}/team/odd:1"
    said: list[bytes] = []
    for _ in ("from the registry", "from the store"):
        done = person.try_berth(*machine(name))
        assert done.status == 1
        said.append(b"".join(line for line in done.stderr.splitlines(keepends=True) if line.startswith(b"berth: ")))
        assert not trees_of(person.layout)
    assert said[0] == said[1]
    assert b"layer 2 of 3" in said[0]
    person.berth("image", "rm", name)


@only_containers
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_an_interrupted_create_leaves(
    person: Person,
    registry: FakeRegistry,
    machine: Callable[..., list[str]],
    layers: list[bytes],
    number: signal.Signals,
) -> None:
    put = registry.put_image("team/cut:1", *layers)
    gate = Gate(registry, layers[2])
    words = machine(f"{registry.host}/team/cut:1")
    with person.popen(*words) as process:
        assert gate.reached.wait(_DEADLINE_S)
        await_true(lambda: find(person.layout, "etc/two"))
        for child in processes(process.pid, b"create"):
            os.kill(child, number)
        process.communicate(timeout=_DEADLINE_S)
    gate.open()
    assert process.returncode
    assert bool(trees_of(person.layout)) == (number == signal.SIGKILL)
    assert not person.layout.template(put.digest).exists()
    person.berth(*words)  # which sweeps as well
    assert not trees_of(person.layout)
    assert (person.layout.template(put.digest) / "rootfs/etc/both").read_bytes() == b"of layer 3"


@only_containers
def test_two_at_once_from_one_image(
    person: Person, registry: FakeRegistry, machine: Callable[..., list[str]], layers: list[bytes]
) -> None:
    put = registry.put_image("team/two:1", *layers)
    gate = Gate(registry, layers[2], lambda: len(list(person.layout.unpacking.glob("*/rootfs/etc/two"))) == 2)
    with contextlib.ExitStack() as stack:
        image = f"{registry.host}/team/two:1"
        started = [stack.enter_context(person.popen(*machine(image))) for _ in range(2)]
        said = [process.communicate(timeout=_DEADLINE_S)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert gate.seen
    assert not trees_of(person.layout)
    assert (person.layout.template(put.digest) / "rootfs/etc/both").read_bytes() == b"of layer 3"


RECIPE = """
schema = 1
version = 77
ids = ["alpine"]
managers = ["apk"]
[[steps]]
say = "linking /sbin/init"
run = ["/bin/sh", "-c", "ln -s /bin/busybox /sbin/init && stat -c %i /etc/unique > /etc/inode"]
"""


@pytest.fixture
def recipe(person: Person) -> Generator[None]:
    """Have a recipe for Alpine that needs no network, and notes which file it saw."""
    path = person.layout.recipes / "alpine.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE)
    for made in (person.layout.config, path.parent, path):
        os.chown(made, person.uid, -1)
    yield
    path.unlink()


@only_containers
@pytest.mark.usefixtures("recipe")
def test_an_image_is_adapted_in_the_tree_that_was_unpacked_ahead(
    person: Person, registry: FakeRegistry, machine: Callable[..., list[str]], layers: list[bytes], alpine_tar: Path
) -> None:
    whole = gzip.decompress(alpine_tar.read_bytes())
    put = registry.put_image("team/plain:1", whole, layers[0], member("./sbin/.wh.init", uid=0, gid=0) + END)
    Gate(registry, layers[0], lambda: find(person.layout, "etc/alpine-release"))
    last = Gate(registry, member("./sbin/.wh.init", uid=0, gid=0) + END, lambda: find(person.layout, "etc/unique"))
    name = f"{registry.host}/team/plain:1"
    words = [word if word != "never" else "auto" for word in machine(name)]
    person.berth(*words)
    assert isinstance(last.seen, os.stat_result)
    assert not person.layout.template(put.digest).exists()
    (adapted,) = [path for path in person.layout.templates.glob("*/rootfs/etc/inode") if path.exists()]
    assert int(adapted.read_text()) == last.seen.st_ino
    for image in json.loads(person.berth("image", "ls", "--format", "json")):
        if image["adapted"] and image["adapted"]["recipe"].endswith(" 77"):
            person.berth("rm", "--force", words[words.index("--name") + 1])
            person.berth("image", "rm", image["reference"])


def await_true(look: Callable[[], object]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes(pid: int, word: bytes) -> Iterator[int]:
    """Find which of a process and all below it has `word` in its command line, and is berth itself."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if word in words and any(part.endswith((b"berth", b"/berth")) for part in words) and b"setpriv" not in words[0]:
        yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from processes(int(child), word)


# One Ahead, without a pull


def described(*layers: bytes) -> list[Descriptor]:
    return [Descriptor(spec.LAYER, digest_of(layer), len(layer)) for layer in layers]


@pytest.fixture
def opener(scratch: Path, layout: Layout) -> Callable[[Digest], int]:
    """Opens layers of these tests, as an import opens its blobs."""
    need("root")
    layout.data.mkdir()
    for layer in (LOWER, MIDDLE, UPPER):
        (scratch / digest_of(layer)).write_bytes(layer)
    return lambda digest: os.open(scratch / digest, os.O_RDONLY | os.O_CLOEXEC)


IMAGE = digest_of(b"a manifest")


def test_layers_wait_for_their_turn(layout: Layout, opener: Callable[[Digest], int], scratch: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Ahead(layout) as ahead:
        ahead.expect(IMAGE, described(UPPER, MIDDLE, LOWER, UPPER))  # the uppermost is the lowest, too
        for layer in (UPPER, LOWER, LOWER, MIDDLE):
            assert not ahead.is_whole(IMAGE)
            ahead.arrived(digest_of(layer), opener)
        (scratch / "place").mkdir()
        unpack(scratch / "place", IMAGE, [], Silent(), ahead)
    etc = scratch / "place/rootfs/etc"
    assert {path.name: path.read_bytes()[:10] for path in etc.iterdir()} == {
        "one": b"of layer 1", "two": b"of layer 2", "both": b"of layer 3",
    }  # fmt: skip
    assert (scratch / "place").stat().st_mode & 0o777 == 0o700
    assert not trees_of(layout)
    assert len(os.listdir("/proc/self/fd")) == before


def test_nobody_else_gets_the_tree(layout: Layout, opener: Callable[[Digest], int], scratch: Path) -> None:
    with Ahead(layout) as ahead:
        ahead.expect(IMAGE, described(LOWER))
        ahead.arrived(digest_of(LOWER), opener)
        assert not ahead.take(digest_of(b"another"), scratch / "place", Silent())
        assert not trees_of(layout)
        assert not ahead.take(IMAGE, scratch / "place", Silent()), "it is gone"
    assert not (scratch / "place").exists()


def test_an_image_that_did_not_come_whole_is_no_tree(
    layout: Layout, opener: Callable[[Digest], int], scratch: Path
) -> None:
    with Ahead(layout) as ahead:
        ahead.expect(IMAGE, described(LOWER, MIDDLE))
        ahead.arrived(digest_of(LOWER), opener)
        assert not ahead.take(IMAGE, scratch / "place", Silent())
    with Ahead(layout) as ahead:
        ahead.expect(IMAGE, described(LOWER, b"that can't be opened"))
        for layer in (LOWER, b"that can't be opened"):
            ahead.arrived(digest_of(layer), opener)
        assert not ahead.take(IMAGE, scratch / "place", Silent())
    assert not trees_of(layout)


def test_what_fails_is_raised_where_it_is_asked_for(
    layout: Layout, opener: Callable[[Digest], int], scratch: Path
) -> None:
    broken = b"no tar archive" * 100
    (scratch / digest_of(broken)).write_bytes(broken)
    with Ahead(layout) as ahead:
        ahead.expect(IMAGE, described(LOWER, broken, UPPER))
        for layer in (LOWER, UPPER, broken):
            ahead.arrived(digest_of(layer), opener)
        with pytest.raises(ImageFormatError, match="layer 2 of 3"):
            unpack(scratch / "place", IMAGE, [], Silent(), ahead)
    assert not trees_of(layout)


@pytest.mark.parametrize("folder", ["templates", "disks"])
def test_what_is_there_is_not_made_again(layout: Layout, folder: str) -> None:
    (layout.data / folder / IMAGE.replace(":", "-")).mkdir(parents=True)
    with Ahead(layout) as ahead:
        ahead.expect(IMAGE, described(LOWER))
        assert not trees_of(layout)


def test_only_dead_trees_are_swept(layout: Layout, opener: Callable[[Digest], int]) -> None:
    with Ahead(layout) as ahead:
        ahead.expect(IMAGE, described(LOWER))
        (layout.unpacking / "1-dead/rootfs").mkdir(parents=True)
        (layout.unpacking / "1-dead.lock").touch()
        sweep(layout)
        assert len(trees_of(layout)) == 2  # the living one, and its lock
        ahead.arrived(digest_of(LOWER), opener)


def test_a_pull_alone_unpacks_nothing(
    layout: Layout, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clear_environment(monkeypatch.delenv, monkeypatch.setenv, tmp_path)
    registry.put_image("dev:1", LOWER, UPPER)
    Images(layout).pull(f"{registry.host}/dev:1")
    assert sorted(os.listdir(layout.data)) == ["images"]
