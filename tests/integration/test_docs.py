"""What README, guide and docs/building.md print works as it is printed, for a stranger who types it line by line.

Commands stand in indented blocks: in README as ``$ COMMAND`` followed by what it prints, else bare. Each runs in a bash
of its own, in the directory where the one before it has ended. Where a document shows what is printed, the real thing
must have those lines: ``…`` stands for anything, a line of nothing else for any lines; numbers, digests and blanks are
compared by their shape.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

import leaks
from berth.images import Images
from berth.layout import Layout
from images import bootstrap
from person import Person
from registries import Served, docker_registry
from support import ROOT, need

# What is built where the document does not show it.
_CONTAINERFILE = "FROM local/dev:today\nRUN apt-get install -y less\n"
# README is the first: what it shows is what happens when nothing is there yet.
DOCUMENTS = ("README.md", "docs/guide.md", "docs/building.md")

# The words that begin a command in a block of docs/; other blocks show files, or pictures.
_COMMANDS = ("berth", "cd")
# What can't run in a test, and where the same is tested.
_ELSEWHERE = {
    "script/quickstart": "installs packages; tests/style/test_scripts.py and .ci/run",
    "script/test": "runs this very test",
    "berth create bootstrap:": "half a minute of mmdebstrap; test_images.py",
    "berth create 'bootstrap:": "half a minute of mmdebstrap; test_images.py",
    "berth create rootfs:./alpine-aarch64": "an emulated VM of another architecture; test_vm.py",
    "berth login ghcr.io": "asks for a password of a registry out in the world; test_registry.py",
    "cd ~/berth": "berth's sources, which the stranger has not",
    "berth run -n lab": "installs from the Python package index and compiles; tried by hand, in both isolations",
    "berth system autostart enable": "needs a login's systemd; test_services.py",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A command and the lines that it prints by the document; None where the document does not say."""

    line: int
    command: str
    printed: str | None


def examples(text: str) -> Iterator[Example]:
    """Find the commands of a document, in order."""
    for line, block in _blocks(text):
        if block.startswith("$ "):
            yield from _dialogue(line, block)
        elif block.split()[0] in _COMMANDS or block.startswith("script/"):
            # Every line of it must be one: nothing that looks like a command escapes.
            assert all(row.split()[0] in _COMMANDS or row.startswith("script/") for row in block.splitlines()), block
            yield from (Example(line + at, row, None) for at, row in enumerate(block.splitlines()))


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """Find what is indented by four, between lines that are not, with the number of its first line."""
    fenced = re.sub(r"^```.*?^```$", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for found in re.finditer(r"(?:^    .*\n)+", fenced, re.MULTILINE):
        yield fenced.count("\n", 0, found.start()) + 1, re.sub(r"^    ", "", found[0], flags=re.MULTILINE)


def _dialogue(line: int, block: str) -> Iterator[Example]:
    for found in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
        yield Example(line + block.count("\n", 0, found.start()), found[1], found[2] or None)


def looks_like(printed: str, said: str) -> bool:
    """Say whether `said` has the lines that a document prints."""
    lines = (shape(row) for row in printed.splitlines())
    pattern = "".join(r"(?:.*\n)*" if row == "…" else re.escape(row).replace("…", ".*") + r"\n" for row in lines)
    return re.fullmatch(pattern, "".join(f"{shape(row)}\n" for row in said.splitlines())) is not None


def shape(row: str) -> str:
    """Write one sign for each number, digest, time, size or address, and one blank for many."""
    row = re.sub(r"\b(?=[a-f]*\d)[0-9a-f]{12,}\b", "#", row)
    row = re.sub(r"\d+(?:[-.:]\d+)*[BKMGT]?\b", "#", row)
    return " ".join(row.split())


# The stranger, and what is there before the first command -------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, alpine_tar: Path) -> Generator[Served]:
    """Stand in for all registries: it has what the documents pull, a Debian without an init above all."""
    for feature in ("root", "mmdebstrap", "mirror"):
        need(feature)
    folder = tmp_path_factory.mktemp("docs")
    images = Images(Layout(*(folder / name for name in ("data", "run", "config", "cache"))))
    with docker_registry(folder / "registry") as served:
        images.import_(bootstrap("bookworm", ["ca-certificates"]), "debian")
        images.import_(alpine_tar, "alpine")
        for name in ("library/debian:12", "library/ubuntu:24.04"):
            images.push("debian", f"{served.host}/{name}")
        images.push("alpine", f"{served.host}/team/dev")
        images.save(["alpine"], folder / "image.tar")
        yield served


@pytest.fixture(scope="module")
def stranger(person: Person, registry: Served, alpine_tar: Path) -> Generator[Person]:
    """The ordinary user with nothing of berth's but a mirror of docker.io, and a project in their home."""
    for feature in ("buildah", "qemu"):
        need(feature)
    folder = person.layout.data.parent / "docs"
    roots = {name: folder / name for name in ("data", "run", "config", "cache")}
    env = {
        "BERTH_DATA_DIR": str(roots["data"]), "BERTH_RUNTIME_DIR": str(roots["run"]),
        "BERTH_CONFIG_DIR": str(roots["config"]), "BERTH_CACHE_DIR": str(roots["cache"]),
    }  # fmt: skip
    someone = dataclasses.replace(
        person,
        layout=Layout(*roots.values()),
        command=lambda argv, more, cwd: person.command(argv, {**env, **more}, cwd),
    )
    before = set(person.home.iterdir())
    _give(someone, someone.layout.registries, f'[registry."docker.io"]\nmirrors = ["{registry.host}"]\n'.encode())
    _give(someone, person.home / "project/Makefile", b"all test:\n\t@echo made by me\n")
    _give(someone, person.home / "alpine.tar.gz", alpine_tar.read_bytes())
    _give(someone, person.home / "image.tar", (registry.folder.parent / "image.tar").read_bytes())
    _give(someone, person.home / "data/file", b"data\n")
    yield someone
    someone.take_down()
    for path in set(person.home.iterdir()) - before:
        leaks.remove_tree(path) if path.is_dir() else path.unlink()


def _give(person: Person, path: Path, data: bytes) -> None:
    """Write a file of the person's, and the folders above it that are missing."""
    for folder in reversed([parent for parent in path.parents if not parent.exists()]):
        folder.mkdir()
        os.chown(folder, person.uid, -1)
    path.write_bytes(data)
    os.chown(path, person.uid, -1)


@dataclasses.dataclass
class Terminal:
    """Where the stranger types. folder: where they are now."""

    person: Person
    registry: Served
    folder: Path

    def type(self, example: Example, where: str) -> str:
        """Run a command as it is printed; return what is wrong, of a status that is none or of what it has printed."""
        where = f"{where}:{example.line}: {example.command}"
        # The directory comes back in a file, as everything else that can be written to may be closed by then.
        script = f"{self._here(example.command)}\nstatus=$?; pwd > {self._pwd}; exit $status\n"
        argv = self.person.command(["bash", "-c", script], {}, self.folder)
        with tempfile.TemporaryFile() as said:
            status = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=300, check=False)
            said.seek(0)
            text = said.read().decode()
        self.folder = Path(self._pwd.read_text().rstrip("\n"))
        if status.returncode != 0:
            return f"{where}\nended with status {status.returncode} and said\n{text}"
        return "" if example.printed is None or looks_like(example.printed, text) else f"{where}\nsaid\n{text}"

    @property
    def _pwd(self) -> Path:
        return self.person.layout.config / "pwd"

    def _here(self, command: str) -> str:
        """Put in the registry and the machine's address, which differ from host to host."""
        command = command.replace("localhost:5000", self.registry.host.replace("127.0.0.1", "localhost"))
        if re.search(_ADDRESS, command):
            command = re.sub(_ADDRESS, str(self.person.inspect("dev")["ipAddress"]), command)
        return command


