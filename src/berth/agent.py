"""The host's side of the guest agent: connect, ask, be told. Owns the client of the short requests; layer 3.

Used by lifecycle and the engines. Commands with data run in `session`. Blocking, with deadlines; not for two threads.
On the fast path of `berth run`: `_socket` is the C half of `socket`, whose Python half costs 7 ms (it brings `enum`).
"""

from __future__ import annotations

import _socket
from os import fspath
from struct import pack
from time import monotonic

from berth.errors import AgentError, DeadlineError, ProtocolError
from berth.version import VERSION
from berth.wire.connection import Connection, MessageArrived
from berth.wire.messages import (
    Error,
    PowerOffRequest,
    Result,
    Started,
    StatusRequest,
    WaitRequest,
    parse_init,
    parse_status,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from os import PathLike

    from berth.wire.messages import AgentStatus, ExecRequest, Hello, Message, ToHost

_STALLED_S = 10.0  # an agent that takes longer for a plain answer is not well


def connect(path: str | PathLike[str], timeout_s: float) -> _socket.socket:
    """Connect to the agent's unix socket; the caller closes it.

    A connection is taken as soon as somebody holds the listening socket, and waits there for the agent's first answer.
    Raises AgentError with code ``unreachable`` when nobody listens, DeadlineError when the queue stays full.
    """
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        # A socket time-out would make connect fail at once when the queue is full (EAGAIN): let the kernel wait.
        seconds, fraction = divmod(max(timeout_s, 0.001), 1)
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, pack("ll", int(seconds), int(fraction * 1e6)))
        sock.connect(fspath(path))
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, pack("ll", 0, 0))
    except BlockingIOError:
        sock.close()
        raise DeadlineError(f"the guest agent did not take a connection within {timeout_s:g} s") from None
    except OSError as error:
        sock.close()
        raise AgentError("unreachable", f"no guest agent answers at {path}: {error.strerror}") from error
    return sock


def lost(code: str = "lost") -> AgentError:
    """Make the error for a connection that ended too early."""
    return AgentError(code, "the guest agent closed the connection", hint="is the machine still running? berth ls")


class AgentClient:
    """Asks the agent one thing at a time, over a connected socket that is the client's from now on.

    Each request raises AgentError (refused; code ``lost``: the connection ended), DeadlineError, or ProtocolError.
    """

    def __init__(self, sock: _socket.socket, *, timeout_s: float = _STALLED_S) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._connection = Connection("host", version=VERSION)

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._sock.close()

    def hello(self) -> Hello:
        """Shake hands and return the agent's hello: its version and the state of the init."""
        deadline = monotonic() + self._timeout_s
        while self._connection.hello is None:
            self._exchange(None, deadline)
        return self._connection.hello

    def status(self) -> AgentStatus:
        """Return how the guest is."""
        return parse_status(self._result(StatusRequest(), self._timeout_s))

    def wait_init(self, timeout_s: float) -> str:
        """Wait until the init has settled; return its state: ``running``, ``degraded``, ``stopping`` or ``unknown``."""
        return parse_init(self._result(WaitRequest(), timeout_s))

    def power_off(self) -> None:
        """Ask the init to power off. A connection that ends before the answer is one too: the guest went down."""
        try:
            self._result(PowerOffRequest(), self._timeout_s)
        except AgentError as error:
            if error.agent_code != "lost":
                raise

    def start_detached(self, request: ExecRequest) -> int:
        """Start a command that outlives this connection (`request.detach`); return its process id in the guest."""
        assert request.detach
        answer = self._ask(request, self._timeout_s)
        if not isinstance(answer, Started) or answer.pid is None:
            raise ProtocolError(f"'{answer.type}' is no answer to a detached exec")
        return answer.pid

    def _result(self, request: Message, timeout_s: float) -> Result:
        answer = self._ask(request, timeout_s)
        if not isinstance(answer, Result):
            raise ProtocolError(f"'{answer.type}' is no answer to '{request.type}'")
        return answer

    def _ask(self, request: Message, timeout_s: float) -> ToHost:
        deadline = monotonic() + timeout_s
        stream = self._connection.open(request)
        while (answer := self._exchange(stream, deadline)) is None:
            pass
        if isinstance(answer, Error):
            raise AgentError(answer.code, answer.message)
        return answer

    def _exchange(self, stream: int | None, deadline: float) -> ToHost | None:
        """Send what is to be sent, receive once; return the message on `stream` if it came.

        Answers to older requests, whose deadline had passed, are dropped.
        """
        if monotonic() >= deadline:  # however much there is to read
            raise _late()
        try:
            data = b"".join(self._connection.outgoing)
            self._connection.outgoing.clear()
            self._sock.settimeout(_left(deadline))
            self._sock.sendall(data)
            self._sock.settimeout(_left(deadline))
            count = self._sock.recv_into(self._connection.buffer())
        except TimeoutError:
            raise _late() from None
        except OSError as error:
            raise lost() from error
        if count == 0:
            raise lost()
        answer: ToHost | None = None
        for event in self._connection.received(count):
            if not isinstance(event, MessageArrived):
                raise ProtocolError("data from the guest agent that nobody asked for")
            if event.stream == stream and answer is None:
                answer = event.message  # type: ignore[assignment]  # a host receives only ToHost
        return answer


def _late() -> DeadlineError:
    return DeadlineError("the guest agent did not answer in time", hint="berth logs --boot")


def _left(deadline: float) -> float:
    # 0 would mean "do not block" and fail in another way.
    return max(deadline - monotonic(), 0.000001)
