"""A guest agent that a test plays: the real protocol on a real socket, in a thread, with the test's own story.

def story(peer: Peer) -> None:
    peer.accept()
    peer.send(Started(pid=7))
    peer.finish(Exit(code=0))

with played(story) as sock:
    assert run_captured(sock, TRUE).status == 0
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Generator

from berth.wire.connection import Connection, CreditArrived, DataArrived, MessageArrived
from berth.wire.frames import MAX_DATA, STDERR, STDIN, STDOUT
from berth.wire.messages import Exit, Hello, Message

DEADLINE_S = 10.0  # for every step of a story; a test that works needs milliseconds


class Peer:
    """One connection's guest side; `stream` is the stream of the request that came last."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.connection = Connection("guest", version="0.1.0", init="running")
        self.stream = 0
        self._events: list[MessageArrived | DataArrived | CreditArrived] = []

    def next_event(self) -> MessageArrived | DataArrived | CreditArrived:
        """Return what comes next. Raises EOFError when the other side has closed."""
        while not self._events:
            self._receive()
        return self._events.pop(0)

    def _receive(self) -> None:
        self.flush()
        data = self.sock.recv(1 << 20)
        if not data:
            raise EOFError
        self._events += [_copied(event) for event in self.connection.feed(data)]

    def next_message(self) -> Message:
        """Return the next message; credit and the end of stdin are passed over, data is a mistake."""
        while True:
            event = self.next_event()
            if isinstance(event, MessageArrived):
                if event.stream and not isinstance(event.message, Hello):
                    self.stream = event.stream
                return event.message
            assert not isinstance(event, DataArrived) or not event.payload, f"{bytes(event.payload)!r}"

    def accept(self) -> Message:
        """Take the hello and the first request."""
        assert isinstance(self.next_message(), Hello)
        return self.next_message()

    def read(self, count: int | None = None) -> bytes:
        """Read stdin: `count` bytes, or up to its end, giving credit back."""
        found = bytearray()
        while count is None or len(found) < count:
            event = self.next_event()
            assert not isinstance(event, MessageArrived), event.message
            if isinstance(event, DataArrived):
                if not event.payload:
                    break
                found += event.payload
                self.connection.consumed(event.stream, STDIN, len(event.payload))
        return bytes(found)

    def send(self, message: Message) -> None:
        """Send a message on the stream."""
        self.connection.send(self.stream, message)
        self.flush()

    def write(self, kind: int, data: bytes) -> None:
        """Write stdout or stderr, waiting for credit."""
        rest = memoryview(data)
        while rest:
            count = min(len(rest), MAX_DATA, self.connection.credit(self.stream, kind))
            if count == 0:
                self._receive()  # other events than credit wait for who asks for them
                continue
            self.connection.send_data(self.stream, kind, rest[:count])
            self.flush()
            rest = rest[count:]

    def finish(self, exit_message: Exit) -> None:
        """End both outputs, and the command."""
        for kind in (STDOUT, STDERR):
            self.connection.send_data(self.stream, kind, b"")
        self.send(exit_message)

    def flush(self) -> None:
        """Send what waits."""
        data = b"".join(self.connection.outgoing)
        self.connection.outgoing.clear()
        if data:
            self.sock.sendall(data)

    def is_left(self) -> bool:
        """Wait until the other side closes; what it says before is passed over."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                self.next_event()
        return True


def _copied(event: MessageArrived | DataArrived | CreditArrived) -> MessageArrived | DataArrived | CreditArrived:
    if isinstance(event, DataArrived):
        return DataArrived(event.stream, event.kind, memoryview(bytes(event.payload)))
    return event


@contextlib.contextmanager
def played(story: Callable[[Peer], None]) -> Generator[socket.socket]:
    """Yield a socket on whose other end the story is played; afterwards, raise what went wrong in it."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(DEADLINE_S)
    failures: list[BaseException] = []

    def play() -> None:
        try:
            with theirs:
                story(Peer(theirs))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    try:
        with ours:
            yield ours
    finally:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the story does not end"
        if failures:
            raise failures[0]
