"""Machine names and image references."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from berth.errors import InvalidArgumentError
from berth.names import ImageReference, parse_machine_name, parse_reference

DIGEST = "sha256:" + "0123456789abcdef" * 4
VALID_NAMES = st.from_regex(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)


@given(VALID_NAMES)
@example("a")
@example("0")
@example("a" * 63)
@example("a--b")
def test_valid_names(name: str) -> None:
    assert parse_machine_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "-", "A", "a_b", "a.b", "a b", "a" * 64, "ä", "a\n", "\na", "a/b", "..", "a\0", "１"]
)
def test_invalid_names(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_machine_name(name)
    assert "must start and end with a letter or digit" in (caught.value.hint or "")


@given(st.text(max_size=70))
def test_a_name_is_safe_or_refused(text: str) -> None:
    """Whatever is accepted can be a file name, a host name and a control group."""
    try:
        name = parse_machine_name(text)
    except InvalidArgumentError:
        return
    assert re.fullmatch(r"[a-z0-9-]{1,63}", name)
    assert not name.startswith("-")
    assert not name.endswith("-")


@pytest.mark.parametrize(
    ("text", "path", "tag", "digest", "familiar"),
    [
        ("debian", "docker.io/library/debian", "latest", None, "debian:latest"),
        ("debian:12", "docker.io/library/debian", "12", None, "debian:12"),
        ("docker://debian:12", "docker.io/library/debian", "12", None, "debian:12"),
        ("user/thing", "docker.io/user/thing", "latest", None, "user/thing:latest"),
        ("docker.io/debian", "docker.io/library/debian", "latest", None, "debian:latest"),
        ("localhost/a", "localhost/a", "latest", None, "localhost/a:latest"),
        ("localhost:5000/a/b:1.0", "localhost:5000/a/b", "1.0", None, "localhost:5000/a/b:1.0"),
        ("127.0.0.1:5000/a", "127.0.0.1:5000/a", "latest", None, "127.0.0.1:5000/a:latest"),
        ("[::1]:5000/a", "[::1]:5000/a", "latest", None, "[::1]:5000/a:latest"),
        ("quay.example/a/b/c:t", "quay.example/a/b/c", "t", None, "quay.example/a/b/c:t"),
        (f"debian@{DIGEST}", "docker.io/library/debian", None, DIGEST, f"debian@{DIGEST}"),
        (f"debian:12@{DIGEST}", "docker.io/library/debian", "12", DIGEST, f"debian:12@{DIGEST}"),
    ],
)
def test_registry_references(text: str, path: str, tag: str | None, digest: str | None, familiar: str) -> None:
    reference = parse_reference(text)
    assert reference == ImageReference("docker", path, tag, digest)
    assert reference.familiar == familiar
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "transport", "path"),
    [
        ("oci:/a/layout:tag", "oci", "/a/layout:tag"),
        ("oci-archive:a.tar", "oci-archive", "a.tar"),
        ("docker-archive:/x y.tar", "docker-archive", "/x y.tar"),
        ("rootfs:./dir", "rootfs", "./dir"),
        ("bootstrap:debian/bookworm?include=a,b", "bootstrap", "debian/bookworm?include=a,b"),
    ],
)
def test_transports(text: str, transport: str, path: str) -> None:
    reference = parse_reference(text)
    assert reference == ImageReference(transport, path)
    assert str(reference) == reference.familiar == text


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "@", "debian:", "debian@", "Debian", "debian:12:13", "-x", "a//b", "/a", "a/", "debian@sha256:12",
        "debian@md5:abc", f"debian@{DIGEST.upper()}", "debian:ta g", "debian:" + "t" * 129, "oci:", "rootfs:", "a b",
        "http://x/y", "docker://", "../../etc/passwd", "a\n", "debian:12\n", "x" * 5000 + "!",
    ],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="invalid image reference"):
        parse_reference(text)


def test_an_image_may_be_called_like_a_transport() -> None:
    assert parse_reference("docker:24").path == "docker.io/library/docker"


@given(st.text(max_size=60))
@example("oci::")
@example("a:b@c:d/e")
def test_any_text_is_a_reference_or_an_error(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidArgumentError:
        return
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize("text", ["docker.io/my.corp/app:1", "docker.io/localhost/app:1", "docker.io/library/a/b:1"])
def test_the_familiar_form_means_the_same(text: str) -> None:
    assert str(parse_reference(parse_reference(text).familiar)) == text


_COMPONENT = st.from_regex(r"[a-z0-9]{1,8}(?:[._-][a-z0-9]{1,8})?", fullmatch=True)


@given(
    st.sampled_from(["docker.io", "localhost", "localhost:5000", "r.example", "r.example:443"]),
    st.lists(_COMPONENT, min_size=1, max_size=4),
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True),
)
def test_written_in_full_a_reference_is_read_back(registry: str, parts: list[str], tag: str) -> None:
    reference = parse_reference(f"{registry}/{'/'.join(parts)}:{tag}")
    assert parse_reference(str(reference)) == reference
    assert parse_reference(reference.familiar) == reference
    assert reference.tag == tag
