"""Sizes and times as people write them."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from berth.errors import InvalidArgumentError
from berth.units import GIB, KIB, MIB, format_size, parse_size, utc_now


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * MIB),
        ("8G", 8 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("1048576", MIB),
        ("1", 1),
        ("2k", 2 * KIB),
        ("2 KiB", 2 * KIB),
        ("2kb", 2 * KIB),
        (" 1T ", 1024 * GIB),
        ("100B", 100),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.0G", "-1G", "1X", "G", "1.5.2G", "1e9", "inf", "nan", "0x10", "9000000000P", "1 0", "1,5G", "½G"],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=re.escape(f"invalid memory '{text}'")) as caught:
        parse_size(text, what="memory")
    assert caught.value.hint


@given(st.text(max_size=20))
@example("9" * 400 + "P")
@example("٣G")
def test_any_text_is_a_size_or_an_error(text: str) -> None:
    try:
        size = parse_size(text)
    except InvalidArgumentError:
        return
    assert 0 < size < 2**63


@given(st.integers(1, 2**50))
def test_plain_bytes_are_exact(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.integers(1, 1023), st.sampled_from("KMGT"))
def test_whole_numbers_survive_a_round_trip(count: int, unit: str) -> None:
    assert format_size(parse_size(f"{count}{unit}")) == f"{count}{unit}"


@given(st.integers(0, 2**62))
def test_formatted_sizes_are_short_and_near(size: int) -> None:
    text = format_size(size)
    assert re.fullmatch(r"\d+(\.\d)?[BKMGT]", text)
    if size:
        assert abs(parse_size(text) - size) <= size * 0.06


@pytest.mark.parametrize(("size", "text"), [(0, "0B"), (1023, "1023B"), (1536, "1.5K"), (10 * KIB + 512, "10K")])
def test_formatting(size: int, text: str) -> None:
    assert format_size(size) == text


def test_now_is_rfc_3339() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())
