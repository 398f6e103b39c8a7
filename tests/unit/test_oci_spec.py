"""The documents of the image-spec: what is read, what is refused, and that what is written can be read."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import BerthError, ImageFormatError, InvalidArgumentError
from berth.oci import spec
from berth.oci.digest import digest_of, parse_digest, parse_prefix
from berth.oci.spec import Descriptor, ImageConfig, Index, Manifest, Platform

D = "sha256:" + "ab" * 32
DESCRIPTOR = {"mediaType": spec.LAYER, "digest": D, "size": 5}


def test_descriptor() -> None:
    document = {
        **DESCRIPTOR,
        "annotations": {"a": "b"},
        "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"},
    }
    descriptor = Descriptor.from_json(document, where="test")
    assert descriptor == Descriptor(
        spec.LAYER, parse_digest(D, where=""), 5, {"a": "b"}, Platform("linux", "arm64", "v8")
    )
    assert descriptor.to_json() == document


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1}, {"size": "5"}, {"size": 1.5}, {"size": None}, {"digest": "sha256:abc"}, {"digest": D.upper()},
        {"digest": 5}, {"platform": {"os": "x"}},
        {"digest": "sha512:" + "a" * 128}, {"mediaType": None}, {"annotations": []}, {"annotations": {"a": 1}},
        {"digest": "sha256:../../../../etc/passwd"}, {"size": True},
    ],
)  # fmt: skip
def test_bad_descriptors_name_their_place(change: dict[str, object]) -> None:
    with pytest.raises(ImageFormatError, match=r"^here"):
        Descriptor.from_json({**DESCRIPTOR, **change}, where="here")


def test_manifest_and_index() -> None:
    document: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": spec.MANIFEST,
        "config": DESCRIPTOR,
        "layers": [DESCRIPTOR],
    }
    manifest = Manifest.from_json(document, where="test")
    assert manifest.to_json() == document
    index = Index.from_json({"schemaVersion": 2, "manifests": [DESCRIPTOR]}, where="test")
    assert index.manifests == (manifest.config,)


@pytest.mark.parametrize(
    "document",
    [
        None, [], 5, {}, {"schemaVersion": 2}, {"schemaVersion": 1},
        {"schemaVersion": 2, "config": DESCRIPTOR, "layers": {}},
        {"schemaVersion": 2, "config": DESCRIPTOR, "layers": [5]},
        {"schemaVersion": "2", "config": DESCRIPTOR, "layers": []},
    ],
)  # fmt: skip
def test_bad_manifests(document: object) -> None:
    with pytest.raises(ImageFormatError, match=r"^here"):
        Manifest.from_json(document, where="here")


def test_config_of_docker_with_its_nulls() -> None:
    config = ImageConfig.from_json(
        {
            "architecture": "amd64", "os": "linux", "created": "2026-01-01T00:00:00Z", "history": [],
            "config": {"Cmd": ["/bin/sh"], "Env": None, "Entrypoint": None, "Labels": None,
                       "ExposedPorts": {"80/tcp": {}}},
            "rootfs": {"type": "layers", "diff_ids": [D]},
        },
        where="test",
    )  # fmt: skip
    assert (config.cmd, config.env, config.exposed_ports, config.diff_ids) == (("/bin/sh",), (), ("80/tcp",), (D,))
    assert ImageConfig.from_json(config.to_json(), where="again") == config


@pytest.mark.parametrize(
    "document",
    [
        None,
        {"os": "linux"},
        {"os": "linux", "architecture": 5},
        {"os": "l", "architecture": "a", "config": {"Cmd": "sh"}},
    ],
)
def test_bad_configs(document: object) -> None:
    with pytest.raises(ImageFormatError, match=r"^here"):
        ImageConfig.from_json(document, where="here")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"[" * 100_000, b"[" * 80 + b"]" * 80, b" " * (spec.DOCUMENT_MAX + 1)]
)
def test_json_is_bounded(data: bytes) -> None:
    with pytest.raises(ImageFormatError, match=r"^here"):
        spec.parse_json(data, where="here")


_KEYS = [
    "config", "layers", "mediaType", "digest", "size", "schemaVersion", "manifests", "os", "architecture", "rootfs",
    "platform",
]  # fmt: skip
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=5),
    max_leaves=12,
)


@given(_JSON)
def test_any_json_is_a_document_or_an_image_error(document: object) -> None:
    for decode in (Descriptor.from_json, Manifest.from_json, Index.from_json, ImageConfig.from_json):
        with contextlib.suppress(ImageFormatError):
            decode(json.loads(json.dumps(document)), where="here")


def test_encoding_is_one_way() -> None:
    assert spec.encode_json({"b": 1, "a": [1, 2]}) == b'{"a":[1,2],"b":1}'


def test_platforms() -> None:
    assert spec.parse_platform("linux/arm64/v8") == Platform("linux", "arm64", "v8")
    assert spec.parse_platform("linux/arm64").same(Platform("linux", "arm64", "v8"))
    assert spec.host_platform().os == "linux"
    for text in ("linux", "linux/riscv64", "windows/amd64", "linux/arm64/v8/x", ""):
        with pytest.raises(InvalidArgumentError, match="invalid platform"):
            spec.parse_platform(text)


def test_digests() -> None:
    assert digest_of(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert parse_prefix("sha256:abcd") == parse_prefix("abcd") == "abcd"
    for text in ("abc", "sha256:", "xyzw", "debian", "a" * 65):
        assert parse_prefix(text) is None


def test_errors_are_berth_errors() -> None:
    assert issubclass(ImageFormatError, BerthError)
