"""The messages of the protocol, typed. Owns the check of what the other side says and the JSON of what we say.

Used by whoever speaks the protocol. `decode_to_host` and `decode_to_guest` turn a checked MESSAGE payload into one of
the classes here or raise ProtocolError; each class's `document` is its JSON. Source: docs/protocol.md.
"""

from __future__ import annotations

from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64

from berth.errors import ProtocolError
from berth.wire.frames import STDERR, STDIN, STDOUT
from berth.wire.jsontext import decode_object, is_list, is_object
from berth.wire.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import ClassVar, TypeAlias

    from _typeshed import ReadableBuffer

    Json: TypeAlias = dict[str, object]

PROTOCOL = 1
STATES = ("starting", "running", "degraded", "stopping", "unknown")
SYSTEMS = ("systemd", "openrc", "sysvinit", "busybox", "none", "other")
_MAX_TEXT = 4096  # characters of the guest's words that are kept

# The guest is a Linux, whatever the host is, so its signals are Linux's (arch-independent for x86, arm, riscv).
# Source: signal(7).
SIGNALS = {
    "HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "TRAP": 5, "ABRT": 6, "IOT": 6, "BUS": 7, "FPE": 8, "KILL": 9, "USR1": 10,
    "SEGV": 11, "USR2": 12, "PIPE": 13, "ALRM": 14, "TERM": 15, "STKFLT": 16, "CHLD": 17, "CONT": 18, "STOP": 19,
    "TSTP": 20, "TTIN": 21, "TTOU": 22, "URG": 23, "XCPU": 24, "XFSZ": 25, "VTALRM": 26, "PROF": 27, "WINCH": 28,
    "IO": 29, "POLL": 29, "PWR": 30, "SYS": 31,
}  # fmt: skip


class Message(Record):
    """Base of all messages; `type` is the member of that name."""

    type: ClassVar[str]

    def document(self) -> Json:
        """Return the message as JSON has it."""
        return {"type": type(self).type}


class TerminalSize(Record):
    """Rows and columns of a terminal, 1 to 65535 each."""

    rows: int
    cols: int


# ---- both ways


class Hello(Message):
    """The first message of each side. The client says its role, the agent the state of the init."""

    type = "hello"
    protocol: int = PROTOCOL
    version: str
    role: str | None = None
    init: str | None = None

    def document(self) -> Json:
        own: Json = {"role": self.role} if self.role is not None else {"init": self.init}
        return {"type": "hello", "protocol": self.protocol, "version": self.version, **own}


class Fatal(Message):
    """The last message of a connection: the other side broke the protocol, or speaks another."""

    type = "fatal"
    code: str
    message: str

    def document(self) -> Json:
        return {"type": "fatal", "code": self.code, "message": self.message}


class Started(Message):
    """The command runs (pid in the guest), or the bytes of a dialled port may flow (no pid)."""

    type = "started"
    pid: int | None = None

    def document(self) -> Json:
        return {"type": "started"} if self.pid is None else {"type": "started", "pid": self.pid}


class Error(Message):
    """The request of this stream failed."""

    type = "error"
    code: str
    message: str

    def document(self) -> Json:
        return {"type": "error", "code": self.code, "message": self.message}


class Closed(Message):
    """The connection that this stream carried has ended."""

    type = "closed"


# ---- to the guest


class ExecRequest(Message):
    """Run a command. argv, env (``K=V``) and cwd are exact bytes; no argv is a login shell; no user is the twin.

    shell: argv, joined by spaces, is evaluated by the user's login shell. cwd_optional: where it can't be entered, the
    home is taken. tty: a pseudo-terminal of that size. detach: the command has no standard files and outlives us.
    """

    type = "exec"
    argv: tuple[bytes, ...]
    shell: bool = False
    env: tuple[bytes, ...] = ()
    cwd: bytes | None = None
    cwd_optional: bool = False
    user: str | None = None
    tty: TerminalSize | None = None
    detach: bool = False

    def document(self) -> Json:
        size = self.tty and {"rows": self.tty.rows, "cols": self.tty.cols}
        return {
            "type": "exec", "argv": _all_base64(self.argv), "shell": self.shell, "env": _all_base64(self.env),
            "cwd": None if self.cwd is None else _base64(self.cwd), "cwdOptional": self.cwd_optional,
            "user": self.user, "tty": size, "detach": self.detach,
        }  # fmt: skip


class Resize(Message):
    """The terminal has a new size."""

    type = "resize"
    size: TerminalSize

    def document(self) -> Json:
        return {"type": "resize", "rows": self.size.rows, "cols": self.size.cols}


class Signal(Message):
    """Send a signal to the command: a name of SIGNALS, or a decimal number."""

    type = "signal"
    signal: str

    def document(self) -> Json:
        return {"type": "signal", "signal": self.signal}


class Close(Message):
    """Nobody reads this kind of data any more: STDOUT or STDERR."""

    type = "close"
    kind: int

    def document(self) -> Json:
        return {"type": "close", "kind": self.kind}


class StatusRequest(Message):
    """Ask how the guest is."""

    type = "status"


