"""Frozen records without `dataclasses`. Owns `Record`, the base of the messages; only `wire` uses it.

Measured on the fast path of `berth run` (CPython 3.11, bare start 11 ms): `import dataclasses` costs 15 ms and each
frozen class 0.5 ms more, `typing.NamedTuple` 10 ms and 0.1 ms; this costs nothing that can be measured. Type checkers
see a keyword-only frozen dataclass.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import dataclass_transform
else:

    def dataclass_transform(**_: object) -> object:
        return lambda cls: cls


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Record:
    """An immutable value: its annotated members are given by keyword; a class attribute is a member's default."""

    def __init__(self, **members: object) -> None:
        cls = type(self)
        names = cls.__annotations__
        for name in names:
            if name not in members:
                if not hasattr(cls, name):
                    raise TypeError(f"{cls.__name__} needs {name}")
                members[name] = getattr(cls, name)
        if len(members) != len(names):
            raise TypeError(f"{cls.__name__} has no member {', '.join(members.keys() - names.keys())}")
        self.__dict__.update(members)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} can't be changed")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.items()))

    def __repr__(self) -> str:
        members = ", ".join(f"{name}={value!r:.80}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({members})"
