"""Every command: its help, its words, what it prints where, and its exit status; against machines in memory."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from berth.cli import commands, common
from berth.cli.main import main
from berth.config import KEYS, BootConfig, Change, apply_assignments
from berth.errors import BerthError, InvalidArgumentError, InvalidStateError, NotFoundError
from berth.layout import Layout
from berth.machineinfo import MachineInfo, Status
from berth.names import MachineName, parse_machine_name
from berth.progress import Progress
from berth.version import VERSION
from support import ROOT

ENTRIES = (*commands.MACHINES, *commands.IMAGES, *commands.SYSTEM)
DOCS = (ROOT / "docs/cli.md").read_text()


class FakeMachines:
    """Machines that live in a dictionary, with the behaviour that `berth.lifecycle.Machines` promises."""

    def __init__(self) -> None:
        states: dict[str, Status] = {"dev": "running", "old": "stopped", "odd": "broken"}
        self.infos = {
            MachineName(name): MachineInfo(
                MachineName(name), status, isolation="container", created="2026-11-22T14:16:00Z", default=name == "dev",
                problems=("config.json is damaged",) if status == "broken" else (),
            )
            for name, status in states.items()
        }  # fmt: skip
        self.boot = BootConfig()
        self.asked: list[object] = []

    def resolve(self, name: str | None) -> MachineName:
        if name is None:
            return MachineName("dev")
        if name not in self.infos:
            raise NotFoundError(f"machine '{name}' not found", hint="berth ls")
        return MachineName(name)

    def create(
        self, reference: str, *, name: str | None, boot_config: BootConfig, isolation: str, platform: str | None,
        boot: bool, set_default: bool, adapt: str, progress: Progress,
    ) -> MachineName:  # fmt: skip
        self.asked = [reference, isolation, platform, boot, set_default, adapt]
        self.boot = boot_config
        progress.step("making it")
        return MachineName(name or "debian-12")

    def start(self, name: str, *, progress: Progress) -> None:
        progress.step(f"starting {name}")
        self._become(name, "running")

    def stop(self, name: str, *, force: bool, timeout_s: float) -> None:
        self.asked = [force, timeout_s]
        self._become(name, "stopped")

    def restart(self, name: str, *, force: bool, timeout_s: float, progress: Progress) -> None:
        self.stop(name, force=force, timeout_s=timeout_s)
        self.start(name, progress=progress)

    def _become(self, name: str, status: Status) -> None:
        found = self.resolve(name)
        self.infos[found] = dataclasses.replace(self.infos[found], status=status)

    def remove(self, name: str, *, force: bool = False) -> None:
        found = self.resolve(name)
        if self.infos[found].status == "running" and not force:
            raise InvalidStateError(f"machine '{name}' is running", hint=f"berth rm --force {name}")
        del self.infos[found]

    def list(self) -> Sequence[MachineInfo]:
        return [*self.infos.values()]

    def inspect(self, name: str) -> MachineInfo:
        return self.infos[self.resolve(name)]

    def set(self, name: str, assignments: Sequence[str]) -> Sequence[Change]:
        self.resolve(name)
        self.boot, changes = apply_assignments(self.boot, assignments)
        return changes

    def set_default(self, name: str) -> None:
        self.asked = [self.resolve(name)]

    def logs(self, name: str, *, boot: bool, follow: bool, lines: int | None) -> Iterator[bytes]:
        self.asked = [name, boot, follow, lines]
        yield b"one\n"
        yield b"two \xff\n"

    def wait(self, name: str, *, target: str, timeout_s: float) -> str:
        self.asked = [name, target, timeout_s]
        return "degraded"

    def usage(self) -> Sequence[tuple[str, int]]:
        return [("images", 1024), ("machine dev", 2048)]

    def prune(self, progress: Progress) -> None:
        progress.step("removing")

    def start_autostart(self, progress: Progress) -> tuple[Sequence[MachineName], Sequence[BerthError]]:
        progress.step("starting")
        return [MachineName("dev")], [BerthError("machine 'odd' is broken")]

    def stop_autostart(self) -> Sequence[MachineName]:
        return [MachineName("dev")]

    def autostart_status(self) -> Sequence[MachineInfo]:
        return [self.infos[MachineName("dev")]]


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> FakeMachines:
    fake = FakeMachines()
    monkeypatch.setattr(common, "machines", lambda: fake)
    return fake


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def berth(layout: Layout, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process; give its status, stdout and stderr."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert layout.data

    def run(*words: str) -> tuple[int, str, str]:
        status = main(list(words))
        out, err = capfd.readouterr()
        return status, out, err

    return run


class TestHelp:
    @pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
    def test_every_command(self, entry: commands.Entry, berth: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        words = entry.name.split()
        status, text, err = berth(*words, "--help")
        assert (status, err) == (0, "")
        assert berth(*words, "-h") == berth("help", *words) == (0, text, "")
        for alias in entry.aliases:
            assert berth(*words[:-1], alias, "-h") == (0, text, "")
        assert text.startswith(f"Usage: berth {entry.name}")
        assert "\nExamples:\n" in text
        assert "--debug" in text
        assert max(map(len, text.splitlines())) <= 80
        assert len(text) > 350

    @pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
    def test_every_option_is_explained(self, entry: commands.Entry) -> None:
        parser, _ = commands.build(entry)
        for action in parser.actions():
            assert action.help, action.dest
            assert not action.help.endswith("."), action.dest

    def test_examples_are_commands_that_parse(self) -> None:
        for entry in ENTRIES:
            parser, _ = commands.build(entry)
            for line in re.findall(r"^  (berth [^\n]*)$", parser.format_help(), re.MULTILINE):
                first = re.split(r" (?:\||&&|>) ", line)[0]
                words = first.replace("'", "").split()[1:]
                if not words or words[0] == "run" or "~" in first or "$(" in first:
                    continue
                found, rest = commands.find(words)
                commands.build(found)[0].parse(rest)

    def test_overview(self, berth: Run) -> None:
        status, text, err = berth("--help")
        assert max(map(len, text.splitlines())) <= 80
        assert (status, err) == (0, "")
        assert berth("-h") == berth("help") == (0, text, "")
        for entry in ENTRIES:
            assert f"  {entry.name}" in text

    def test_nouns(self, berth: Run) -> None:
        for noun in ("machine", "m", "image", "system"):
            status, text, _ = berth(noun, "--help")
            assert status == 0
            assert berth(noun) == (2, "", text)

    def test_version(self, berth: Run) -> None:
        assert berth("--version") == (0, f"berth {VERSION}\n", "")
        assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text()


class TestUsage:
    @pytest.mark.parametrize(
        ("words", "message", "hint"),
        [
            (["bogus"], "unknown command 'bogus'", "berth --help"),
            (["strat"], "unknown command 'strat'", "did you mean 'berth start'?"),
            (["--bogus"], "unknown option --bogus", "berth --help"),
            (["machine", "bogus"], "unknown command 'machine bogus'", "berth machine --help"),
            (["machine", "image"], "unknown command 'machine image'", ""),
            (["image", "creat"], "unknown command 'image creat'", ""),
            (["image", "--quiet"], "'berth image' needs a command", "berth image --help"),
            (["create"], "the following arguments are required: IMAGE", "berth create --help"),
            (["create", "a", "b"], "unrecognized arguments: b", "berth create --help"),
            (["create", "a", "--cpus", "x"], "invalid number of CPUs 'x'", ""),
            (["create", "a", "--cpus="], "option --cpus needs a value", ""),
            (["create", "a", "--memory", "1"], "invalid memory size '1'", ""),
            (["create", "a", "--name", "-x"], "", "berth create --help"),
            (["create", "a", "--name", "X"], "invalid machine name 'X'", "must start and end with a letter or digit"),
            (["create", "A:b:c"], "invalid image reference 'A:b:c'", ""),
            (["create", "a", "--mount", "/nope/x"], "invalid mount '/nope/x'", ""),
            (["create", "a", "--isolation", "jail"], "invalid choice: 'jail'", ""),
            (["create", "a", "--platform", ""], "invalid platform ''", ""),
            (["ls", "x"], "unrecognized arguments: x", ""),
            (["ls", "--form", "json"], "unrecognized arguments: --form json", ""),
            (["stop", "-t", "soon"], "invalid number of seconds 'soon'", ""),
            (["stop", "-t", "-1"], "", "berth stop --help"),
            (["stop", "dev", "--all"], "names and --all can't be used together", ""),
            (["rm"], "no machine named", "berth rm"),
            (["set"], "the following arguments are required: KEY=VALUE", ""),
            (["set", "dev"], "invalid setting 'dev'", "KEY=VALUE"),
            (["set", "cpu=1"], "invalid setting 'cpu': no such key", "the keys are cpus, memory"),
            (["set-default"], "the following arguments are required: NAME", ""),
            (["logs", "-n", "x"], "invalid number of lines 'x'", ""),
            (["wait", "dev"], "the following arguments are required: --for", ""),
            (["wait", "--for", "moon"], "invalid choice: 'moon'", ""),
            (["inspect", "NAME"], "invalid machine name 'NAME'", ""),
            (["completion", "tcsh"], "invalid choice: 'tcsh'", ""),
            (["image", "save", "a"], "the following arguments are required: -o/--output", ""),
        ],
    )  # fmt: skip
    @pytest.mark.usefixtures("machines")
    def test_wrong(self, words: list[str], message: str, hint: str, berth: Run) -> None:
        status, out, err = berth(*words)
        assert (status, out) == (2, "")
        assert err.startswith("berth: ")
        assert message in err.splitlines()[0]
        assert err.splitlines()[1].startswith("hint: ")
        assert hint in err.splitlines()[1]

    def test_many_spellings_one_command(self) -> None:
        for entry in commands.MACHINES:
            for verb in (entry.verb, *entry.aliases):
                for words in ([verb], ["machine", verb], ["m", verb]):
                    assert commands.find([*words, "x"]) == (entry, ["x"])
        assert commands.find(["doctor"])[0].name == commands.find(["system", "doctor"])[0].name == "system check"

    def test_image_is_no_machine_command(self) -> None:
        for words in (["machine", "check"], ["m", "image", "ls"], ["image", "start"], ["system", "ls"]):
            with pytest.raises(InvalidArgumentError):
                commands.find(words)


class TestMachines:
    def test_create(self, machines: FakeMachines, berth: Run, tmp_path: Path) -> None:
        assert berth("create", "debian:12") == (0, "debian-12\n", "making it …\n")
        assert machines.asked == ["debian:12", "auto", None, True, False, "auto"]
        assert machines.boot == BootConfig()
        words = f"""create -n dev debian:12 --cpus 2 --memory 2G --disk 9G --home-mount ro --mount {tmp_path}:/a:ro
            --mount {tmp_path}:/b --expose .ssh -e A=1 --env B=2 --virtualization --no-boot --set-default
            --isolation container --platform arm64 --progress none --adapt never"""
        assert berth(*words.split()) == (0, "dev\n", "")
        assert machines.asked == ["debian:12", "container", "linux/arm64", False, True, "never"]
        same, _ = apply_assignments(
            BootConfig(),
            ["cpus=2", "memory=2G", "disk=9G", "home-mount=ro", f"mount+={tmp_path}:/a:ro", f"mount+={tmp_path}:/b",
             "expose+=.ssh", "env=A=1", "env=B=2", "virtualization=true"],
        )  # fmt: skip
        assert machines.boot == same

    def test_ls(self, machines: FakeMachines, berth: Run) -> None:
        status, text, err = berth("ls")
        assert (status, err) == (0, "")
        headings = ["NAME", "CREATED", "IP", "CPUS", "MEMORY", "DISK", "STATE", "ISOLATION", "DEFAULT"]
        assert text.splitlines()[0].split() == headings
        assert re.match(r"dev +2026-11-2\d \d\d:\d\d +- +- +- +- +running +container +\*$", text.splitlines()[1])
        assert "broken" in text
        assert berth("ls", "-q") == berth("m", "list", "--quiet") == (0, "dev\nodd\nold\n", "")
        status, text, _ = berth("ls", "--format", "json")
        assert json.loads(text) == [machines.infos[MachineName(name)].to_json() for name in ("dev", "odd", "old")]

    def test_inspect(self, machines: FakeMachines, berth: Run) -> None:
        status, text, err = berth("inspect", "odd")
        assert (status, err) == (0, "")
        assert json.loads(text)["problems"] == ["config.json is damaged"]
        assert json.loads(berth("inspect")[1])["id"] == "dev"
        assert set(json.loads(text)) == set(machines.infos[MachineName("dev")].to_json())

    def test_names_on_stdout_and_nothing_else(self, machines: FakeMachines, berth: Run) -> None:
        assert berth("start", "old", "dev") == (0, "old\ndev\n", "starting old …\nstarting dev …\n")
        assert berth("start", "--progress", "none") == (0, "dev\n", "")
        assert berth("stop", "dev", "old", "dev") == (0, "dev\nold\n", "")
        assert machines.asked == [False, 10.0]
        assert berth("stop", "dev", "--force", "-t", "2.5") == (0, "dev\n", "")
        assert machines.asked == [True, 2.5]
        assert berth("restart", "dev", "--progress=none") == (0, "dev\n", "")
        assert berth("set-default", "old") == (0, "old\n", "")

    def test_all(self, machines: FakeMachines, berth: Run) -> None:
        assert berth("stop", "--all") == (0, "dev\nodd\n", "")
        assert berth("start", "--all", "--progress", "none") == (0, "dev\nold\nodd\n", "")
        assert berth("rm", "--all", "--force") == (0, "dev\nold\nodd\n", "")
        assert machines.infos == {}

    @pytest.mark.usefixtures("machines")
    def test_one_failure_does_not_keep_the_others(self, berth: Run) -> None:
        status, out, err = berth("rm", "dev", "old", "gone")
        assert (status, out) == (1, "old\n")
        assert "machine 'dev' is running" in err
        assert "machine 'gone' not found" in err
        assert berth("rm", "gone") == (1, "", "berth: machine 'gone' not found\nhint: berth ls\n")
        assert berth("rm", "-f", "dev") == (0, "dev\n", "")

    @pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("YES\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
    @pytest.mark.usefixtures("machines")
    def test_a_running_one_is_asked_about_on_a_terminal(
        self, answer: str, status: int, berth: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(common, "can_ask", lambda: True)
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        got, out, err = berth("rm", "dev")
        assert (got, out) == (status, "" if status else "dev\n")
        assert "stop and delete it? [y/N]" in err

    def test_set(self, machines: FakeMachines, berth: Run) -> None:
        assert berth("set", "cpus=4", "autostart=true") == (
            0, "dev\n", "cpus will take effect after a restart\nautostart takes effect now\n",
        )  # fmt: skip
        assert machines.boot == BootConfig(cpus=4, autostart=True)
        status, out, err = berth("set", "-n", "old", "cpus=4")
        assert (status, out) == (0, "old\n")
        assert "nothing changes" in err
        assert berth("set", "-n", "gone", "cpus=4")[0] == 1

    def test_logs(self, machines: FakeMachines, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        assert main(["logs", "dev", "-n", "5", "--boot", "-f"]) == 0
        assert capfdbinary.readouterr().out == b"one\ntwo \xff\n"
        assert machines.asked == ["dev", True, True, 5]

    def test_wait(self, machines: FakeMachines, berth: Run) -> None:
        assert berth("wait", "--for", "init", "--timeout", "3") == (0, "degraded\n", "")
        assert machines.asked == ["dev", "init", 3.0]


@pytest.mark.usefixtures("machines")
class TestSystem:
    def test_df(self, berth: Run) -> None:
        assert berth("system", "df")[1].splitlines()[-1].split() == ["total", "3K"]
        assert json.loads(berth("system", "df", "--format", "json")[1]) == [
            {"what": "images", "bytes": 1024}, {"what": "machine dev", "bytes": 2048},
        ]  # fmt: skip

    def test_autostart(self, berth: Run) -> None:
        status, out, err = berth("system", "start", "--progress", "none")
        assert (status, out, err) == (1, "dev\n", "berth: machine 'odd' is broken\n")
        assert berth("system", "stop") == (0, "dev\n", "")
        assert berth("system", "status", "-q") == (0, "dev\n", "")
        assert json.loads(berth("system", "status", "--format", "json")[1])[0]["name"] == "dev"

    def test_check(self, berth: Run) -> None:
        status, out, _ = berth("system", "check", "--format", "json")
        checks = json.loads(out)
        assert status in (0, 1)
        assert {"name", "status", "version", "detail", "affects", "fix", "required", "optional"} == set(checks[0])
        assert berth("doctor", "-q")[1].splitlines() == [check["name"] for check in checks if check["status"] != "ok"]


class TestProcess:
    """What only a process of its own shows."""

    def run(self, *words: str, shell: str = "") -> subprocess.CompletedProcess[str]:
        script = f"{sys.executable} -m berth {' '.join(words)} {shell}"
        env = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "HOME": "/"}
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, timeout=60, check=False)

    def test_a_reader_that_leaves(self) -> None:
        done = self.run("--help", shell="| true; exit ${PIPESTATUS[0]}")
        assert done.returncode in (0, 141)  # 0: it was written before the reader left
        assert done.stderr == ""

    def test_a_full_disk(self) -> None:
        done = self.run("--help", shell="> /dev/full")
        assert (done.returncode, done.stderr) == (1, "berth: no space left on device\n")

    def test_a_signal_lets_it_clean_up(self, scratch: Path) -> None:
        mark = scratch / "cleaned"
        script = f"""
