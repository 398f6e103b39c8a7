"""Write frames.json, the vectors that pytest and `go test` read alike. Run it after a change: ``python generate.py``.

It knows docs/protocol.md by itself and imports neither implementation, so that a mistake in one can't hide here.
frames.json has these lists; every `hex` is lower-case and all bytes of the example:

frames       one whole, valid frame each: name, direction ("both", "to_guest", "to_host"), hex, stream, kind, and either
             payload_hex or, for a MESSAGE, `message`: the object that the JSON must decode to.
errors       bytes that a decoder must refuse with a protocol error, given whole or byte by byte: name, direction, hex.
             Some are a header alone: what it announces is reason enough, the payload is never waited for.
incomplete   valid beginnings: no frame yet, and no error.
headers      the limits of length: name, direction, hex (a header), ok.
sequences    the bytes of frames one after the other, which split at any place give the same frames: name, direction,
             hex, frames ([stream, kind, payload_hex]).
connections  what one side does with a whole conversation: name, receiver ("guest" or "host"), hex (everything that it
             receives, after it has itself sent the frames in `sent`), verdict ("ok" or "error": a protocol error).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

MESSAGE, STDIN, STDOUT, STDERR, CREDIT = range(5)
MAX_DATA = 262144
WINDOW = 1048576
Json = dict[str, object]


def header(length: int, stream: int, kind: int) -> str:
    return struct.pack(">IIB", length, stream, kind).hex()


def raw(stream: int, kind: int, payload: bytes) -> str:
    return header(len(payload), stream, kind) + payload.hex()


def message(stream: int, document: Json) -> str:
    return raw(stream, MESSAGE, json.dumps(document, separators=(",", ":")).encode())


def credit(stream: int, kind: int, count: int) -> str:
    return raw(stream, CREDIT, struct.pack(">BI", kind, count))


def nested(levels: int) -> bytes:
    """Return a message whose JSON is nested `levels` deep, the object itself being the first."""
    return b'{"type":"x","deep":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


HELLO: Json = {"type": "hello", "protocol": 1, "version": "0.1.0", "role": "client"}
ANSWER: Json = {"type": "hello", "protocol": 1, "version": "0.1.0", "init": "running"}
EXEC: Json = {
    "type": "exec",
    "argv": ["cHJpbnRm", "JXN8", "YSBi", "", "JEhPTUU=", "Kg==", "bmV3CmxpbmU=", "//4="],
    "shell": False, "env": ["VEVSTT14dGVybQ=="], "cwd": "L2hvbWUvYW5h", "cwdOptional": True,
    "user": None, "tty": {"rows": 24, "cols": 80}, "detach": False,
}  # fmt: skip
PLAIN_EXEC: Json = {
    "type": "exec", "argv": ["dHJ1ZQ=="], "shell": False, "env": [], "cwd": None, "cwdOptional": True,
    "user": None, "tty": None, "detach": False,
}  # fmt: skip


def frames() -> list[Json]:
    messages: list[tuple[str, str, int, Json]] = [
        ("hello of the client", "to_guest", 0, HELLO),
        ("hello of the agent", "to_host", 0, ANSWER),
        ("fatal", "both", 0, {"type": "fatal", "code": "protocol", "message": "data on stream 0"}),
        ("exec with everything", "to_guest", 1, EXEC),
        ("exec", "to_guest", 3, PLAIN_EXEC),
        ("started", "to_host", 1, {"type": "started", "pid": 4711}),
        ("exit by code", "to_host", 1, {"type": "exit", "code": 42}),
        ("exit by signal", "to_host", 1, {"type": "exit", "signal": "TERM"}),
        ("error", "to_host", 1, {"type": "error", "code": "not_found", "message": "nosuch: not found"}),
        ("resize", "to_guest", 1, {"type": "resize", "rows": 50, "cols": 132}),
        ("signal", "to_guest", 1, {"type": "signal", "signal": "TERM"}),
        ("close", "to_guest", 1, {"type": "close", "kind": 2}),
        ("status", "to_guest", 5, {"type": "status"}),
        (
            "result of status",
            "to_host",
            5,
            {
                "type": "result",
                "init": "running",
                "system": "systemd",
                "version": "0.1.0",
                "twin": "ready",
                "uptime": 12.5,
            },
        ),
        ("wait", "to_guest", 7, {"type": "wait", "for": "init"}),
        ("poweroff", "to_guest", 9, {"type": "poweroff"}),
        ("result", "to_host", 9, {"type": "result"}),
        ("dial", "to_guest", 11, {"type": "dial", "port": 8080}),
        ("closed", "both", 11, {"type": "closed"}),
        ("listeners", "to_guest", 13, {"type": "listeners"}),
        ("listening", "to_host", 13, {"type": "listening", "ports": [22, 80, 8080]}),
        ("cancel", "to_guest", 13, {"type": "cancel"}),
        ("console", "to_guest", 15, {"type": "console"}),
        ("clock", "to_guest", 17, {"type": "clock", "unixNanos": 1795357000123456789}),
        ("open from the agent", "to_host", 2, {"type": "open", "service": "ssh-agent"}),
        ("text beyond ASCII", "to_host", 1, {"type": "error", "code": "internal", "message": "größer als 5 € 🐧"}),
        ("the highest stream id", "to_guest", 4294967295, {"type": "status"}),
        ("an unknown member is ignored", "to_guest", 5, {"type": "status", "later": {"a": [1, 2.5, None, True]}}),
    ]
    found: list[Json] = [
        {"name": n, "direction": d, "hex": message(s, m), "stream": s, "kind": MESSAGE, "message": m}
        for n, d, s, m in messages
    ]
    for name, text, value in (
        ("white space around and in the JSON", b' {"type" : "status"}\n', {"type": "status"}),
        ("escapes in the JSON", rb'{"type":"sta\u0074us","note":"\ud83d\udc27\/"}', {"type": "status", "note": "🐧/"}),
        ("nested 32 levels deep", nested(32), json.loads(nested(32))),
        ("brackets in a string are not nesting", b'{"type":"' + b"[" * 40 + b'"}', {"type": "[" * 40}),
    ):
        found.append(
            {"name": name, "direction": "to_guest", "hex": raw(1, 0, text), "stream": 1, "kind": 0, "message": value}
        )
    data: list[tuple[str, str, int, int, bytes]] = [
        ("stdin", "to_guest", 1, STDIN, b"hello\n"),
        ("end of stdin", "to_guest", 1, STDIN, b""),
        ("stdout", "to_host", 1, STDOUT, bytes(range(256))),
        ("end of stdout", "to_host", 1, STDOUT, b""),
        ("stderr", "to_host", 1, STDERR, b"\xff\xfe not UTF-8"),
        ("end of stderr", "to_host", 1, STDERR, b""),
        ("credit for stdin", "to_host", 1, CREDIT, struct.pack(">BI", STDIN, 262144)),
        ("credit for stdout", "to_guest", 1, CREDIT, struct.pack(">BI", STDOUT, 1)),
        ("credit for stderr", "to_guest", 4711, CREDIT, struct.pack(">BI", STDERR, WINDOW)),
    ]
    for n, d, s, k, p in data:
        found.append({"name": n, "direction": d, "hex": raw(s, k, p), "stream": s, "kind": k, "payload_hex": p.hex()})
    return found


def errors() -> list[Json]:
    both: list[tuple[str, str]] = [
        ("kind 5 is unknown", header(0, 1, 5)),
        ("kind 255 is unknown", header(0, 1, 255)),
        ("credit on stream 0", credit(0, STDIN, 1)),
        ("credit of 4 bytes", raw(1, CREDIT, b"\x01\x00\x00\x00")),
        ("credit of 6 bytes", raw(1, CREDIT, b"\x01\x00\x00\x00\x01\x00")),
        ("credit of nothing", credit(1, STDIN, 0)),
        ("credit for messages", credit(1, MESSAGE, 1)),
        ("credit for credit", credit(1, CREDIT, 1)),
        ("credit for kind 255", raw(1, CREDIT, b"\xff\x00\x00\x00\x01")),
        ("a message of no bytes", raw(1, MESSAGE, b"")),
        ("a message that is a list", raw(1, MESSAGE, b'["type"]')),
        ("a message that is a string", raw(1, MESSAGE, b'"type"')),
        ("a message that is null", raw(0, MESSAGE, b"null")),
        ("a message without type", raw(1, MESSAGE, b'{"code":1}')),
        ("a message whose type is a number", raw(1, MESSAGE, b'{"type":1}')),
        ("a message whose type is null", raw(1, MESSAGE, b'{"type":null}')),
        ("a message that is no JSON", raw(1, MESSAGE, b"{type: 'status'}")),
        ("a message that breaks off", raw(1, MESSAGE, b'{"type":"status"')),
        ("two objects in a message", raw(1, MESSAGE, b'{"type":"status"}{"type":"status"}')),
        ("a message that is not UTF-8", raw(1, MESSAGE, b'{"type":"\xff\xfe"}')),
        ("a message in UTF-16", raw(1, MESSAGE, '{"type":"status"}'.encode("utf-16"))),
        ("a message with a byte order mark", raw(1, MESSAGE, b'\xef\xbb\xbf{"type":"status"}')),
        ("a message with NaN", raw(1, MESSAGE, b'{"type":"status","n":NaN}')),
        ("a message with a trailing comma", raw(1, MESSAGE, b'{"type":"status",}')),
        ("a message with a raw line feed in a string", raw(1, MESSAGE, b'{"type":"sta\ntus"}')),
        ("nested 33 levels deep", raw(1, MESSAGE, nested(33))),
        ("nested 2000 levels deep", raw(1, MESSAGE, nested(2000))),
    ]
    found: list[Json] = [{"name": n, "direction": d, "hex": h} for n, h in both for d in ("to_guest", "to_host")]
    for kind, word, direction in (
        (STDIN, "stdin", "to_guest"),
        (STDOUT, "stdout", "to_host"),
        (STDERR, "stderr", "to_host"),
    ):
        found.append({"name": f"{word} on stream 0", "direction": direction, "hex": raw(0, kind, b"x")})
        found.append({"name": f"end of {word} on stream 0", "direction": direction, "hex": raw(0, kind, b"")})
    found.append(
        {"name": "a bad frame after a good one", "direction": "to_guest", "hex": message(0, HELLO) + header(1, 1, 9)}
    )
    return found


def headers() -> list[Json]:
    rows: list[tuple[str, str, int, int, bool]] = [
        ("the longest stdin", "to_guest", MAX_DATA, STDIN, True),
        ("stdin longer than that", "to_guest", MAX_DATA + 1, STDIN, False),
        ("the longest stdout", "to_host", MAX_DATA, STDOUT, True),
        ("stdout longer than that", "to_host", MAX_DATA + 1, STDOUT, False),
        ("stderr of 4 GiB", "to_host", 0xFFFFFFFF, STDERR, False),
        ("the longest message to the guest", "to_guest", 4194304, MESSAGE, True),
        ("a message to the guest longer than that", "to_guest", 4194305, MESSAGE, False),
        ("the longest message to the host", "to_host", 65536, MESSAGE, True),
        ("a message to the host longer than that", "to_host", 65537, MESSAGE, False),
        ("a message of 4 GiB", "to_host", 0xFFFFFFFF, MESSAGE, False),
        ("credit of 4 GiB", "to_host", 0xFFFFFFFF, CREDIT, False),
    ]
    return [{"name": n, "direction": d, "hex": header(size, 1, k), "ok": ok} for n, d, size, k, ok in rows]


def incomplete() -> list[Json]:
    whole = message(0, HELLO)
    return [
        {"name": "nothing", "direction": "to_guest", "hex": ""},
        {"name": "half a header", "direction": "to_guest", "hex": whole[:8]},
        {"name": "a header", "direction": "to_guest", "hex": whole[:18]},
        {"name": "a payload less one byte", "direction": "to_guest", "hex": whole[:-2]},
    ]


def sequences() -> list[Json]:
    to_host: list[tuple[int, int, bytes]] = [
        (1, STDOUT, b"one"), (3, STDOUT, b"three"), (1, STDERR, b""), (1, CREDIT, struct.pack(">BI", STDIN, 3)),
        (3, STDERR, bytes(300)), (1, STDOUT, b""), (3, STDOUT, b""), (1, MESSAGE, b'{"type":"exit","code":0}'),
    ]  # fmt: skip
    to_guest: list[tuple[int, int, bytes]] = [
        (1, STDIN, b"a"), (1, STDIN, b""), (1, MESSAGE, b'{"type":"signal","signal":"INT"}'),
        (1, CREDIT, struct.pack(">BI", STDOUT, 262144)),
    ]  # fmt: skip
    return [
        {
            "name": name,
            "direction": direction,
            "hex": "".join(raw(*frame) for frame in rows),
            "frames": [[stream, kind, payload.hex()] for stream, kind, payload in rows],
        }
        for name, direction, rows in (("interleaved streams", "to_host", to_host), ("a client's", "to_guest", to_guest))
    ]


def connections() -> list[Json]:
    hello, answer = message(0, HELLO), message(0, ANSWER)
    opened = hello + message(1, PLAIN_EXEC)
    started = answer + message(1, {"type": "started", "pid": 7})
    ended = raw(1, STDOUT, b"") + raw(1, STDERR, b"") + message(1, {"type": "exit", "code": 0})
    full = raw(1, STDOUT, bytes(1)) * 3
    guest: list[tuple[str, str, str]] = [
        ("hello alone", hello, "ok"),
        ("hello and requests, pipelined", opened + message(3, {"type": "status"}), "ok"),
        ("a request before hello", message(1, PLAIN_EXEC), "error"),
        ("hello twice", hello + hello, "error"),
        ("a request on an even id", hello + message(2, {"type": "status"}), "error"),
        ("a second request on an open stream", opened + message(1, PLAIN_EXEC), "error"),
        ("data for a stream that was never opened", hello + raw(1, STDIN, b"x"), "error"),
        ("credit for a stream that was never opened", hello + credit(7, STDOUT, 1), "error"),
        ("data to the host's side", opened + raw(1, STDOUT, b"x"), "error"),
        ("credit for what the guest does not send", opened + credit(1, STDIN, 1), "error"),
        ("credit beyond the window", opened + credit(1, STDOUT, 1), "error"),
        ("data after the end of file", opened + raw(1, STDIN, b"") + raw(1, STDIN, b"x"), "error"),
        ("a second end of file", opened + raw(1, STDIN, b"") + raw(1, STDIN, b""), "error"),
    ]  # more data than credit would be 2 MiB of hex: each side tests it by itself
    host: list[tuple[str, str, str]] = [
        ("started, data, exit", started + full + ended, "ok"),
        ("no hello before the answer", message(1, {"type": "started", "pid": 7}), "error"),
        ("data for an ended stream is dropped", started + ended + raw(1, STDOUT, b"late"), "ok"),
        ("credit for an ended stream is dropped", started + ended + credit(1, STDIN, 1), "ok"),
        ("an answer on a stream that was never opened", answer + message(9, {"type": "result"}), "error"),
        ("data for a stream that was never opened", answer + raw(9, STDOUT, b"x"), "error"),
        ("data to the guest's side", started + raw(1, STDIN, b"x"), "error"),
        ("credit beyond the window", started + credit(1, STDIN, 1), "error"),
        ("credit for what the host does not send", started + credit(1, STDOUT, 1), "error"),
        ("data after the end of file", started + raw(1, STDOUT, b"") + raw(1, STDOUT, b"x"), "error"),
    ]
    return [
        {"name": name, "receiver": receiver, "sent": sent, "hex": received, "verdict": verdict}
        for receiver, sent, rows in (("guest", "", guest), ("host", opened, host))
        for name, received, verdict in rows
    ]


def document() -> Json:
    return {
        "frames": frames(), "errors": errors(), "incomplete": incomplete(), "headers": headers(),
        "sequences": sequences(), "connections": connections(),
    }  # fmt: skip


if __name__ == "__main__":
    target = Path(__file__).with_name("frames.json")
    target.write_text(json.dumps(document(), indent=1, ensure_ascii=True) + "\n")
