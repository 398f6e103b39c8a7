"""The near side of `bench.stopwatch`: what to time, said in types. Used by worlds, contenders and measures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from subprocess import Popen  # its type alone: proc.py starts it
from typing import Any

from berth import proc

DEADLINE_S = 120.0
STOPWATCH = Path(__file__).with_name("stopwatch.py")


class BenchError(Exception):
    """Something that is measured did not work. The message says what was run and what it said."""


@dataclasses.dataclass(frozen=True, slots=True)
class Files:
    """A program's standard files. stdin, stdout: paths (None: /dev/null, and stdout is kept). source, sink: programs
    that are piped into and out of it.
    """

    stdin: str | None = None
    stdout: str | None = None
    source: tuple[str, ...] | None = None
    sink: tuple[str, ...] | None = None


PLAIN = Files()


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One program. background: start it under this name and go on when it is ready; ``{leader:NAME}`` is then its
    process 1. awaits: wait for the end of that background program instead of starting one. ok: statuses that are fine.
    """

    argv: tuple[str, ...] = ()
    files: Files = PLAIN
    background: str | None = None
    awaits: str | None = None
    ok: tuple[int, ...] = (0,)

    def to_json(self) -> dict[str, object]:
        step: dict[str, object] = {
            "argv": self.argv, "stdin": self.files.stdin, "stdout": self.files.stdout, "from": self.files.source,
            "into": self.files.sink, "background": self.background, "ok": self.ok,
        }  # fmt: skip
        return step if self.awaits is None else {**step, "await": self.awaits}


@dataclasses.dataclass(frozen=True, slots=True)
class One:
    """One of many programs that ran at once: seconds after the common start, its status and what it wrote."""

    began_s: float
    ended_s: float
    status: int
    stdout: str
    stderr: str


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """What one process holds, in bytes; None where it may not be read. pss: shared pages divided by who shares them."""

    name: str
    rss: int | None
    pss: int | None


class Watch:
    """A running stopwatch: the place where one contender's programs are run."""

    def __init__(self, process: Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def time(self, *steps: Step, deadline_s: float = DEADLINE_S) -> float:
        """Run the steps one after the other; return the seconds they took. Raises BenchError when one fails."""
        return float(self._run(steps, deadline_s)["seconds"])

    def output(self, *argv: str, ok: Sequence[int] = (0,), deadline_s: float = DEADLINE_S) -> str:
        """Run a program; return its stdout. Raises BenchError."""
        return str(self._run([Step(argv, ok=tuple(ok))], deadline_s)["stdout"])

    def many(self, argvs: Sequence[Sequence[str]], *, deadline_s: float = DEADLINE_S) -> list[One]:
        """Start programs all at once; return when all have ended, whatever their statuses."""
        answer = self._ask({"do": "many", "argvs": argvs, "deadline": deadline_s})
        members = ("began", "ended", "status", "stdout", "stderr")
        return [One(*(one[member] for member in members)) for one in answer["results"]]

    def memory(self, *pids: str, parent_of: str | None = None) -> list[Memory]:
        """Say what processes (ids in the stopwatch's process namespace) hold, and the parent of `parent_of`."""
        answer = self._ask({"do": "memory", "pids": pids, "parent_of": parent_of, "deadline": DEADLINE_S})
        return [memory_from_json(one) for one in answer["processes"]]

    def _run(self, steps: Sequence[Step], deadline_s: float) -> dict[str, Any]:
        answer = self._ask({"do": "time", "steps": [step.to_json() for step in steps], "deadline": deadline_s})
        if answer["failed"]:
            shown = "; ".join(" ".join(step.argv) or f"wait for {step.awaits}" for step in steps)
            raise BenchError(f"{shown}: status {answer['status']}: {answer['stderr'].strip() or answer['stdout']}")
        return answer

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        line = stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"the stopwatch failed: {answer['error']}")
        return answer

    def _ended(self) -> BenchError:
        said = " ".join(self._log.read_text(errors="replace").split())
        return BenchError(f"the stopwatch has ended: {said[-500:]}")


def memory_from_json(one: dict[str, Any]) -> Memory:
    """Read what the stopwatch says of one process."""
    return Memory(str(one["name"]), one.get("rss"), one.get("pss"))


@contextlib.contextmanager
def watching(argv: Sequence[str], *, log: Path) -> Generator[Watch]:
    """Start a stopwatch by `argv`, which enters the place to measure in and runs bench/stopwatch.py there.

    log: where its own stderr goes. It ends with the block, and so does what lives in its process namespace.
    """
    with log.open("wb") as errors:
        # A session of its own: Ctrl-C is for us alone, who need it to take down what has been made.
        process = proc.spawn(argv, stdin=-1, stdout=-1, stderr=errors, new_session=True)
    try:
        yield Watch(process, log)
    finally:
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(timeout=10)
        except Exception:  # whatever it was: it has to end
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
