"""The program that runs inside namespaces: a Python process that calls `main`, started by `berth.userns` only.

It reads a request (one JSON line) from stdin, imports what it is to call, enters the namespace, becomes its root,
calls, and answers in JSON lines on stdout: progress, then the result or the error.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import cast

from berth import syscalls
from berth.errors import BerthError, UnsupportedError


def main() -> None:
    """Serve one request."""
    request = cast("dict[str, object]", json.loads(sys.stdin.buffer.readline()))
    try:
        answer({"result": _serve(request)})
    except BerthError as error:
        answer({"error": {"class": type(error).__name__, "message": error.message, "hint": error.hint or ""}})
        raise SystemExit(1) from error
    except OSError as error:
        answer({"error": {"class": "BerthError", "message": str(error), "hint": ""}})
        raise


def answer(message: dict[str, object]) -> None:
    """Send one JSON line to the process that started us."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def report(done: int, total: int | None) -> None:
    """Send progress in bytes."""
    answer({"done": done, "total": total})


def _serve(request: dict[str, object]) -> object:
    if "exec" in request:
        _enter(request)
        return _become(cast("list[str]", request["exec"]))
    module, _, function = str(request["call"]).partition(":")
    called = getattr(importlib.import_module(module), function)
    _enter(request)
    result = called(**cast("dict[str, object]", request["arguments"]))
    if request.get("become"):
        return _become(cast("list[str]", result), log=cast("int | None", request.get("log")))
    return result


def _enter(request: dict[str, object]) -> None:
    net = bool(request.get("net"))
    holder = request.get("holder")
    if request.get("new"):
        _enter_new(net=net and "exec" in request)
    elif isinstance(holder, int):
        enter(holder)
    if not request.get("outlives"):
        # After the change of ids, which clears it.
        syscalls.die_with_parent(signal.SIGKILL)


def _enter_new(*, net: bool) -> None:
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER | (syscalls.CLONE_NEWNET if net else 0))
    except OSError as error:
        raise UnsupportedError(
            f"this host does not allow user namespaces: {error.strerror}", hint="berth system check"
        ) from error
    answer({"unshared": os.getpid()})
    if b"mapped" not in sys.stdin.buffer.readline():
        raise BerthError("the ids of the user namespace could not be mapped")
    become_root()


def enter(holder: int) -> None:
    """Enter the user and network namespace of `holder` and become their root. Raises OSError."""
    user = os.open(f"/proc/{holder}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    network = os.open(f"/proc/{holder}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.setns(user, syscalls.CLONE_NEWUSER)
    become_root()
    syscalls.setns(network, syscalls.CLONE_NEWNET)
    os.close(user)
    os.close(network)


def become_root() -> None:
    """Become root of the user namespace that we are in."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _become(argv: list[str], *, log: int | None = None) -> object:
    """Turn into `argv`, detached from whoever started us, who learns of it by the end of our answers.

    log: the descriptor that takes what the program says; it is lost when there is none.
    """
    null = os.open("/dev/null", os.O_RDWR)
    answers = os.dup(1)  # closed by the exec
    os.chdir("/")
    for fd, target in ((0, null), (1, log or null), (2, log or null)):
        os.dup2(target, fd)
    try:
        os.execvp(argv[0], argv)  # noqa: S606 (a shell is what we do not want)
    except OSError:
        os.dup2(answers, 1)
        raise
