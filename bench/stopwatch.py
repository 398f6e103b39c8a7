"""Runs programs and times them, as a process of its own: one JSON request a line on stdin, one answer on stdout.

It is started once in the place where a contender lives (as the ordinary user, in namespaces of its own …), so that how
one gets there is not measured. What is measured is posix_spawn until the program has been waited for, by
perf_counter; nothing runs beside. Stands alone: the standard library only, for whatever interpreter is at hand.
`bench.watch` talks to it and says what the requests mean.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_TAIL = 4000
_DEFAULT_SIGNALS = [signal.SIGPIPE, signal.SIGXFSZ]  # Python ignores them, and that would be inherited


class Background:
    """A program that stays, and process 1 of the container in it, when it told us that."""

    def __init__(self, pid: int, pidfd: int, leader: int | None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.leader = leader


class Stopwatch:
    """Answers requests. `deadline` is the time by which the programs of the present request must have ended."""

    def __init__(self) -> None:
        self._background: dict[str, Background] = {}
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._deadline = 0.0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        self._deadline = time.monotonic() + request["deadline"]
        match request["do"]:
            case "time":
                return self._time(request["steps"])
            case "many":
                return self._many(request["argvs"])
            case "memory":
                return self._memory(request["pids"], request.get("parent_of"))
            case what:
                return {"error": f"unknown request {what}"}

    # One after the other --------------------------------------------------------------------------------------------

    def _time(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        output, errors = _memory_file(), _memory_file()
        try:
            start = time.perf_counter()
            status, failed = 0, False
            for step in steps:
                status = self._step(step, output, errors)
                failed = status not in step["ok"]
                if failed:
                    break
            seconds = time.perf_counter() - start
            said = {"stdout": _read(output), "stderr": _read(errors)[-_TAIL:]}
        finally:
            os.close(output)
            os.close(errors)
        return {"seconds": seconds, "status": status, "failed": failed, **said}

    def _step(self, step: dict[str, Any], output: int, errors: int) -> int:
        if "await" in step:
            return self._wait_background(step["await"])
        argv = [self._fill(word) for word in step["argv"]]
        if step.get("background"):
            return self._start_background(step["background"], argv, errors)
        opened: list[int] = []
        try:
            stdin, stdout = self._null, output
            if step.get("stdin"):
                stdin = _open(opened, step["stdin"], os.O_RDONLY)
            if step.get("stdout"):
                stdout = _open(opened, step["stdout"], os.O_WRONLY)
            pids: list[int] = []
            if step.get("from"):
                stdin, end = _pipe(opened)
                pids.append(_spawn(step["from"], self._null, end, errors))
                _close(opened, end)
            if step.get("into"):
                end, stdout = _pipe(opened)
                pids.append(_spawn(step["into"], end, self._null, errors))
                _close(opened, end)
            pids.append(_spawn(argv, stdin, stdout, errors))
            while opened:
                os.close(opened.pop())
            statuses = [self._wait(pid) for pid in reversed(pids)]
            return statuses[0]  # the program's own; the others only have to be over
        finally:
            for fd in opened:
                os.close(fd)

    def _wait(self, pid: int) -> int:
        pidfd = os.pidfd_open(pid)
        try:
            if not _is_over(pidfd, self._deadline):
                os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            os.close(pidfd)

    # In the background ----------------------------------------------------------------------------------------------

    def _fill(self, word: str) -> str:
        if word.startswith("{leader:"):
            return str(self._background[word[8:-1]].leader)
        return word

    def _start_background(self, name: str, argv: list[str], errors: int) -> int:
        """Start a program that stays; return when it says READY=1 (sd_notify(3)) and the id of its process 1."""
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            address = os.path.join(folder, "notify")
            sock.bind(address)
            environment = {**os.environ, "NOTIFY_SOCKET": address}
            pid = _spawn(argv, self._null, self._null, errors, environment)
            background = Background(pid, os.pidfd_open(pid), None)
            self._background[name] = background
            words: dict[str, str] = {}
            while "READY" not in words or "X_NSPAWN_LEADER_PID" not in words:
                readable, _, _ = select.select(
                    [sock.fileno(), background.pidfd], [], [], self._deadline - time.monotonic()
                )
                if sock.fileno() not in readable:
                    return 1
                lines = sock.recv(65536).decode(errors="replace").splitlines()
                words |= {key: value for key, _, value in (line.partition("=") for line in lines)}
            background.leader = int(words["X_NSPAWN_LEADER_PID"])
        return 0

    def _wait_background(self, name: str) -> int:
        background = self._background.pop(name, None)
        if background is None:
            return 0
        try:
            if not _is_over(background.pidfd, self._deadline):
                os.kill(background.pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(background.pid, 0)[1])
        finally:
            os.close(background.pidfd)

    # All at once ----------------------------------------------------------------------------------------------------

    def _many(self, argvs: list[list[str]]) -> dict[str, Any]:
        """Start all at once; say of each when it began and ended, its status and what it wrote."""
        outputs = [_memory_file() for _ in argvs]
        errors = [_memory_file() for _ in argvs]
        results: list[dict[str, Any]] = []
        running: dict[int, int] = {}
        poller = select.poll()
        start = time.perf_counter()
        for index, argv in enumerate(argvs):
            began = time.perf_counter() - start
            pid = _spawn(argv, self._null, outputs[index], errors[index])
            pidfd = os.pidfd_open(pid)
            running[pidfd] = index
            poller.register(pidfd, select.POLLIN)
            results.append({"pid": pid, "began": began, "ended": 0.0, "status": 0, "stdout": "", "stderr": ""})
        while running:
            ready = poller.poll(max(0.0, self._deadline - time.monotonic()) * 1000)
            if not ready:
                for index in running.values():
                    os.kill(results[index]["pid"], signal.SIGKILL)
                self._deadline = time.monotonic() + 10
            for pidfd, _event in ready:
                result = results[running.pop(pidfd)]
                result["ended"] = time.perf_counter() - start
                result["status"] = os.waitstatus_to_exitcode(os.waitpid(result["pid"], 0)[1])
                poller.unregister(pidfd)
                os.close(pidfd)
        for index, result in enumerate(results):
            result |= {"stdout": _read(outputs[index]), "stderr": _read(errors[index])[-_TAIL:]}
            os.close(outputs[index])
            os.close(errors[index])
        return {"results": results}

    # Memory ---------------------------------------------------------------------------------------------------------

    def _memory(self, pids: list[str], parent_of: str | None) -> dict[str, Any]:
        """Say what processes hold, in bytes: {"name": …, "rss": …, "pss": …}; also the parent of `parent_of`."""
        wanted = [int(self._fill(word)) for word in pids]
        if parent_of is not None:
            stat = Path(f"/proc/{int(self._fill(parent_of))}/stat").read_text()
            wanted.append(int(stat.rpartition(")")[2].split()[1]))  # proc(5): the 2nd field after the name
        return {"processes": [process_memory(pid) for pid in wanted]}


def process_memory(pid: int) -> dict[str, Any]:
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    found: dict[str, Any] = {"pid": pid, "name": name}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("Rss", "Pss", "Private_Dirty"):
                found[key.lower()] = int(value.split()[0]) * 1024
    except OSError as error:  # another user's, or one that made itself undumpable (pasta)
        found["error"] = str(error)
    return found


def _spawn(argv: list[str], stdin: int, stdout: int, stderr: int, environment: dict[str, str] | None = None) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((stdin, stdout, stderr))]
    env = os.environ if environment is None else environment
    return os.posix_spawnp(argv[0], argv, env, file_actions=actions, setsigdef=_DEFAULT_SIGNALS)


def _is_over(pidfd: int, deadline: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _memory_file() -> int:
    return os.memfd_create("stopwatch", os.MFD_CLOEXEC)


def _read(fd: int) -> str:
    return os.pread(fd, 1 << 20, 0).decode(errors="replace")


def _open(opened: list[int], path: str, flags: int) -> int:
    opened.append(os.open(path, flags | os.O_CLOEXEC))
    return opened[-1]


def _pipe(opened: list[int]) -> tuple[int, int]:
    ends = os.pipe2(os.O_CLOEXEC)
    opened.extend(ends)
    return ends


def _close(opened: list[int], fd: int) -> None:
    opened.remove(fd)
    os.close(fd)


def main() -> None:
    stopwatch = Stopwatch()
    for line in sys.stdin:
        try:
            answer = stopwatch.answer(json.loads(line))
        except Exception as error:  # whatever it is, the other side must hear it
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
