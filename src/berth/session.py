"""One command in the guest, from request to exit status, with its bytes, signals and terminal. Layer 3.

Owns the loop of `berth run`: one poll() over the agent's socket, stdin, the outputs that are behind, and signals. Used
by lifecycle (and through it by `cli` and the Python API). Source: docs/protocol.md, "Requests", exec.

What holds: bytes arrive exactly, stdout and stderr apart. A reader that stalls stalls only its own kind of data. A
reader that goes away closes that kind in the guest and nothing else; the status stays the command's. No inherited
descriptor gets O_NONBLOCK (see `outputs`). stdin is read once the command runs, and only as far as the guest takes it.
"""

from __future__ import annotations

import os
import select
from time import monotonic

from berth.agent import lost
from berth.errors import AgentError, BerthError, DeadlineError, ProtocolError
from berth.outputs import FdOutput, MemoryOutput, widen_pipe
from berth.signals import SignalStream, number_of
from berth.terminal import RawMode, window_size
from berth.version import VERSION
from berth.wire.connection import Connection, CreditArrived, DataArrived
from berth.wire.frames import MAX_DATA, STDERR, STDIN, STDOUT
from berth.wire.messages import Close, Error, Exit, Hello, Resize, Signal, Started
from berth.wire.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from typing import ClassVar

    from berth.outputs import Output
    from berth.wire.messages import ExecRequest, Message, ToGuest, ToHost

_FULL_PIPE = 65536  # what a pipe holds by default; pipe(7)
_GATHERED = 64  # buffers in one sendmsg; IOV_MAX is 1024
_MAX_UNSENT = 64  # buffers that may wait for an agent that does not read; signals beyond that are dropped
_GREETING_S = 60.0  # an agent greets at once, and a command may then take its time; a frozen machine greets late
_START_STATUS = {"not_found": 127, "not_executable": 126}
_ENDING = ("HUP", "INT", "QUIT", "TERM")  # what ends a command that does not catch it


class StartError(AgentError):
    """The command did not start. `status` is the exit status for it: 127 not found, 126 not executable, else 125."""

    def __init__(self, agent_code: str, message: str) -> None:
        super().__init__(agent_code, message)
        self.status = _START_STATUS.get(agent_code, 125)


class OutputError(BerthError):
    """What the command wrote could not be passed on (a full disk, not a reader that went away)."""

    code: ClassVar[str] = "output"


class Captured(Record):
    """What a command left: its status (128 + N for signal N), stdout, stderr."""

    status: int
    stdout: bytes
    stderr: bytes


def run_session(
    sock: _socket.socket, request: ExecRequest, *, stdin_fd: int | None, stdout_fd: int, stderr_fd: int, tty: bool
) -> int:
    """Run a command with our own standard files and return its exit status: the code, or 128 + N for signal N.

    sock: connected to the agent; it is closed at the end. stdin_fd: None for an empty stdin. tty: put the terminal
    stdin_fd into raw mode and tell the guest its size, now and when it changes; `request.tty` is then to be set.
    A detached request returns 0 as soon as the command runs.

    Signals are the command's while it runs. A second SIGTERM, and in a terminal SIGHUP or the terminal's own end, end
    us: the agent hangs up on the command when the connection goes, and 128 + N is returned.

    Raises StartError, OutputError (after the command has ended), AgentError (code ``lost``; ``unheard`` when the
    connection ended before anybody saw the request), DeadlineError when the agent never greets, ProtocolError.
    """
    source = None if stdin_fd is None else _FdSource(stdin_fd)
    outputs: dict[int, Output] = {STDOUT: FdOutput(stdout_fd), STDERR: FdOutput(stderr_fd)}
    try:
        with SignalStream() as signals, RawMode(stdin_fd if tty else None) as raw:
            return _Session(sock, request, source, outputs, signals, raw if tty else None).run()
    finally:
        _close(sock, outputs)


def run_captured(
    sock: _socket.socket, request: ExecRequest, *, input: bytes | None = None, timeout_s: float | None = None
) -> Captured:
    """Run a command with `input` as its stdin and return what it wrote.

    sock: connected to the agent; it is closed at the end, also by KeyboardInterrupt, which hangs up on the command.
    Raises DeadlineError (the command is hung up on), StartError, AgentError (code ``lost``), ProtocolError.
    """
    stdout, stderr = MemoryOutput(), MemoryOutput()
    source = _BytesSource(input) if input else None
    outputs: dict[int, Output] = {STDOUT: stdout, STDERR: stderr}
    try:
        status = _Session(sock, request, source, outputs).run(timeout_s)
        return Captured(status=status, stdout=bytes(stdout.data), stderr=bytes(stderr.data))
    finally:
        _close(sock, outputs)


def run_into(sock: _socket.socket, request: ExecRequest, output: Output, *, timeout_s: float) -> int:
    """Run a command without stdin, both of whose outputs go to `output` as they come; return its exit status.

    Otherwise as `run_captured`, for what is not to be kept in memory.
    """
    outputs = {STDOUT: output, STDERR: output}
    try:
        return _Session(sock, request, None, outputs).run(timeout_s)
    finally:
        _close(sock, outputs)


