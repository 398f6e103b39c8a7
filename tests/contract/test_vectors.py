"""The Python side against the vectors that the Go side reads too; tests/vectors/generate.py says what they mean."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, cast

import pytest

from berth.errors import ProtocolError
from berth.wire.connection import Connection
from berth.wire.frames import CREDIT, MESSAGE, Decoder, decode_credit, encode_frame
from berth.wire.jsontext import decode_object, encode_object
from berth.wire.messages import decode_to_guest, decode_to_host
from support import ROOT

if TYPE_CHECKING:
    from berth.wire.frames import Side

VECTORS: dict[str, list[dict[str, Any]]] = json.loads((ROOT / "tests/vectors/frames.json").read_text())
RECEIVERS: dict[str, Side] = {"to_guest": "guest", "to_host": "host"}


def receivers(vector: dict[str, Any]) -> list[Side]:
    """Say which sides a vector is for."""
    return ["guest", "host"] if vector["direction"] == "both" else [RECEIVERS[vector["direction"]]]


def vectors(*names: str) -> pytest.MarkDecorator:
    """Parametrize by the vectors of these lists."""
    found = [vector for name in names for vector in VECTORS[name]]
    ids = [f"{vector.get('direction', vector.get('receiver'))}: {vector['name']}" for vector in found]
    return pytest.mark.parametrize("vector", found, ids=ids)


def decode(receiver: Side, data: bytes, step: int) -> list[tuple[int, int, bytes]]:
    """Decode `data`, fed in pieces of `step`, with all the checks of a decoder."""
    decoder, found = Decoder(receiver), list[tuple[int, int, bytes]]()
    for start in range(0, len(data), step):
        decoder.feed(data[start : start + step])
        while (frame := decoder.next_frame()) is not None:
            stream, kind, payload = frame
            if kind == MESSAGE:
                assert isinstance(decode_object(payload).get("type"), str) or _untyped(payload, receiver)
            elif kind == CREDIT:
                decode_credit(payload)
            found.append((stream, kind, bytes(payload)))
    return found


def _untyped(payload: memoryview, receiver: Side) -> bool:
    (decode_to_host if receiver == "host" else decode_to_guest)(payload)  # raises
    return False


@vectors("frames")
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_valid_frames_are_decoded(vector: dict[str, Any], step: int) -> None:
    for receiver in receivers(vector):
        ((stream, kind, payload),) = decode(receiver, bytes.fromhex(vector["hex"]), step)
        assert (stream, kind) == (vector["stream"], vector["kind"])
        if kind == MESSAGE:
            assert decode_object(payload) == vector["message"]
        else:
            assert payload.hex() == vector["payload_hex"]


@vectors("frames")
def test_frames_are_encoded_the_same(vector: dict[str, Any]) -> None:
    if vector["kind"] == MESSAGE:
        assert decode_object(encode_object(vector["message"])) == vector["message"]
    else:
        frame = encode_frame(vector["stream"], vector["kind"], bytes.fromhex(vector["payload_hex"]))
        assert frame.hex() == vector["hex"]


@vectors("frames")
def test_messages_survive_our_types(vector: dict[str, Any]) -> None:
    """What we decode and write again says the same, but for members that we do not know."""
    known = vector["kind"] == MESSAGE and "[" not in vector["message"]["type"] and "deep" not in vector["message"]
    if not known:
        return
    for receiver in receivers(vector):
        decoder = decode_to_host if receiver == "host" else decode_to_guest
        message = decoder(encode_object(vector["message"]))
        if message.type != vector["message"]["type"]:  # pragma: no cover
            pytest.fail("the type changed")
        again = message.document()
        assert {**vector["message"], **again} == {
            **again,
            **{k: v for k, v in vector["message"].items() if k not in again},
        }


@vectors("errors")
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_broken_frames_are_refused(vector: dict[str, Any], step: int) -> None:
    for receiver in receivers(vector):
        with pytest.raises(ProtocolError):
            decode(receiver, bytes.fromhex(vector["hex"]), step)


@vectors("headers")
def test_lengths_are_limited_by_the_header_alone(vector: dict[str, Any]) -> None:
    for receiver in receivers(vector):
        if vector["ok"]:
            assert decode(receiver, bytes.fromhex(vector["hex"]), 1) == []
        else:
            with pytest.raises(ProtocolError):
                decode(receiver, bytes.fromhex(vector["hex"]), 1)


@vectors("incomplete")
def test_beginnings_wait_for_more(vector: dict[str, Any]) -> None:
    for receiver in receivers(vector):
        assert decode(receiver, bytes.fromhex(vector["hex"]), 1) == []


@vectors("sequences")
def test_frames_may_be_split_anywhere(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    expected = [(stream, kind, bytes.fromhex(payload)) for stream, kind, payload in vector["frames"]]
    for receiver in receivers(vector):
        for step in range(1, len(data) + 1):
            assert decode(receiver, data, step) == expected


@vectors("connections")
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_conversations_are_judged(vector: dict[str, Any], step: int) -> None:
    receiver = cast("Side", vector["receiver"])
    connection = Connection(receiver, version="0.1.0", init="running")
    for _stream, kind, payload in decode("guest", bytes.fromhex(vector["sent"]), 1 << 20):
        if kind == MESSAGE:
            message = decode_to_guest(payload)
            if message.type != "hello":  # ours is sent already
                connection.open(message)
    data = bytes.fromhex(vector["hex"])
    if vector["verdict"] == "error":
        with pytest.raises(ProtocolError):
            converse(connection, data, step)
    else:
        converse(connection, data, step)


def converse(connection: Connection, data: bytes, step: int) -> None:
    """Let the connection receive `data` in pieces."""
    for start in range(0, len(data), step):
        for _event in connection.feed(data[start : start + step]):
            pass


def test_the_vectors_are_what_the_generator_makes() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import json, generate; print(json.dumps(generate.document()))"],
        cwd=ROOT / "tests/vectors", capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert json.loads(made) == VECTORS
