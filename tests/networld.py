"""A host of its own for tests of the network: nothing that they do is seen by the real one.

A `World` is a network and mount namespace that plays the host: an interface ``wan0`` with a default route to an
*outside* namespace, in which a web-like TCP server tells who is calling and a DNS server knows every name; its
own /etc/resolv.conf and /dev/net/tun. Berth runs in it as root or as the ordinary user. Sockets are opened in any
namespace by a thread that enters it for a moment, so no program is needed there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from berth import proc, syscalls
from berth.layout import Layout
from berth.names import MachineName
from berth.net import record
from berth.net.addresses import Address
from berth.net.network import Network
from berth.net.processes import Process, identify
from ordinary import Ordinary
from support import ROOT

WAN = "198.51.100.2"
OUTSIDE = "198.51.100.1"
OUTSIDE_PORT = 8080
ANSWER = "203.0.113.9"  # of the outside's DNS server, to every question

# What berth does in the world, as root or as the user: one request on stdin, one answer on stdout.
_WORKER = """
import dataclasses, json, sys
from berth import userns
from berth.errors import BerthError
from berth.layout import Layout
from berth.net import addresses, attach, network

layout = Layout.from_environment()
request = json.load(sys.stdin)

def ensure():
    return network.ensure(layout, holder=request.get("holder", ()))

def start(name, pid):
    address = addresses.allocate(layout, name)
    net = ensure()
    network.publish(layout, name, address)
    if net.holder_pid is None:
        attach.attach(net.bridge, address, pid)
    else:
        arguments = {"bridge": net.bridge, "address": address.to_json(), "pid": pid}
        userns.call("berth.net.attach:attach_inside", arguments, holder=net.holder_pid)
    network.publish(layout, name, address, pid)
    return address.to_json()

def start_vm(name):
    # What stands in for QEMU holds the TAP, and is in no namespace of the machine's.
    from berth.net import tap
    from berth.proc import spawn
    address = addresses.allocate(layout, name)
    net = ensure()
    network.publish(layout, name, address)
    fd = tap.open_tap(net, address)
    process = spawn(["sleep", "1000"], pass_fds=[fd], new_session=True)
    process.returncode = 0
    network.publish(layout, name, address, process.pid, tap=True)
    return {"address": address.to_json(), "pid": process.pid, "fd": fd}

def start_alone(name):
    from pathlib import Path
    from berth.net import passt
    from berth.proc import spawn
    address = addresses.allocate(layout, name)
    layout.runtime.mkdir(parents=True, exist_ok=True)
    uplink = passt.open_uplink(address, Path(layout.runtime), "no TAP")
    fd = uplink.socket.fileno()
    process = spawn(["sleep", "1000"], pass_fds=[fd], new_session=True)
    process.returncode = 0
    return {"address": address.to_json(), "pid": process.pid, "fd": fd, "passt": uplink.process and uplink.process.pid}

def stand_in():
    # A machine's namespaces: a user namespace below the hub's (or the host's) and a network of its own.
    from berth.proc import spawn
    net = ensure()
    argv = ["unshare", "--user", "--map-root-user", "--net", "--", "sleep", "1000"]
    if net.holder_pid is not None:
        argv = userns.enter_command(net.holder_pid, argv)
    process = spawn(argv, new_session=True)
    process.returncode = 0
    return process.pid

def speed():
    import time
    network.ensure(layout)
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        network.ensure(layout)
        times.append(time.perf_counter() - begin)
    return sorted(times)[4]

try:
    result = {
        "ensure": lambda: dataclasses.asdict(ensure()),
        "start": lambda: start(request["name"], request["pid"]),
        "start_vm": lambda: start_vm(request["name"]),
        "start_alone": lambda: start_alone(request["name"]),
        "stand_in": stand_in,
        "speed": speed,
        "withdraw": lambda: network.withdraw(layout, request["name"]),
        "teardown": lambda: network.teardown(layout),
    }[request["do"]]()
    print(json.dumps({"result": result}))
except BerthError as error:
    print(json.dumps({"error": error.message}))