_ADDRESS = r"\b127(?:\.\d+){3}\b"


@pytest.mark.only("user")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_does_what_the_document_says(stranger: Person, registry: Served, document: str) -> None:
    text = (ROOT / document).read_text()
    shown = next((block for _, block in _blocks(text) if block.startswith("FROM")), _CONTAINERFILE)
    _give(stranger, stranger.home / "project/Containerfile", shown.encode())
    terminal = Terminal(stranger, registry, stranger.home)
    typed = [example for example in examples(text) if not example.command.startswith(tuple(_ELSEWHERE))]
    try:
        problems = [problem for example in typed if (problem := terminal.type(example, document))]
        assert not problems, "\n".join(problems)
        _remove_machines(stranger)
        for script in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            said = stranger.script(script)
            assert said == ("0 dev\n\n" if document == "README.md" else "")
    finally:
        _remove_machines(stranger)


def _remove_machines(person: Person) -> None:
    names = person.berth("ls", "-q").split()
    if names:
        person.berth("rm", "--force", *names)


# The parser ----------------------------------------------------------------------------------------------------------


def test_no_exception_is_stale() -> None:
    typed = [example.command for name in DOCUMENTS for example in examples((ROOT / name).read_text())]
    assert not [begin for begin in _ELSEWHERE if not any(command.startswith(begin) for command in typed)]


def test_commands_are_found() -> None:
    dialogue = "    $ one    # why\n    said\n    $ two\n"
    text = f"a\n\n{dialogue}\nb\n\n    berth three\n    cd four\n\n    a file\n\n```\n    $ no\n```\n"
    found = [Example(3, "one    # why", "said\n"), Example(5, "two", None), Example(9, "berth three", None)]
    assert list(examples(text)) == [*found, Example(10, "cd four", None)]


@pytest.mark.parametrize(
    ("printed", "said", "same"),
    [
        ("dev\n", "dev\n", True), ("dev\n", "", False), ("dev\n", "dev\ndev\n", False), ("dev\n", "den\n", False),
        ("a …\n", "a b c\n", True), ("a\n…\nb\n", "a\nb\n", True), ("a\n…\nb\n", "a\nx\ny\nb\n", True),
        ("a\n…\n", "b\na\n", False), ("a.c\n", "abc\n", False),
        ("x   10.1.2.3   1.5G   2026-11-22 21:15\n", "x 127.88.0.10 20M 2027-01-01 01:01\n", True),
        ("sha256:2633b1082a2c\n", "sha256:4cffa970f112\n", True), ("active\n", "inactive\n", False),
    ],
)  # fmt: skip
def test_what_is_printed_is_compared(printed: str, said: str, same: bool) -> None:
    assert looks_like(printed, said) is same
