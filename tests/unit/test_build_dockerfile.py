"""Which images a Dockerfile needs: the grammar that matters for it, and what is no grammar at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.dockerfile import Base, find_bases
from berth.errors import InvalidArgumentError


def names(text: str, **arguments: str) -> list[str]:
    return [base.reference for base in find_bases(text, arguments)]


def test_every_image_is_named_once_and_stages_are_none() -> None:
    text = """
        FROM debian:12 AS Build
        RUN make
        FROM alpine
        COPY --from=build /a /a
        COPY --from=0 /b /b
        COPY --chown=0:0 --from=tools:1 /c /c
        RUN --mount=type=bind,from=helper:2,target=/m --mount=type=cache,target=/c ls --from=no
        FROM scratch
        FROM BUILD
        FROM alpine
    """
    assert names(text) == ["debian:12", "alpine", "tools:1", "helper:2"]


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("ARG BASE=debian\nFROM $BASE:12", {}, "debian:12"),
        ("ARG BASE=debian\nFROM ${BASE}:12", {"BASE": "ubuntu"}, "ubuntu:12"),
        ("ARG V\nFROM debian:${V:-12}", {}, "debian:12"),
        ("ARG V\nFROM debian:${V:-12}", {"V": "13"}, "debian:13"),
        ("ARG V=1\nFROM debian${V:+:12}", {}, "debian:12"),
        ("ARG A=1 B='x y'\nARG C=$A\nFROM i:$C", {}, "i:1"),
        ('FROM "debian:12" AS x', {}, "debian:12"),
        ("from debian:12", {}, "debian:12"),
        ("FROM \\\n  # a comment\n\n  debian:12", {}, "debian:12"),
        ("# escape=`\nFROM `\n debian:12", {}, "debian:12"),
        ("\ufeffFROM debian:12", {}, "debian:12"),
        ("FROM debian:12\r\nRUN x\r\n", {}, "debian:12"),
        ("FROM host:5000/a/b@sha256:" + "0" * 64, {}, "host:5000/a/b@sha256:" + "0" * 64),
    ],
)
def test_names_are_read_as_docker_reads_them(text: str, arguments: dict[str, str], expected: str) -> None:
    assert names(text, **arguments) == [expected]


def test_an_arg_behind_from_does_not_count_for_the_next() -> None:
    with pytest.raises(InvalidArgumentError, match="names no image"):
        names("FROM a\nARG B=c\nFROM $B")


def test_the_platform_of_a_base_is_kept() -> None:
    text = "FROM --platform=$BUILDPLATFORM go AS b\nFROM --platform=linux/arm64 debian"
    found = find_bases(text, {"BUILDPLATFORM": "linux/amd64"})
    assert found == [Base("go", "linux/amd64"), Base("debian", "linux/arm64")]


def test_what_stands_in_a_here_document_is_no_instruction() -> None:
    text = "FROM a\nRUN <<EOF sh\nFROM b\nEOF\nCOPY <<-'X' <<Y /d\nFROM c\n\tX\nFROM d\nY\nCOPY --from=e / /"
    assert names(text) == ["a", "e"]


def test_what_only_looks_like_a_here_document_hides_nothing() -> None:
    assert names("FROM a\nRUN echo '<<EOF'\nFROM b") == ["a", "b"]


@pytest.mark.parametrize("text", ["", "# nothing", "RUN x", "FROM", "FROM --platform=x", "FROM $UNKNOWN"])
def test_a_file_without_an_image_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        names(text)


def test_a_huge_file_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="longer"):
        names("FROM a\n" + "#" * (1 << 20))


@given(st.text(alphabet="FROMARGCPYUN \n\\$${}:-+<=#`'\"abc123@/,", max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        find_bases(text, {})
    except InvalidArgumentError:
        return