class WaitRequest(Message):
    """Ask to be told when the init has settled."""

    type = "wait"
    until: str = "init"

    def document(self) -> Json:
        return {"type": "wait", "for": self.until}


class PowerOffRequest(Message):
    """Ask the init to power off."""

    type = "poweroff"


class DialRequest(Message):
    """Connect to a TCP port of the guest's loopback."""

    type = "dial"
    port: int

    def document(self) -> Json:
        return {"type": "dial", "port": self.port}


class ListenersRequest(Message):
    """Ask which TCP ports listen, now and from now on."""

    type = "listeners"


class Cancel(Message):
    """Ask a stream without an end to end."""

    type = "cancel"


class ConsoleRequest(Message):
    """Ask for a new console (container only)."""

    type = "console"


class ClockRequest(Message):
    """Set the guest's clock: nanoseconds since 1970."""

    type = "clock"
    unix_nanos: int

    def document(self) -> Json:
        return {"type": "clock", "unixNanos": self.unix_nanos}


# ---- to the host


class Exit(Message):
    """The command has ended: by itself with a code, or by a signal (one of the two is None)."""

    type = "exit"
    code: int | None = None
    signal: str | None = None

    @property
    def status(self) -> int:
        """The status that a shell shows: the code, or 128 + the number of the signal."""
        if self.code is not None:
            return self.code
        return 128 + parse_signal(self.signal or "")

    def document(self) -> Json:
        return {"type": "exit", "code": self.code} if self.signal is None else {"type": "exit", "signal": self.signal}


class Result(Message):
    """The answer to a request; which members it has depends on the request."""

    type = "result"
    members: Json

    def document(self) -> Json:
        return {**self.members, "type": "result"}


class Listening(Message):
    """The TCP ports that listen now."""

    type = "listening"
    ports: tuple[int, ...]

    def document(self) -> Json:
        return {"type": "listening", "ports": list(self.ports)}


class Open(Message):
    """Somebody in the guest connected to a service of the host's (keeper only)."""

    type = "open"
    service: str

    def document(self) -> Json:
        return {"type": "open", "service": self.service}


class AgentStatus(Record):
    """How the guest is. init: of STATES; system: of SYSTEMS; twin: ``ready``, ``pending``, ``failed: …``; uptime_s."""

    init: str
    system: str
    version: str
    twin: str
    uptime_s: float


if TYPE_CHECKING:
    ToGuest: TypeAlias = (
        Hello | Fatal | Started | Error | Closed | ExecRequest | Resize | Signal | Close | StatusRequest | WaitRequest
        | PowerOffRequest | DialRequest | ListenersRequest | Cancel | ConsoleRequest | ClockRequest
    )  # fmt: skip
    ToHost: TypeAlias = Hello | Fatal | Started | Error | Closed | Exit | Result | Listening | Open

# What opens a stream; everything else belongs to one that is open.
REQUESTS = frozenset(("exec", "status", "wait", "poweroff", "dial", "listeners", "console", "clock"))


class UnknownMessageError(ProtocolError):
    """A message of a type that this side does not know."""


def decode_to_host(payload: ReadableBuffer) -> ToHost:
    """Read a message of the agent's. Raises ProtocolError."""
    document, kind = _decode(payload)
    parse = _TO_HOST.get(kind)
    if parse is None:
        raise UnknownMessageError(f"a message of unknown type '{_clean(kind):.40}'")
    return parse(document)


def decode_to_guest(payload: ReadableBuffer) -> ToGuest:
    """Read a message of the host's. Raises ProtocolError."""
    document, kind = _decode(payload)
    parse = _TO_GUEST.get(kind)
    if parse is None:
        raise UnknownMessageError(f"a message of unknown type '{_clean(kind):.40}'")
    return parse(document)


def parse_status(result: Result) -> AgentStatus:
    """Read the answer to a StatusRequest. Raises ProtocolError."""
    found = result.members
    return AgentStatus(
        init=_choice(found, "init", STATES), system=_choice(found, "system", SYSTEMS), version=_text(found, "version"),
        twin=_text(found, "twin"), uptime_s=_seconds(found, "uptime"),
    )  # fmt: skip


def parse_init(result: Result) -> str:
    """Read the answer to a WaitRequest: one of STATES. Raises ProtocolError."""
    return _choice(result.members, "init", STATES)


def parse_signal(name: str) -> int:
    """Return the number of a Linux signal, named without SIG or given as a number. Raises ProtocolError."""
    number = SIGNALS.get(name, 0)
    if not number and name.isascii() and name.isdigit() and len(name) < 3:
        number = int(name)
    if not 0 < number <= 64:
        raise ProtocolError(f"no signal is called '{_clean(name):.20}'")
    return number


# ---- reading


def _decode(payload: ReadableBuffer) -> tuple[Json, str]:
    document = decode_object(payload)
    kind = document.get("type")
    if not isinstance(kind, str):
        raise ProtocolError("a message without a type")
    return document, kind


def _wrong(document: Json, name: str) -> ProtocolError:
    return ProtocolError(f"message '{document.get('type')}' has no valid '{name}'")


