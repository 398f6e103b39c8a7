"""JSON objects as the protocol has them. Owns the text form of messages; only `wire` uses it.

Measured on the fast path of `berth run`: `import json` costs 8 ms (it brings `re` and `enum`), of which nothing is
needed when the C half that does its work is there. `_json` is CPython's own and promised to nobody, so it decides
nothing alone: where it is missing or different, and for every text that it does not like, `json` itself is asked.
"""

from __future__ import annotations

import sys

from berth.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn, TypeAlias

    from _typeshed import ReadableBuffer

    Encode: TypeAlias = Callable[[object], str]
    Decode: TypeAlias = Callable[[str], object]

MAX_DEPTH = 32
_SPACE = " \t\n\r"  # RFC 8259, section 2


def encode_object(document: dict[str, object]) -> bytes:
    """Return the JSON text of `document`, in ASCII."""
    return _encode(document).encode("ascii")


def decode_object(text: ReadableBuffer) -> dict[str, object]:
    """Read one JSON object in UTF-8, at most MAX_DEPTH levels deep. Raises ProtocolError."""
    try:
        document = _decode(str(text, "utf-8"))
    except RecursionError:
        raise ProtocolError(f"a message that is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise ProtocolError(f"a message that is no JSON: {error}") from error
    if not is_object(document):
        raise ProtocolError("a message that is no JSON object")
    _check_depth(document)
    return document


if TYPE_CHECKING:
    from typing import TypeGuard

    def is_object(value: object) -> TypeGuard[dict[str, object]]: ...
    def is_list(value: object) -> TypeGuard[list[object]]: ...

else:

    def is_object(value: object) -> bool:
        """Say whether a JSON value is an object; its keys are strings then."""
        return type(value) is dict

    def is_list(value: object) -> bool:
        """Say whether a JSON value is a list."""
        return type(value) is list


def _check_depth(document: object) -> None:
    level = [document]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for value in level:
            if is_object(value):
                below.extend(value.values())
            elif is_list(value):
                below.extend(value)
        if not below:
            return
        level = below
    if any(is_object(value) or is_list(value) for value in level):
        raise ProtocolError(f"a message that is nested deeper than {MAX_DEPTH} levels")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refuse_value(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} is no JSON type")


def python_codec() -> tuple[Encode, Decode]:
    """Return what writes and what reads, by `json`."""
    import json

    encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    return encoder.encode, lambda text: decoder.decode(text)


def c_codec() -> tuple[Encode, Decode]:
    """Return what writes and what reads, by `_json`. Raises when this Python's `_json` is not as we know it."""
    import _json

    class Context:
        """What make_scanner asks its JSONDecoder for. Source: CPython, Modules/_json.c, scanner_new."""

        strict = True
        object_hook = None
        object_pairs_hook = None
        parse_float = float
        parse_int = int
        parse_constant = staticmethod(_refuse_constant)

    context: Any = Context()
    scan = _json.make_scanner(context)
    flags = {"sort_keys": False, "skipkeys": False, "allow_nan": False}
    encoder = _json.make_encoder(
        markers=None, default=_refuse_value, encoder=_json.encode_basestring_ascii, indent=None,
        key_separator=":", item_separator=",", **flags,
    )  # fmt: skip

    def encode(document: object) -> str:
        return "".join(encoder(document, 0))

    def decode(text: str) -> object:
        stripped = text.strip(_SPACE)
        try:
            document, end = scan(stripped, 0)
        except (ValueError, StopIteration, SystemError):
            # SystemError: up to 3.11 it can't make a JSONDecodeError unless json.decoder is imported.
            return python_codec()[1](text)
        return document if end == len(stripped) else python_codec()[1](text)

    sample = {"é": [1, -2.5, True, None, "\n"]}
    if decode(encode(sample)) != sample:
        raise ImportError("_json does not do what it did")
    return encode, decode


def _choose() -> tuple[Encode, Decode]:
    if hasattr(sys, "gettotalrefcount"):
        return python_codec()  # a debug build of Python aborts where others raise SystemError
    try:
        return c_codec()
    except (ImportError, AttributeError, TypeError):
        return python_codec()


_encode, _decode = _choose()
