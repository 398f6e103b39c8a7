"""Completion: what may follow, and the scripts that ask."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from berth.cli.complete import candidates
from berth.cli.completion import SCRIPTS
from berth.images import Images
from berth.layout import Layout
from support import ROOT


@pytest.fixture(autouse=True)
def machines(layout: Layout) -> None:
    for name in ("dev", "demo", "test"):
        (layout.machines / name).mkdir(parents=True)
    (layout.machines / ".trash-x").mkdir()


def add_image(layout: Layout) -> None:
    """Put an image named debian:12 into the store."""
    program = layout.data / "rootfs/bin/sh"
    program.parent.mkdir(parents=True)
    shutil.copy("/bin/true", program)
    Images(layout).import_(layout.data / "rootfs", "debian:12")


def complete(*words: str) -> list[str]:
    return [candidate.partition("\t")[0] for candidate in candidates(words)]


class TestCandidates:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["cre"], ["create"]),
            (["st"], ["start", "stop"]),
            (["machine", "set"], ["set", "set-default"]),
            (["m", "in"], ["inspect"]),
            (["image", "l"], ["ls", "load"]),
            (["start", ""], ["demo", "dev", "test"]),
            (["start", "dev", "d"], ["demo", "dev"]),
            (["m", "start", "t"], ["test"]),
            (["inspect", "dev", ""], []),
            (["run", "-n", "de"], ["demo", "dev"]),
            (["run", "--name=de"], ["--name=demo", "--name=dev"]),
            (["run", "-itn", "t"], ["test"]),
            (["run", "-n", "dev", "ma"], [":file"]),
            (["run", "-n", "dev", "make", "-"], [":file"]),
            (["run", "--", "-"], [":file"]),
            (["--debug", "run", "--env-"], ["--env-file"]),
            (["stop", "--f"], ["--force"]),
            (["create", "--isolation", ""], ["auto", "container", "vm"]),
            (["create", "--isolation=v"], ["--isolation=vm"]),
            (["create", "--home-mount", "r"], ["ro", "rw"]),
            (["create", "--mount", ""], [":directory"]),
            (["set", "-n", "dev", "cp"], ["cpus="]),
            (["set", "autostart="], ["autostart=false", "autostart=true"]),
            (["set", "home-mount=n"], ["home-mount=none"]),
            (["completion", ""], ["bash", "fish", "zsh"]),
            (["system", "autostart", "d"], ["disable"]),
            (["ls", "--format", "j"], ["json"]),
            (["create", "rootfs:x"], [":file"]),
            (["image", "load", ""], [":file"]),
        ],
    )
    def test_words(self, words: list[str], expected: list[str]) -> None:
        assert sorted(complete(*words)) == sorted(expected)

    def test_first_words(self) -> None:
        found = complete("")
        assert {"create", "run", "ls", "image", "system", "machine", "--help"} <= set(found)
        assert "__complete" not in found

    def test_images(self, layout: Layout) -> None:
        add_image(layout)
        assert complete("create", "deb") == ["debian:12"]
        assert complete("image", "rm", "debian:") == ["debian:12"]

    def test_nonsense_is_silence(self, capfd: pytest.CaptureFixture[str]) -> None:
        from berth.cli.complete import main

        for words in ([], ["bogus", ""], ["image", "bogus", ""], ["--debug"], ["\udcff", ""], ["run", "-zzz", ""]):
            assert main(words) == 0
        assert capfd.readouterr().err == ""


@pytest.fixture
def berth_on_path(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scratch / "bin/berth"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "from berth.cli.main import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


def ask_bash(line: str, *, breaks: str) -> list[str]:
    """Return what bash would offer for `line`; its words are split as readline does it."""
    words = line.split(" ")
    program = f"""
    {SCRIPTS["bash"]}
    COMP_WORDBREAKS={shlex.quote(breaks)}
    COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}
    COMP_WORDS=({" ".join(map(shlex.quote, words))}) COMP_CWORD={len(words) - 1}
    _berth
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return sorted(done.stdout.split("\n")[:-1])


@pytest.mark.usefixtures("berth_on_path")
class TestBash:
    @pytest.mark.parametrize(
        ("line", "offered"),
        [
            ("berth sta", ["start"]),
            ("berth start d", ["demo", "dev"]),
            ("berth start ", ["demo", "dev", "test"]),
            ("berth run --name=de", ["demo", "dev"]),
            ("berth set home-mount=", ["none", "ro", "rw"]),
            ("berth bogus ", [""]),
        ],
    )
    def test_offers(self, line: str, offered: list[str]) -> None:
        assert ask_bash(line, breaks=" \t\n\"'@><=;|&(:") == offered

    def test_where_nothing_breaks_words(self) -> None:
        assert ask_bash("berth run --name=de", breaks=" \t\n") == ["--name=demo", "--name=dev"]

    def test_image_references(self, layout: Layout) -> None:
        add_image(layout)
        assert ask_bash("berth create debian:", breaks=" :=") == ["12"]
        assert ask_bash("berth create debian:", breaks=" ") == ["debian:12"]

    def test_files(self, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (scratch / "a b").mkdir()
        (scratch / "a c").touch()
        monkeypatch.chdir(scratch)
        assert ask_bash("berth create --mount a", breaks=" :=") == ["a b"]
        assert ask_bash("berth image load a", breaks=" :=") == ["a b", "a c"]


@pytest.mark.parametrize(
    ("shell", "check"), [("bash", ["bash", "-n"]), ("zsh", ["zsh", "-n"]), ("fish", ["fish", "--no-execute"])]
)
def test_syntax(shell: str, check: list[str], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(SCRIPTS[shell])
    subprocess.run([*check, str(tmp_path / "script")], check=True, timeout=60)