def _clean(text: str) -> str:
    # The guest's words end up on the host's terminal: no escape sequences, no lone surrogates, no novels.
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_TEXT])


def _text(document: Json, name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str):
        raise _wrong(document, name)
    return _clean(value)


def _maybe_text(document: Json, name: str) -> str | None:
    return None if document.get(name) is None else _text(document, name)


def _choice(document: Json, name: str, choices: tuple[str, ...]) -> str:
    value = document.get(name)
    if not isinstance(value, str) or value not in choices:
        raise _wrong(document, name)
    return value


def _whole(document: Json, name: str, low: int, high: int) -> int:
    value = document.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(document, name)
    return value


def _flag(document: Json, name: str) -> bool:
    value = document.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(document, name)
    return value


def _seconds(document: Json, name: str) -> float:
    value = document.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise _wrong(document, name)
    return float(value)


def _bytes(document: Json, name: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise _wrong(document, name)
    try:
        return a2b_base64(value, strict_mode=True)
    except (Base64Error, ValueError):  # ValueError: not ASCII
        raise _wrong(document, name) from None


def _many_bytes(document: Json, name: str) -> tuple[bytes, ...]:
    value = document.get(name, [])
    if not is_list(value):
        raise _wrong(document, name)
    return tuple(_bytes(document, name, item) for item in value)


def _size(document: Json) -> TerminalSize:
    return TerminalSize(rows=_whole(document, "rows", 1, 65535), cols=_whole(document, "cols", 1, 65535))


def _hello(document: Json) -> Hello:
    return Hello(
        protocol=_whole(document, "protocol", 0, 2**31), version=_text(document, "version"),
        role=_maybe_text(document, "role"), init=_maybe_text(document, "init"),
    )  # fmt: skip


def _fatal(document: Json) -> Fatal:
    return Fatal(code=_text(document, "code"), message=_text(document, "message"))


def _started(document: Json) -> Started:
    return Started(pid=None if document.get("pid") is None else _whole(document, "pid", 1, 2**31))


def _error(document: Json) -> Error:
    return Error(code=_text(document, "code"), message=_text(document, "message"))


def _exit(document: Json) -> Exit:
    if document.get("signal") is None:
        return Exit(code=_whole(document, "code", 0, 255))
    signal = _text(document, "signal")
    parse_signal(signal)
    return Exit(signal=signal)


def _result(document: Json) -> Result:
    return Result(members={name: value for name, value in document.items() if name != "type"})


def _listening(document: Json) -> Listening:
    ports = document.get("ports")
    if not is_list(ports) or len(ports) > 1024:
        raise _wrong(document, "ports")
    return Listening(ports=tuple(_whole({"ports": port}, "ports", 1, 65535) for port in ports))


def _exec(document: Json) -> ExecRequest:
    tty, cwd = document.get("tty"), document.get("cwd")
    if tty is not None and not is_object(tty):
        raise _wrong(document, "tty")
    return ExecRequest(
        argv=_many_bytes(document, "argv"), shell=_flag(document, "shell"), env=_many_bytes(document, "env"),
        cwd=None if cwd is None else _bytes(document, "cwd", cwd), cwd_optional=_flag(document, "cwdOptional"),
        user=_maybe_text(document, "user"), tty=None if tty is None else _size(tty), detach=_flag(document, "detach"),
    )  # fmt: skip


def _signal(document: Json) -> Signal:
    signal = _text(document, "signal")
    parse_signal(signal)
    return Signal(signal=signal)


def _close(document: Json) -> Close:
    return Close(kind=_whole(document, "kind", STDIN + 1, STDERR))


_TO_HOST: dict[str, Callable[[Json], ToHost]] = {
    "hello": _hello, "fatal": _fatal, "started": _started, "error": _error, "closed": lambda _: Closed(), "exit": _exit,
    "result": _result, "listening": _listening, "open": lambda d: Open(service=_text(d, "service")),
}  # fmt: skip
_TO_GUEST: dict[str, Callable[[Json], ToGuest]] = {
    "hello": _hello, "fatal": _fatal, "started": _started, "error": _error, "closed": lambda _: Closed(), "exec": _exec,
    "resize": lambda d: Resize(size=_size(d)), "signal": _signal, "close": _close,
    "status": lambda _: StatusRequest(), "wait": lambda d: WaitRequest(until=_choice(d, "for", ("init",))),
    "poweroff": lambda _: PowerOffRequest(), "dial": lambda d: DialRequest(port=_whole(d, "port", 1, 65535)),
    "listeners": lambda _: ListenersRequest(), "cancel": lambda _: Cancel(), "console": lambda _: ConsoleRequest(),
    "clock": lambda d: ClockRequest(unix_nanos=_whole(d, "unixNanos", 0, 2**63 - 1)),
}  # fmt: skip


# ---- writing


def _base64(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode("ascii")


def _all_base64(items: Iterable[bytes]) -> list[str]:
    return [_base64(item) for item in items]


assert (STDOUT, STDERR) == (STDIN + 1, STDIN + 2)