"""


class World:
    """The host and its outside. user: whom berth runs as; None is root."""

    def __init__(self, folder: Path, layout: Layout, user: Ordinary | None, host: int, outside: int) -> None:
        self.folder = folder
        self.layout = layout
        self.user = user
        self.host = host
        self.outside = outside
        self.machines: list[int] = []

    # Berth in the world -----------------------------------------------------------------------------------------------

    def _popen(self, request: dict[str, object]) -> subprocess.Popen[bytes]:
        argv = ["nsenter", "-t", str(self.host), "-n", "-m", "--"]
        roots = {
            "BERTH_DATA_DIR": str(self.layout.data), "BERTH_RUNTIME_DIR": str(self.layout.runtime),
            "BERTH_CONFIG_DIR": str(self.layout.config), "BERTH_CACHE_DIR": str(self.layout.cache),
        }  # fmt: skip
        if self.user is None:
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **roots}
            argv += [sys.executable, "-P", "-c", _WORKER]
        else:
            environment = {**self.user.environment, **roots}
            argv += ["setpriv", f"--reuid={self.user.uid}", f"--regid={self.user.gid}", "--init-groups", "--"]
            argv += [str(self.user.python), "-P", "-c", _WORKER]
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd="/"
        )
        assert process.stdin
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
        process.stdin = None
        return process

    @staticmethod
    def _finish(process: subprocess.Popen[bytes]) -> object:
        out, err = process.communicate(timeout=60)
        if process.returncode != 0:
            raise RuntimeError(f"the worker failed: {err.decode(errors='replace')}")
        answer = cast("dict[str, object]", json.loads(out))
        if "error" in answer:
            raise RuntimeError(str(answer["error"]))
        return answer["result"]

    def do(self, what: str, **arguments: object) -> object:
        """Let berth do something; raises RuntimeError with its message when it can't."""
        return self._finish(self._popen({"do": what, **arguments}))

    def ensure(self) -> Network:
        """Call `network.ensure`."""
        return _network(self.do("ensure"))

    def ensure_many(self, count: int) -> list[Network]:
        """Call `network.ensure` in so many processes at once."""
        processes = [self._popen({"do": "ensure"}) for _ in range(count)]
        return [_network(self._finish(process)) for process in processes]

    def machine(self, name: str) -> tuple[Address, int]:
        """Make a stand-in for a machine and attach it; return its address and the process that is its init."""
        pid = cast("int", self.do("stand_in"))
        self.machines.append(pid)
        until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
        return Address.from_json(self.do("start", name=name, pid=pid), where="worker"), pid

    def vm(self, name: str, *, alone: bool = False) -> tuple[Address, int, int]:
        """Attach a stand-in for a VM; return its address, who plays QEMU, and its descriptor of the TAP.

        alone: to a passt of its own; the descriptor is the socket's.
        """
        answer = cast("dict[str, object]", self.do("start_alone" if alone else "start_vm", name=name))
        pid = cast("int", answer["pid"])
        self.machines.append(pid)
        return Address.from_json(answer["address"], where="worker"), pid, cast("int", answer["fd"])

    def stop(self, name: str, pid: int) -> None:
        """End a stand-in as a machine ends."""
        os.kill(pid, signal.SIGKILL)
        self.machines.remove(pid)
        until(lambda: identify(pid) is None)
        self.do("withdraw", name=MachineName(name))

    @property
    def record(self) -> record.Record:
        """What berth has noted down."""
        return record.load(self.layout)

    def run(self, *argv: str, input: bytes | None = None, success: tuple[int, ...] = (0,)) -> str:
        """Run a program on the host of the world, as root."""
        enter = ["nsenter", "-t", str(self.host), "-n", "-m", "--"]
        return proc.run([*enter, *argv], input=input, success=success, timeout_s=20).stdout.decode()

    def inside(self, pid: int, *argv: str, success: tuple[int, ...] = (0,)) -> str:
        """Run a program in the network namespace of a process, as root of its user namespace."""
        enter = ["nsenter", "-t", str(pid), "-U", "-n", "-S", "0", "-G", "0", "--"]
        return proc.run([*enter, *argv], success=success, timeout_s=20).stdout.decode()

    # What one sees in the world ---------------------------------------------------------------------------------------

    def reach(self, source: int, ip: str, port: int, *, bind: str = "", timeout_s: float = 3.0) -> str | None:
        """Connect from the namespace of the process `source`; return what the server says, None when it can't be."""
        try:
            with socket_in(source, socket.SOCK_STREAM) as sock:
                sock.settimeout(timeout_s)
                if bind:
                    sock.bind((bind, 0))
                sock.connect((ip, port))
                sock.sendall(b"0\n")
                return _read_all(sock).decode() or None
        except OSError:
            return None

    def exchange(self, source: int, ip: str, port: int, size: int) -> int:
        """Send so many bytes to a server of ours, which sends them back; return how many came."""
        with socket_in(source, socket.SOCK_STREAM) as sock:
            sock.settimeout(20)
            sock.connect((ip, port))
            sock.sendall(f"{size}\n".encode() + b"x" * size)
            return _read_all(sock).count(b"x")

    def resolve(self, source: int, server: str, name: str) -> str | None:
        """Ask for an address by DNS, from the namespace of `source`; None when there is none."""
        try:
            with socket_in(source, socket.SOCK_DGRAM) as sock:
                sock.settimeout(3)
                sock.connect((server, 53))
                sock.send(question(name))
                return parse_answer(sock.recv(512))
        except OSError:
            return None


