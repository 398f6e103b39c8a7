"""The benchmarks' own parts: goals, tables, what importtime writes, the stopwatch."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from bench import measures, vms
from bench.__main__ import names_of_benchmarks
from bench.budget import Budget, Rounds
from bench.facts import Facts
from bench.goals import YARDSTICK, Goal, Part, Result, number, spread
from bench.imports import Import, own_imports, parse_importtime
from bench.report import BEGIN, END, Report, cells, head, markdown, terminal_table, write_docs
from bench.stopwatch import process_memory
from bench.turns import take_turns
from bench.watch import STOPWATCH, BenchError, Files, Step, Watch, watching

FACTS = Facts(
    "2026-11-22 15:00 UTC", "bench/run", "0.1.0", 2, "a processor", 24.0, "6.18.5", "Debian GNU/Linux 12",
    {"crun": "1.8.1"}, 0.1, {"root": "3.11.7"},
)  # fmt: skip


def result(**samples: list[float]) -> Result:
    goal = Goal(at_most=60, below=("podman", "lxc"), why={"lxc": "it is in C", "limit": "it is slow"})
    return Result("run", "root", "`run -- true`", "ms", goal, dict(samples))


def test_a_goal_is_met() -> None:
    good = result(berth=[20, 30, 40], podman=[100], lxc=[31])
    assert good.misses() == []
    assert good.verdict() == "met"
    assert good.ratio() == "0.97"


def test_a_missed_goal_says_by_how_much_and_why() -> None:
    bad = result(berth=[90], podman=[100], lxc=[6])
    assert bad.verdict() == "missed"
    assert [(miss.against, miss.why) for miss in bad.misses()] == [("limit", "it is slow"), ("lxc", "it is in C")]
    assert "90 ms where 60 was wanted (1.5 ×)" in bad.misses()[0].by


def test_a_peer_that_was_not_there_is_named() -> None:
    assert result(berth=[50], podman=[100]).verdict() == "met (without lxc)"


def test_what_could_not_be_measured_is_missed() -> None:
    lost = result(podman=[100])
    lost.absent["berth"] = "no machine"
    assert lost.verdict() == "missed"
    assert lost.misses()[0].why == "no machine"


def test_more_is_better_for_bytes() -> None:
    bulk = Result("bulk", "root", "cat", "MB/s", Goal(at_least=1000), {"berth": [800], "podman": [300], "x": [400]})
    assert bulk.verdict() == "missed"
    assert bulk.ratio() == "2.00"
    assert Result("bulk", "root", "cat", "MB/s", None, {"berth": [1]}).verdict() == ""


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (100, "100"), (20, "20"), (12.34, "12.3"), (1.234, "1.23"), (0.5, "0.50")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_spread_shows_the_middle_the_range_and_how_many() -> None:
    assert spread([5.0]) == "5 ×1"
    assert spread([1, 2, 3, 4, 50]) == "3 ±1 (1-50) ×5"


def test_a_multiple_of_a_peer_is_a_goal() -> None:
    goal = Goal(times={YARDSTICK: 1.5}, why={YARDSTICK: "it is more"})
    boot = Result("vm-cold", "root", "cold", "s", goal, {"berth": [2.9], YARDSTICK: [2.0]}, part="vm")
    assert goal.text("s") == "≤ 1.5 × bare kernel"
    assert (boot.verdict(), boot.ratio()) == ("met", "1.45")
    boot.samples["berth"] = [3.3]
    assert [(miss.against, miss.why) for miss in boot.misses()] == [(YARDSTICK, "it is more")]
    assert "3.30 s where 3 was wanted (1.1 ×)" in boot.misses()[0].by
    del boot.samples[YARDSTICK]
    assert boot.verdict() == "met (without bare kernel)"


# How often, and for how long ---------------------------------------------------------------------------------------


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_is_shared_by_weight() -> None:
    clock = Hands()
    budget = Budget(60, {"a": 10, "b": 20, "c": 30}, clock)
    assert budget.begin("a") == 10
    clock.now += 10
    assert budget.begin("b") == 20


def test_what_took_longer_is_missed_by_the_others_and_at_last_none_is_left() -> None:
    clock = Hands()
    budget = Budget(60, {"a": 20, "b": 20, "c": 20}, clock)
    budget.begin("a")
    clock.now += 40
    assert budget.begin("b") == 10
    clock.now += 40
    assert budget.begin("c") == 0


@pytest.mark.parametrize(
    ("seconds", "warm_up", "taken"),
    [
        (100.0, True, 10),  # enough for all
        (6.5, True, 5),  # one second each and one for the round that does not count
        (6.5, False, 6),
        (3.0, True, 3),  # the least: they take no more than twice the time
        (2.0, True, 3),
        (1.0, True, 1),
        (0.0, True, 1),
    ],
)
def test_rounds_go_by_what_a_round_takes(seconds: float, taken: int, *, warm_up: bool) -> None:
    clock, row = Hands(), result()

    class One:
        name = "berth"

    def measure(_one: One) -> float:
        clock.now += 1
        return 7.0

    take_turns(row, [One()], Rounds(3, 10, seconds), measure, warm_up=warm_up, clock=clock)
    assert row.samples == {"berth": [7.0] * taken}


def test_each_benchmark_has_its_share_of_the_time() -> None:
    assert {*measures.BENCHMARKS, *vms.BENCHMARKS} | {"pull", "adapt"} == set(names_of_benchmarks())


def report() -> Report:
    slow = result(berth=[90], lxc=[6])
    slow.extra = "2 modules"
    slow.absent["podman"] = "podman: status 125: no"
    others = [
        Result("stop", "user", "stop", "ms", None, {"berth": [1.0, 2.0]}),
        Result("vm-cold", "root", "boot", "s", Goal(times={YARDSTICK: 1.5}), {"berth": [2.0]}, part="vm"),
        Result("pull", "root", "pull", "s", None, {"berth": [1.0], "skopeo": [2.0]}, part="image"),
    ]
    return Report(FACTS, [slow, *others], ["a note"])


def test_a_report_survives_its_json() -> None:
    assert Report.from_json(report().to_json()) == report()


def test_another_schema_is_refused() -> None:
    document = json.loads(report().to_json())
    with pytest.raises(ValueError, match="schema 99"):
        Report.from_json(json.dumps({**document, "schema": 99}))


def test_the_tables_hold_everything() -> None:
    for text in (terminal_table(report()), markdown(report())):
        for words in (
            "Containers, as root", "Containers, as an ordinary user", "VMs, as root", "Images, as root",
            "`run -- true`", "missed", "2 modules", "status 125", "a note", "skopeo", YARDSTICK,
        ):  # fmt: skip
            assert words in text
        assert "VMs, as an ordinary user" not in text  # nothing was measured there
    text = markdown(report())
    assert "it is in C" in text
    assert "Linux 6.18.5" in text
    assert "Other programs were running" not in text
    for table in text.split("### ")[1:]:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


@pytest.mark.parametrize("part", ["container", "vm", "image"])
def test_a_row_has_the_columns_of_its_table(part: Part) -> None:
    row = dataclasses.replace(result(), part=part)
    assert len(cells(row)) == len(head(part))


def test_a_busy_machine_is_told() -> None:
    busy = dataclasses.replace(report(), facts=dataclasses.replace(FACTS, load=3.0))
    assert "Other programs were running" in markdown(busy)


def test_docs_are_rewritten_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_docs(page, report())
    write_docs(page, report())
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count(BEGIN) == text.count(END) == 1
    page.write_text("no markers")
    with pytest.raises(ValueError, match="no place for the table"):
        write_docs(page, report())


def test_the_docs_have_the_markers() -> None:
    text = (Path(__file__).parents[2] / "docs/performance.md").read_text()
    assert 0 < text.index(BEGIN) < text.index(END)
    for name in names_of_benchmarks():
        assert f" {name}" in text


def test_importtime_is_read() -> None:
    text = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       100 |        100 |   _io\n"
        "import time:       250 |        350 | site\nhello\n"
        "import time:        40 |         40 | berth.cli.run\n"
    )
    rows = parse_importtime(text)
    assert rows[0] == Import("_io", 100, 100)
    assert [row.name for row in own_imports(rows, {"_io", "site"})] == ["berth.cli.run"]


# The stopwatch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def watch(tmp_path: Path) -> Generator[Watch]:
    with watching([sys.executable, str(STOPWATCH)], log=tmp_path / "log") as found:
        yield found


def test_it_times_and_keeps_output(watch: Watch) -> None:
    assert 0 < watch.time(Step(("true",)), Step(("true",))) < 10
    assert watch.output("printf", "%s|", "a b", "") == "a b||"
    assert watch.output("sh", "-c", "echo x; exit 3", ok=(3,)) == "x\n"


def test_it_says_what_failed(watch: Watch) -> None:
    with pytest.raises(BenchError, match=r"sh -c echo no >&2; exit 4; true: status 4: no"):
        watch.time(Step(("sh", "-c", "echo no >&2; exit 4")), Step(("true",)))
    with pytest.raises(BenchError, match="FileNotFoundError"):
        watch.time(Step(("/nonexistent/program",)))
    assert watch.output("echo", "still there") == "still there\n"


def test_it_connects_files_and_pipes(watch: Watch, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("bytes")
    target.touch()
    watch.time(Step(("cat",), Files(stdin=str(source), stdout=str(target))))
    assert target.read_text() == "bytes"
    watch.time(Step(("cat",), Files(source=("printf", "more"), stdout=str(target))))
    assert target.read_text() == "more" + "s"
    watch.time(Step(("printf", "piped"), Files(sink=("tee", str(target)))))
    assert target.read_text() == "piped"


def test_it_runs_many_at_once(watch: Watch) -> None:
    ran = watch.many([["sh", "-c", f"echo {number}; exit {number}"] for number in range(4)])
    assert [(one.status, one.stdout) for one in ran] == [(number, f"{number}\n") for number in range(4)]
    assert all(0 <= one.began_s < one.ended_s for one in ran)


def test_it_ends_what_takes_too_long(watch: Watch) -> None:
    with pytest.raises(BenchError, match="status -9"):
        watch.time(Step(("sleep", "60")), deadline_s=0.05)
    assert watch.many([["sleep", "60"]], deadline_s=0.05)[0].status == -9


def test_a_background_program_says_when_it_is_ready(watch: Watch) -> None:
    script = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); "
        "s.connect(os.environ['NOTIFY_SOCKET']); "
        "s.send(b'READY=1\\nX_NSPAWN_LEADER_PID=%d\\n' % os.getpid()); sys.stdout.flush(); "
        "import signal; signal.pause()"
    )
    start = Step((sys.executable, "-c", script), background="one")
    watch.time(start)
    assert watch.memory("{leader:one}")[0].name.startswith("python")
    watch.time(Step(("kill", "{leader:one}")), Step(awaits="one", ok=(-15,)))


def test_memory_of_a_process() -> None:
    found = process_memory(os.getpid())
    assert found["rss"] >= found["pss"] > 0


def test_turns_drop_whoever_fails_and_the_first_round() -> None:
    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

    calls: list[str] = []

    def measure(contender: Fake) -> float:
        calls.append(contender.name)
        if contender.name == "bad" and len(calls) > 2:
            raise BenchError("broke")
        return float(len(calls))

    row = result()
    take_turns(row, [Fake("good"), Fake("bad")], Rounds(2, 2, 60), measure)
    assert row.samples == {"good": [3.0, 5.0]}
    assert row.absent == {"bad": "broke"}
    assert calls == ["good", "bad", "good", "bad", "good"]