import os, pathlib, signal, time
from berth.cli import commands
from berth.cli.main import main
def work(words, *, debug):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        pathlib.Path({str(mark)!r}).touch()
commands.dispatch = work
raise SystemExit(main())
"""
        env = {"PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [sys.executable, "-c", script, "ls"], capture_output=True, env=env, timeout=50, check=False
        )
        assert (done.returncode, done.stderr) == (143, b"")
        assert mark.exists()

    def test_closed_standard_files(self) -> None:
        assert self.run("--version", shell="<&- >&- 2>&-").returncode == 0


class TestDocs:
    """docs/cli.md tells all of it."""

    def test_json_keys(self) -> None:
        for key in FakeMachines().infos[MachineName("dev")].to_json():
            assert f"`{key}`" in DOCS, key

    def test_settable_keys(self) -> None:
        for key in KEYS:
            assert re.search(
                rf"^\| `{key.name}` \|.*\| {'now' if key.when == 'now' else 'restart'} \|$", DOCS, re.MULTILINE
            )

    def test_commands_and_statuses(self) -> None:
        for entry in ENTRIES:
            assert f"`berth {entry.name}" in DOCS, entry.name
        for status in (0, 1, 2, 125, 126, 127, 130, 141):
            assert f"| {status} |" in DOCS


def test_fake_machines_are_like_the_real_ones() -> None:
    import inspect

    from berth.lifecycle import Machines

    for name, fake in vars(FakeMachines).items():
        if name.startswith("_"):
            continue
        real = inspect.signature(getattr(Machines, name)).parameters
        assert set(inspect.signature(fake).parameters) <= set(real), name
    assert parse_machine_name("dev")
