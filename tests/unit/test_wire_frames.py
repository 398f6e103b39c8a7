"""Frames and JSON texts: whatever comes, whole frames or a ProtocolError."""

from __future__ import annotations

import json
import tracemalloc
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import ProtocolError
from berth.wire import jsontext
from berth.wire.frames import (
    CREDIT,
    HEADER_SIZE,
    MAX_DATA,
    MAX_MESSAGE_TO_GUEST,
    MESSAGE,
    STDERR,
    STDIN,
    STDOUT,
    Decoder,
    decode_credit,
    encode_credit,
    encode_frame,
    encode_header,
)

if TYPE_CHECKING:
    from berth.wire.frames import Side

sides = st.sampled_from(["host", "guest"])
frame_values = st.tuples(
    st.integers(1, 2**32 - 1), st.sampled_from([STDIN, STDOUT, STDERR, MESSAGE]), st.binary(max_size=3000)
)


def drain(decoder: Decoder) -> list[tuple[int, int, bytes]]:
    """Take all frames that are whole."""
    found: list[tuple[int, int, bytes]] = []
    while (frame := decoder.next_frame()) is not None:
        found.append((frame[0], frame[1], bytes(frame[2])))
    return found


@given(st.lists(frame_values, max_size=8), st.data())
def test_what_was_encoded_is_decoded_however_it_is_split(
    frames: list[tuple[int, int, bytes]], data: st.DataObject
) -> None:
    encoded = b"".join(encode_frame(*frame) for frame in frames)
    decoder, found, rest = Decoder("host"), list[tuple[int, int, bytes]](), encoded
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        decoder.feed(rest[:count])
        rest = rest[count:]
        found += drain(decoder)
    assert found == frames
    assert decoder.is_empty


@given(st.lists(frame_values, max_size=8), st.data())
def test_receiving_in_place_gives_the_same(frames: list[tuple[int, int, bytes]], data: st.DataObject) -> None:
    encoded = b"".join(encode_frame(*frame) for frame in frames)
    decoder, found, rest = Decoder("host"), list[tuple[int, int, bytes]](), encoded
    while rest:
        room = decoder.buffer()
        count = data.draw(st.integers(1, min(len(rest), len(room))))
        room[:count] = rest[:count]
        decoder.received(count)
        rest = rest[count:]
        found += drain(decoder)
    assert found == frames


@given(sides, st.lists(st.binary(max_size=40), max_size=20))
def test_noise_gives_frames_or_a_protocol_error(side: Side, pieces: list[bytes]) -> None:
    decoder = Decoder(side)
    try:
        for piece in pieces:
            decoder.feed(piece)
            for stream, kind, payload in drain(decoder):
                assert 0 <= stream < 2**32
                if kind == CREDIT:
                    decode_credit(memoryview(payload))
                if kind == MESSAGE:
                    jsontext.decode_object(payload)
    except ProtocolError:
        return


@given(sides, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 255))
def test_any_header_is_judged_at_once(side: Side, stream: int, length: int, kind: int) -> None:
    decoder = Decoder(side)
    decoder.feed(length.to_bytes(4, "big") + stream.to_bytes(4, "big") + bytes([kind]))
    limit = MAX_MESSAGE_TO_GUEST if kind == MESSAGE else MAX_DATA
    try:
        decoder.next_frame()
    except ProtocolError:
        return
    assert length <= limit
    assert kind <= CREDIT


def test_a_broken_decoder_stays_broken() -> None:
    decoder = Decoder("host")
    decoder.feed(encode_header(1, 9, 0) + encode_frame(1, STDOUT, b"x"))
    for _ in range(3):
        with pytest.raises(ProtocolError, match="unknown kind 9"):
            decoder.next_frame()


def test_bulk_frames_are_received_without_being_moved() -> None:
    """The next read ends where the frame ends, and the payload is a view of the very buffer that was read into."""
    decoder = Decoder("host")
    encoded = encode_frame(1, STDOUT, bytes(MAX_DATA)) * 3
    reads = 0
    while encoded:
        room = decoder.buffer()
        count = min(len(room), len(encoded))
        room[:count] = encoded[:count]
        encoded = encoded[count:]
        decoder.received(count)
        reads += 1
        while (frame := decoder.next_frame()) is not None:
            assert len(frame[2]) == MAX_DATA
    assert reads <= 5
    assert decoder.is_empty


def test_what_was_announced_is_not_held_before_it_comes() -> None:
    tracemalloc.start()
    try:
        decoders = [Decoder("host") for _ in range(4)]
        for decoder in decoders:
            decoder.feed(encode_header(1, STDOUT, MAX_DATA))
            assert decoder.next_frame() is None
            for _ in range(100):
                decoder.feed(b"x" * 1000)
                assert decoder.next_frame() is None
        assert tracemalloc.get_traced_memory()[0] < 4 * 3 * MAX_DATA
    finally:
        tracemalloc.stop()


def test_the_room_of_a_long_message_is_given_back() -> None:
    decoder = Decoder("guest")
    decoder.feed(encode_frame(1, MESSAGE, b" " * MAX_MESSAGE_TO_GUEST))
    assert len(drain(decoder)) == 1
    assert len(decoder.buffer()) < MAX_DATA


def test_a_payload_outlives_the_growth_of_the_buffer() -> None:
    decoder = Decoder("host")
    decoder.feed(encode_frame(1, STDOUT, b"kept") + encode_header(1, STDOUT, MAX_DATA))
    frame = decoder.next_frame()
    assert frame is not None
    assert decoder.next_frame() is None
    decoder.feed(bytes(MAX_DATA))
    assert bytes(frame[2]) == b"kept"


def test_credit_is_read_as_it_is_written() -> None:
    assert decode_credit(memoryview(encode_credit(5, STDERR, 262144))[HEADER_SIZE:]) == (STDERR, 262144)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_both_codecs_write_and_read_the_same(document: dict[str, object]) -> None:
    (write_c, read_c), (write_python, read_python) = jsontext.c_codec(), jsontext.python_codec()
    assert write_c(document) == write_python(document)
    assert read_c(write_c(document)) == read_python(write_c(document)) == document


@given(st.text(alphabet='{}[]":,0123456789.eE+-truefalsnN \\u\n', max_size=40))
def test_both_codecs_refuse_the_same(text: str) -> None:
    def read(codec: jsontext.Decode) -> object:
        try:
            return repr(codec(text))
        except ValueError:
            return "refused"

    assert read(jsontext.c_codec()[1]) == read(jsontext.python_codec()[1])


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,\\a1', max_size=80).map(str.encode))
def test_a_text_is_an_object_or_a_protocol_error(text: bytes) -> None:
    try:
        document = jsontext.decode_object(text)
    except ProtocolError:
        return
    assert json.loads(text) == document


@pytest.mark.parametrize("depth", [33, 100, 5000, 60000])
def test_depth_is_limited(depth: int) -> None:
    with pytest.raises(ProtocolError, match="nested deeper"):
        jsontext.decode_object(b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}")
    with pytest.raises(ProtocolError, match="nested deeper"):
        jsontext.decode_object(b'{"a":' * depth + b"1" + b"}" * depth)


def test_what_is_no_json_type_is_our_mistake() -> None:
    with pytest.raises(TypeError):
        jsontext.encode_object({"a": cast("str", object())})