@contextlib.contextmanager
def make_world(folder: Path, layout: Layout, user: Ordinary | None, *, tun: bool = True) -> Generator[World]:
    """Make a world; afterwards fail if berth left anything in it that `teardown` should have ended."""
    resolv = folder / "resolv.conf"
    resolv.write_text(f"search example.org\nnameserver {OUTSIDE}\n")
    with contextlib.ExitStack() as stack:
        outside = stack.enter_context(_namespace("true"))
        # Bound over in this mount namespace only; the tmpfs because the folder may be mounted nodev.
        script = (
            f"ip link set lo up && mount -t tmpfs none /mnt && mknod -m {666 if tun else 600} /mnt/tun c 10 200 && "
            f"touch /dev/net/tun && mount --bind /mnt/tun /dev/net/tun && mount --bind {resolv} /etc/resolv.conf"
        )
        host = stack.enter_context(_namespace(script))
        _connect(host, outside)
        stack.enter_context(serve_tcp(outside, "", OUTSIDE_PORT))
        stack.enter_context(serve_dns(outside, OUTSIDE, ANSWER))
        world = World(folder, layout, user, host, outside)
        try:
            yield world
        finally:
            for pid in world.machines:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until(lambda: all(identify(pid) is None for pid in world.machines))
            world.do("teardown")


@contextlib.contextmanager
def _namespace(script: str) -> Generator[int]:
    """Hold a network and mount namespace that `script` has set up."""
    shell = f"{script} && echo ready && exec cat"
    argv = ["unshare", "--net", "--mount", "--propagation", "slave", "--", "sh", "-c", shell]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        if holder.stdout.readline() != b"ready\n":
            raise RuntimeError("no namespace could be made for the test")
        yield holder.pid  # leaving closes cat's stdin, which ends it, and waits


def _connect(host: int, outside: int) -> None:
    _ip(host, f"link add name wan0 type veth peer name wan0 netns {outside}\n")
    _ip(host, f"address add {WAN}/24 dev wan0\nlink set wan0 up\n")
    _ip(outside, f"address add {OUTSIDE}/24 dev wan0\nlink set wan0 up\nlink set lo up\n")
    _ip(host, f"route add default via {OUTSIDE}\n")


def _ip(pid: int, batch: str) -> None:
    proc.run(["nsenter", "-t", str(pid), "-n", "--", "ip", "-batch", "-"], input=batch.encode(), timeout_s=10)


def socket_in(pid: int, kind: int) -> socket.socket:
    """Open an IPv4 socket in the network namespace of a process; it stays there, whoever uses it."""

    def work() -> socket.socket:
        fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.setns(fd, syscalls.CLONE_NEWNET)
        finally:
            os.close(fd)
        return socket.socket(socket.AF_INET, kind)

    # A thread of its own, which ends with it: a namespace is entered by thread.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@contextlib.contextmanager
def serve_tcp(pid: int, ip: str, port: int) -> Generator[None]:
    """Listen in the namespace of a process: read a size and so many bytes; send the caller's address and the bytes."""

    def answer(sock: socket.socket) -> None:
        connection, caller = sock.accept()
        with connection, connection.makefile("rb") as file:
            connection.settimeout(10)
            data = file.read(int(file.readline()))
            connection.sendall(str(caller[0]).encode() + data)

    with socket_in(pid, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port))
        sock.listen()
        with _loop(sock, answer):
            yield


@contextlib.contextmanager
def serve_dns(pid: int, ip: str, address: str) -> Generator[None]:
    """Answer every DNS question in the namespace of a process with `address`."""

    def answer(sock: socket.socket) -> None:
        data, caller = sock.recvfrom(512)
        header = data[:2] + b"\x81\x80\0\1\0\1\0\0\0\0"
        end = data.index(b"\0", 12) + 5
        record_ = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\x04" + socket.inet_aton(address)
        sock.sendto(header + data[12:end] + record_, caller)

    with socket_in(pid, socket.SOCK_DGRAM) as sock:
        sock.bind((ip, 53))
        with _loop(sock, answer):
            yield


@contextlib.contextmanager
def _loop(sock: socket.socket, step: Callable[[socket.socket], None]) -> Generator[None]:
    """Repeat `step` in a thread until the block ends."""
    stop = threading.Event()
    sock.settimeout(0.1)

    def work() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):  # time-outs included
                step(sock)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _read_all(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as file:
        return file.read()


def question(name: str) -> bytes:
    """Write a DNS query for an A record. Source: RFC 1035, section 4."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return b"\x12\x34\x01\x00\0\1\0\0\0\0\0\0" + labels + b"\0\0\1\0\1"


def parse_answer(data: bytes) -> str | None:
    """Read the last A record of an answer; None when there is no answer in it."""
    count = int.from_bytes(data[6:8], "big")
    return socket.inet_ntoa(data[-4:]) if count else None


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def kill(process: Process | None) -> None:
    """Kill a process of berth's and wait for its end."""
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: identify(process.pid) is None)


def _network(answer: object) -> Network:
    members = cast("dict[str, Any]", answer)
    members["notes"] = tuple(members["notes"])
    return Network(**members)
