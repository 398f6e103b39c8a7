"""User namespaces: which ids map where, and how our code gets into one. Layer 1; used by the engines, net, images.

For an ordinary user the map keeps the user's own id and fills the rest from /etc/subuid (newuidmap writes it);
for root every id is shifted to a range that belongs to nobody on the host.
The code that runs inside is `berth.inside`, started as a fresh process: no fork of a caller that may have threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

from berth import errors
from berth.errors import BerthError, CommandError, DeadlineError, UnsupportedError
from berth.log import log
from berth.proc import require_program, run, spawn

# Beyond the ranges of useradd (subuid) and of systemd-nspawn (524288 to 1879048191), below 2^31.
ROOT_BASE = 0x7148_0000
ROOT_SIZE = 1 << 20  # so that users inside can have subordinate ids of their own (100000 and up)
SIZE = 65536
_START_S = 20.0


class Extent(NamedTuple):
    """`size` ids from `inside` on are the ids from `outside` on."""

    inside: int
    outside: int
    size: int


class IdMap(NamedTuple):
    """The id maps of a user namespace. Source: user_namespaces(7)."""

    uids: tuple[Extent, ...]
    gids: tuple[Extent, ...]

    def nested(self) -> IdMap:
        """The identity map for a namespace inside this one: one line an extent, as the kernel wants it."""

        def identity(extents: tuple[Extent, ...]) -> tuple[Extent, ...]:
            return tuple(Extent(extent.inside, extent.inside, extent.size) for extent in extents)

        return IdMap(identity(self.uids), identity(self.gids))

    def host_root(self) -> int:
        """The host's uid of the namespace's root."""
        return next(extent.outside for extent in self.uids if extent.inside == 0)


def plan_idmap(uid: int, gid: int) -> IdMap:
    """Say which map a machine of this user gets.

    Raises UnsupportedError when an ordinary user has no subordinate ids.
    """
    if uid == 0:
        shifted = (Extent(0, ROOT_BASE, ROOT_SIZE),)
        return IdMap(shifted, shifted)
    name = pwd.getpwuid(uid).pw_name
    return IdMap(
        _keep_id(uid, *_subordinate_range(Path("/etc/subuid"), name, uid)),
        _keep_id(gid, *_subordinate_range(Path("/etc/subgid"), name, uid)),
    )


def _keep_id(own: int, start: int, count: int) -> tuple[Extent, ...]:
    size = min(count, SIZE)
    if own >= size:
        return (Extent(0, start, size), Extent(own, own, 1))
    return tuple(
        extent
        for extent in (
            Extent(0, start, own),
            Extent(own, own, 1),
            Extent(own + 1, start + own, size - own - 1),
        )
        if extent.size
    )


def _subordinate_range(path: Path, name: str, uid: int) -> tuple[int, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        owner, _, rest = line.partition(":")
        start, _, count = rest.partition(":")
        if owner in (name, str(uid)) and start.isdecimal() and count.isdecimal() and int(count) >= SIZE - 1:
            return int(start), int(count)
    raise UnsupportedError(
        f"user {name} has no range of {SIZE} ids in {path}",
        hint=f"sudo {range_command(name)}",
    )


def range_command(user: str) -> str:
    """Write the command by which root gives `user` a range that nobody has."""
    start = next_free_range(Path("/etc/subuid"), Path("/etc/subgid"))
    span = f"{start}-{start + SIZE - 1}"
    return f"usermod --add-subuids {span} --add-subgids {span} {user}"


def next_free_range(*files: Path) -> int:
    """Find where the next 65536 subordinate ids can start: after every range that is given away already."""
    end = 100_000
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            _, _, rest = line.partition(":")
            start, _, count = rest.partition(":")
            if start.isdecimal() and count.isdecimal():
                end = max(end, int(start) + int(count))
    return end


def start_in_new(argv: Sequence[str], idmap: IdMap, *, net: bool, pass_fds: Sequence[int] = ()) -> int:
    """Start a program that outlives us as root of a new user (and network) namespace; return its process id.

    Raises UnsupportedError when the host forbids user namespaces, BerthError when the program can't be started.
    """
    request = {"exec": list(argv), "new": True, "net": net}
    with _Inside(request, idmap, pass_fds=pass_fds, new_session=True) as child:
        child.map_ids()
        child.started()
        return child.pid


def start_prepared(
    function: str,
    arguments: Mapping[str, object],
    *,
    idmap: IdMap | None = None,
    pass_fds: Sequence[int] = (),
    log_fd: int | None = None,
) -> int:
    """Run ``module:function`` as `call` does, then become the program whose argv it returns; return its process id.

    That program outlives us. The function prepares what it is to find: mounts, limits. log_fd: takes what it says.
    Raises what the function raised, BerthError when the program can't be executed.
    """
    request = {
        "call": function, "arguments": dict(arguments), "new": idmap is not None, "become": True, "log": log_fd,
    }  # fmt: skip
    inherited = [*pass_fds, *([] if log_fd is None else [log_fd])]
    with _Inside(request, idmap, pass_fds=inherited, new_session=True) as child:
        if idmap is not None:
            child.map_ids()
        child.started()
        return child.pid


def enter_command(pid: int, argv: Sequence[str]) -> list[str]:
    """Say how to run `argv` as root inside the user and network namespace of `pid`."""
    return ["nsenter", "-t", str(pid), "-U", "-n", "-S", "0", "-G", "0", "--", *argv]


def call(
    function: str,
    arguments: Mapping[str, object],
    *,
    idmap: IdMap | None = None,
    holder: int | None = None,
    prefix: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    progress: Callable[[int, int | None], None] = lambda _done, _total: None,
    on_start: Callable[[Callable[[], None]], None] = lambda _end: None,
    timeout_s: float | None = None,
) -> object:
    """Run ``module:function`` of berth in a fresh process and return what it returns (JSON).

    With `idmap` it runs as root of a new user namespace; with `holder` inside the user and network namespace of that
    process; with neither just as we are. `arguments` are its keyword arguments. Its module is imported before the
    namespace is entered, because afterwards our own files may be out of reach. `prefix` is a command that starts it
    (systemd-run …). Errors that berth raised inside are raised here again, as what they were. `on_start` is handed what
    another thread may end the process with; then CommandError is raised. Without `timeout_s` it ends with us at the
    latest; with it, DeadlineError is raised.
    """
    request = {"call": function, "arguments": dict(arguments), "new": idmap is not None, "holder": holder, "net": True}
    with _Inside(request, idmap, prefix=prefix, pass_fds=pass_fds) as child, child.within(timeout_s, function):
        on_start(child.end)
        if idmap is not None:
            child.map_ids()
        return child.result(progress)


class _Inside:
    """One child that runs `berth.inside`: request on its stdin, JSON lines from its stdout."""

    def __init__(
        self,
        request: Mapping[str, object],
        idmap: IdMap | None,
        *,
        prefix: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        new_session: bool = False,
    ) -> None:
        self._idmap = idmap
        # -P: nothing is imported from the working directory; PYTHONPATH: wherever we were imported from; -S: nothing
        # else is needed, and 3 ms are saved; no -m: it would take 2 ms, and `berth.inside` would be imported twice.
        argv = [*prefix, sys.executable, "-P", "-S", "-c", "from berth.inside import main; main()"]
        env = {"PYTHONPATH": str(Path(__file__).parent.parent)}
        self._outlives = new_session
        # -1 is PIPE; `proc` alone imports subprocess.
        self._process = spawn(argv, stdin=-1, stdout=-1, stderr=-1, env=env, pass_fds=pass_fds, new_session=new_session)
        self.pid = self._process.pid
        self._send({**request, "outlives": new_session})

    def __enter__(self) -> _Inside:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        if error is not None:
            self._process.kill()
        if error is None and self._outlives:
            self._process.returncode = 0  # not ours to wait for
        elif error is None:
            # Its result is here; what the kernel takes down with its namespaces costs tens of milliseconds.
            threading.Thread(target=self._process.wait, daemon=True).start()
        else:
            self._process.wait(timeout=_START_S)

    def end(self) -> None:
        """End the process at once; whoever waits for its answer learns of it."""
        self._process.kill()

    @contextlib.contextmanager
    def within(self, timeout_s: float | None, what: str) -> Generator[None]:
        """Give a block so much time: then the process is ended and DeadlineError raised."""
        if timeout_s is None:
            yield
            return
        late = threading.Event()

        def expire() -> None:
            late.set()
            self.end()

        timer = threading.Timer(timeout_s, expire)  # whoever waits for an answer is blocked in readline
        timer.daemon = True
        timer.start()
        try:
            yield
        except CommandError as error:
            if not late.is_set():
                raise
            raise DeadlineError(f"{what} did not finish within {timeout_s:g} s") from error
        finally:
            timer.cancel()

    def _send(self, message: Mapping[str, object]) -> None:
        stdin = cast("IO[bytes]", self._process.stdin)
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            log.debug("the process inside the namespace ended early")

    def _message(self) -> dict[str, object]:
        stdout = cast("IO[bytes]", self._process.stdout)
        line = stdout.readline()
        if not line:
            said = cast("IO[bytes]", self._process.stderr).read()[-8192:].decode(errors="replace")
            status = self._process.wait(timeout=_START_S)
            raise CommandError(("berth.inside",), status, said)
        return cast("dict[str, object]", json.loads(line))

    def map_ids(self) -> None:
        """Wait until the child has its namespace, write its maps, let it go on."""
        message = self._message()
        if "unshared" not in message:
            _raise(message)
        pid = str(message["unshared"])
        if self._idmap is not None:
            write_map(pid, "uid", self._idmap.uids)
            write_map(pid, "gid", self._idmap.gids)
        self._send({"mapped": True})

    def started(self) -> None:
        """Wait until the child has become its program: only then may its namespaces be opened by others."""
        line = cast("IO[bytes]", self._process.stdout).readline()
        if line:
            _raise(cast("dict[str, object]", json.loads(line)))

    def result(self, progress: Callable[[int, int | None], None]) -> object:
        """Read until the result; hand progress on. Raises what the child raised."""
        while True:
            message = self._message()
            match message:
                case {"done": int(done)}:
                    total = message.get("total")
                    progress(done, total if isinstance(total, int) else None)
                case {"result": value}:
                    return value
                case _:
                    _raise(message)


def write_map(pid: str, kind: str, extents: Sequence[Extent]) -> None:
    """Give the user namespace of `pid` its map (`kind`: uid, gid), by hand as root, else by newuidmap."""
    if os.geteuid() == 0:
        text = "\n".join(f"{e.inside} {e.outside} {e.size}" for e in extents)
        Path(f"/proc/{pid}/{kind}_map").write_text(text)
        return
    program = f"new{kind}map"
    require_program(program, package="uidmap")
    run([program, pid, *(str(number) for extent in extents for number in extent)], timeout_s=_START_S)


def _raise(message: Mapping[str, object]) -> None:
    match message:
        case {"error": {"class": str(name), "message": str(text), "hint": str(hint)}}:
            kind: object = getattr(errors, name, BerthError)
            if kind in (CommandError, errors.AgentError) or not (
                isinstance(kind, type) and issubclass(kind, BerthError)
            ):
                raise BerthError(text, hint=hint or None)  # those two are made from other things than a message
            raise kind(text, hint=hint or None)
        case _:
            raise BerthError(f"unexpected answer from inside the namespace: {message!r:.200}")
