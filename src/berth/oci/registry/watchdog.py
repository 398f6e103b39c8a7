"""An eye on every exchange: whoever is slower than a floor, wherever it hangs, is cut off. For `registry` only.

A socket's own time-out begins anew with each byte, so it bounds neither a header nor a chunk that drips in.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable

_TICK_S = 0.2  # how late it may be


class StoppedError(Exception):
    """The work was given up by who began it; nobody needs to be told."""


class Watchdog:
    """Shuts sockets down whose time is up, and all of them at the end. One thread, begun with the first socket."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._ends: dict[socket.socket, float] = {}
        self._expired: set[socket.socket] = set()
        self._thread: threading.Thread | None = None

    def guard(self, sock: socket.socket, seconds: float) -> None:
        """Give the socket so much time from now on."""
        with self._lock:
            if self.stopped.is_set():
                raise StoppedError
            self._ends[sock] = time.monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True, name="registry-watchdog")
                self._thread.start()

    def release(self, sock: socket.socket) -> bool:
        """Guard it no more; say whether it was shut down because its time was up."""
        with self._lock:
            self._ends.pop(sock, None)
            expired = sock in self._expired
            self._expired.discard(sock)
            return expired

    def stop(self) -> None:
        """End every exchange now; whoever waits for one gets an error."""
        self.stopped.set()
        with self._lock:
            self._shut(list(self._ends))
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self.stopped.wait(_TICK_S):
            now = time.monotonic()
            with self._lock:
                late = [sock for sock, end in self._ends.items() if end < now]
                self._expired.update(late)
                self._shut(late)

    def _shut(self, socks: Iterable[socket.socket]) -> None:
        for sock in socks:
            del self._ends[sock]
            with contextlib.suppress(OSError):
                # Not SSLSocket's own, which would take the session from under a thread that reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


class Guard:
    """The watchdog's eye on one exchange."""

    def __init__(self, watchdog: Watchdog, sock: socket.socket) -> None:
        self._watchdog = watchdog
        self._sock = sock
        self._expired = False

    def give(self, seconds: float) -> None:
        self._watchdog.guard(self._sock, seconds)

    def release(self) -> None:
        self._expired = self._watchdog.release(self._sock) or self._expired

    def reason(self, error: Exception) -> Exception:
        """Return what was behind an error of the socket: the watchdog, or the error itself."""
        self.release()
        if self._watchdog.stopped.is_set():
            return StoppedError()
        return TimeoutError("no answer in time, or too slow a one") if self._expired else error