def _close(sock: _socket.socket, outputs: dict[int, Output]) -> None:
    sock.close()
    for output in outputs.values():
        output.close()


class _FdSource:
    """stdin, when it is a descriptor: read into one buffer, which is free again when the bytes are sent."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer: memoryview | None = None
        self._widened = False

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes; none at the end of file. Call it when the descriptor is readable."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(MAX_DATA))
        try:
            count = os.readv(self.fd, [self._buffer[:limit]])
        except OSError:
            return self._buffer[:0]  # EIO: the terminal hung up; EISDIR; EBADF: closed by who started us
        if count == _FULL_PIPE and not self._widened:
            self._widened = True
            widen_pipe(self.fd)
        return self._buffer[:count]


class _BytesSource:
    """stdin, when it is in memory; always readable."""

    fd = -1

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes; none at the end."""
        taken, self._rest = self._rest[:limit], self._rest[limit:]
        return taken


class _Hangup(Exception):  # noqa: N818 (it is no error)
    """We end before the command: `status` is ours."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class _Session:
    """The state of one command's run; `run` is called once."""

    def __init__(
        self,
        sock: _socket.socket,
        request: ExecRequest,
        source: _FdSource | _BytesSource | None,
        outputs: dict[int, Output],
        signals: SignalStream | None = None,
        raw: RawMode | None = None,
    ) -> None:
        self._sock = sock
        self._detach = request.detach
        self._source = None if request.detach else source
        self._outputs = outputs
        self._signals = signals
        self._raw = raw  # None: no terminal
        self._has_read = False  # any byte of stdin
        self._closed: set[int] = set()  # kinds that we told the agent to close
        self._started = False
        self._terminations = 0
        self._status: int | None = None
        self._greeting = 0.0  # until when the agent has to have greeted
        self._poll = select.poll()
        self._watched: dict[int, tuple[int, Callable[[], None]]] = {}
        self._connection = Connection("host", version=VERSION)
        self._stream = self._connection.open(request)
        if source is None and not request.detach:
            self._connection.send_data(self._stream, STDIN, b"")

    def run(self, timeout_s: float | None = None) -> int:
        """Go through the command's life; return its status."""
        deadline = None if timeout_s is None else monotonic() + timeout_s
        self._greeting = monotonic() + _GREETING_S
        self._sock.settimeout(0)
        try:
            self._send()
            while self._status is None or any(output.is_pending for output in self._outputs.values()):
                self._watch_all()
                self._wait(deadline)
        except _Hangup as hangup:
            return hangup.status
        except ProtocolError as error:
            self._connection.fail(error)
            self._send()
            raise
        self._check_outputs()
        return self._status

    # ---- waiting

    def _wait(self, deadline: float | None) -> None:
        """Wait until something can be done, and do it."""
        ends = [end for end in (deadline, None if self._connection.hello else self._greeting) if end is not None]
        left_ms = max(min(ends) - monotonic(), 0) * 1000 + 1 if ends else None
        for fd, _ in self._poll.poll(left_ms):
            if fd in self._watched:
                self._watched[fd][1]()
        if self._connection.hello is None and monotonic() >= self._greeting:
            raise DeadlineError("the guest agent did not answer in time", hint="berth logs --boot")
        if deadline is not None and monotonic() >= deadline and self._status is None:
            raise DeadlineError("the command did not end in time and was hung up on")
        if isinstance(self._source, _BytesSource):
            while self._may_read():
                self._read()
        self._send()

    def _watch_all(self) -> None:
        running = self._status is None
        if self._signals is not None:
            self._watch(self._signals.fileno(), select.POLLIN, self._take_signals)
        agent = select.POLLIN | select.POLLOUT if self._connection.outgoing else select.POLLIN
        self._watch(self._sock.fileno(), agent if running else 0, self._receive)
        if self._source is not None:
            self._watch(self._source.fd, select.POLLIN if self._may_read() else 0, self._read)
        for kind, flush in ((STDOUT, self._flush_stdout), (STDERR, self._flush_stderr)):
            output = self._outputs[kind]
            self._watch(output.fileno(), select.POLLOUT if output.is_pending else 0, flush)

    def _watch(self, fd: int, events: int, act: Callable[[], None]) -> None:
        old = self._watched.get(fd)
        if fd < 0 or (old[0] if old else 0) == events:
            return
        if events:
            self._poll.register(fd, events)
            self._watched[fd] = (events, act)
        else:
            # poll reports a hang-up even to those who ask for nothing: what is not wanted must not be there.
            self._poll.unregister(fd)
            del self._watched[fd]

    # ---- the agent

    def _lost(self) -> AgentError:
        # Unheard: nobody has seen the request and no input is gone, so it may be tried again.
        is_heard = self._connection.hello is not None or self._has_read
        return lost("lost" if is_heard else "unheard")

    def _receive(self) -> None:
        try:
            count = self._sock.recv_into(self._connection.buffer())
        except BlockingIOError:
            return
        except OSError as error:
            raise self._lost() from error
        if count == 0:
            self._connection.ended()
            raise self._lost()
        for event in self._connection.received(count):
            if isinstance(event, DataArrived):
                self._pass_on(event.kind, event.payload)
            elif not isinstance(event, CreditArrived):
                self._take_message(event.message)

    def _take_message(self, message: ToHost | ToGuest) -> None:
        match message:
            case Hello():
                pass
            case Started() if not self._started:
                self._started = True
                self._status = 0 if self._detach else None
            case Exit() if self._started:
                self._status = message.status
            case Error() if self._started:
                raise AgentError(message.code, message.message)
            case Error():
                raise StartError(message.code, message.message)
            case _:
                raise ProtocolError(f"message '{message.type}' where none of its kind belongs")

    def _send(self) -> None:
        """Send as much as goes without waiting."""
        waiting = self._connection.outgoing
        while waiting:
            try:
                sent = self._sock.sendmsg(waiting[:_GATHERED])
            except BlockingIOError:
                return
            except OSError:
                waiting.clear()  # it hung up; why, we shall read
                return
            while waiting and sent >= len(waiting[0]):
                sent -= len(waiting.pop(0))
            if waiting:
                waiting[0] = memoryview(waiting[0])[sent:]

    def _tell(self, message: Message) -> None:
        """Send a message about the command, if it still runs and the agent still reads."""
        if self._connection.is_open(self._stream) and len(self._connection.outgoing) < _MAX_UNSENT:
            self._connection.send(self._stream, message)

    # ---- the bytes

    def _may_read(self) -> bool:
        """Say whether the guest takes more of stdin, and the last of it has been sent."""
        return (
            self._source is not None
            and self._started
            and not self._connection.outgoing
            and self._connection.credit(self._stream, STDIN) > 0
        )

    def _read(self) -> None:
        if self._source is None or not self._may_read():
            return
        data = self._source.take(min(MAX_DATA, self._connection.credit(self._stream, STDIN)))
        if not data and self._raw is not None and self._raw.is_raw:
            raise _Hangup(128 + number_of("HUP"))  # a raw terminal has no other end; a Ctrl-D would end a shell in it
        if not data:
            self._watch(self._source.fd, 0, self._read)
            self._source = None
        self._has_read = self._has_read or bool(data)
        self._connection.send_data(self._stream, STDIN, data)
        self._send()

    def _pass_on(self, kind: int, data: memoryview) -> None:
        if data:
            self._account(kind, self._outputs[kind].write(data))

    def _flush_stdout(self) -> None:
        self._account(STDOUT, self._outputs[STDOUT].flush())

    def _flush_stderr(self) -> None:
        self._account(STDERR, self._outputs[STDERR].flush())

    def _account(self, kind: int, count: int) -> None:
        """Give credit for what went on; tell the agent, once, when nothing goes on any more."""
        self._connection.consumed(self._stream, kind, count)
        if self._outputs[kind].error is not None and kind not in self._closed:
            self._closed.add(kind)
            self._tell(Close(kind=kind))

    def _check_outputs(self) -> None:
        for kind, word in ((STDOUT, "stdout"), (STDERR, "stderr")):
            error = self._outputs[kind].error
            if error is not None and not isinstance(error, (BrokenPipeError, ConnectionResetError)):
                raise OutputError(f"what the command wrote to {word} was lost: {error.strerror}") from error

    # ---- signals

    def _take_signals(self) -> None:
        for name in self._signals.take() if self._signals is not None else ():
            if name in _ENDING and self._is_for_us(name):
                raise _Hangup(128 + number_of(name))
            match name:
                case "WINCH":
                    self._tell_size()
                case "TSTP":
                    self._stop()
                case "CONT":
                    self._go_on()
                case _:
                    self._tell(Signal(signal=name))

    def _is_for_us(self, name: str) -> bool:
        """Say whether a signal ends us, rather than being the command's to deal with."""
        self._terminations += name == "TERM"
        runs = self._started and self._status is None
        return not runs or self._terminations > 1 or (name == "HUP" and self._raw is not None)

    def _tell_size(self) -> None:
        if self._raw is not None and self._raw.fd >= 0:
            self._tell(Resize(size=window_size(self._raw.fd)))

    def _stop(self) -> None:
        """Stop with the command, as a job of the shell that started us does, until we are continued."""
        assert self._signals is not None
        if self._raw is None:
            # Not TSTP: the command has a session of its own, and the kernel drops TSTP for an orphaned process group.
            self._tell(Signal(signal="STOP"))
            self._send()
            self._signals.stop_process()
        else:
            self._raw.suspend()
            self._signals.stop_process()
        self._go_on()

    def _go_on(self) -> None:
        if self._raw is None:
            self._tell(Signal(signal="CONT"))
        else:
            self._raw.resume()
            self._tell_size()
