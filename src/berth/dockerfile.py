"""Which images a Dockerfile needs. Owns the little of its grammar that this takes; layer 2, for `build`.

buildah reads the file itself; this only finds what must be in its storage beforehand: the images of FROM, of
COPY --from and of RUN --mount=from. Source: docker's "Dockerfile reference": parser directives, FROM, ARG and FROM,
here-documents.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

from berth.errors import InvalidArgumentError

_DIRECTIVE = re.compile(r"#\s*([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(\S+)\s*")
_HEREDOC = re.compile(r"<<-?\s*([\"']?)([A-Za-z_][A-Za-z0-9_]*)\1")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?:(:?[-+])([^}]*))?\})")
_LENGTH_MAX = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Base:
    """An image that a Dockerfile is built on. reference: as the file has it; platform: of ``--platform``, or ""."""

    reference: str
    platform: str = ""


def find_bases(text: str, arguments: Mapping[str, str]) -> list[Base]:
    """Say which images the file names, each once, in order. arguments: what was given for its ARGs, and what is preset.

    Stages that the build skips are not told apart. Raises InvalidArgumentError for a file without FROM, or with a name
    that nothing is known of (a variable without a value).
    """
    if len(text) > _LENGTH_MAX:
        raise InvalidArgumentError(f"the Dockerfile is longer than {_LENGTH_MAX} bytes")
    known = dict(arguments)
    stages: set[str] = set()
    bases: dict[Base, None] = {}
    count = 0
    for word, rest in _instructions(text):
        if word == "ARG" and not count:
            for name, default in _assignments(rest):
                if default is not None and name not in arguments:
                    known[name] = _expand(default, known)
        elif word == "FROM":
            base, name = _from(rest, known)
            if base.reference.lower() not in stages and base.reference != "scratch":
                bases[base] = None
            stages |= {str(count), name}
            count += 1
        elif word in ("COPY", "ADD", "RUN"):
            for source in _sources(rest):
                expanded = _expand(source, known)
                # A number is a stage's; one that there is not is for buildah to refuse.
                if expanded.lower() not in stages and not expanded.isdecimal():
                    bases[Base(expanded)] = None
    if not count:
        raise InvalidArgumentError("the Dockerfile has no FROM")
    return list(bases)


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield each instruction's word, in capitals, and the rest of its line, continuations joined."""
    escape = "\\"
    lines = text.removeprefix("\ufeff").splitlines()
    for line in lines:
        directive = _DIRECTIVE.fullmatch(line.strip())
        if directive is None:
            break
        if directive[1].lower() == "escape":
            escape = directive[2]
    whole = ""
    closing: list[str] = []
    for line in lines:
        if closing:
            if line.strip("\t") == closing[0] or line == closing[0]:
                del closing[0]
            continue
        if line.lstrip().startswith("#") or (whole and not line.strip()):
            continue  # comments and empty lines may stand between continued lines
        if line.rstrip().endswith(escape):
            whole += line.rstrip()[:-1]
            continue
        word, _, rest = (whole + line).strip().partition(" ")
        whole = ""
        if word.upper() in ("RUN", "COPY", "ADD"):
            closing = [match[2] for match in _HEREDOC.finditer(rest)] if _closes(rest, lines) else []
        if word:
            yield word.upper(), rest.strip()


def _closes(rest: str, lines: list[str]) -> bool:
    """Say whether what looks like here-documents ends somewhere: ``cat <<EOF`` within quotes does not."""
    ends = {line.strip("\t") for line in lines}
    return all(match[2] in ends for match in _HEREDOC.finditer(rest))


def _from(rest: str, known: Mapping[str, str]) -> tuple[Base, str]:
    words = rest.split()
    platform = ""
    while words and words[0].startswith("--"):
        flag, _, value = words.pop(0).partition("=")
        if flag == "--platform":
            platform = _expand(value, known)
    if not words:
        raise InvalidArgumentError("the Dockerfile has a FROM without an image")
    reference = _expand(words[0], known)
    if not reference:
        raise InvalidArgumentError(f"'FROM {words[0]}' of the Dockerfile names no image", hint="give --build-arg")
    name = words[2].lower() if len(words) > 2 and words[1].upper() == "AS" else ""
    return Base(reference, platform), name


def _sources(rest: str) -> Iterator[str]:
    for word in rest.split():
        if word.startswith("--from="):
            yield word.removeprefix("--from=")
        elif word.startswith("--mount="):
            options = word.removeprefix("--mount=").split(",")
            yield from (option.removeprefix("from=") for option in options if option.startswith("from="))
        elif not word.startswith("--"):
            return  # flags come first


def _assignments(rest: str) -> Iterator[tuple[str, str | None]]:
    for word in rest.split():
        name, equals, value = word.partition("=")
        yield name, value.strip("\"'") if equals else None


def _expand(text: str, known: Mapping[str, str]) -> str:
    """Put in variables: ``$A``, ``${A}``, ``${A:-word}``, ``${A:+word}``; an unknown one is empty."""

    def value(match: re.Match[str]) -> str:
        found = known.get(match[1] or match[2], "")
        operator, word = match[3], match[4]
        if operator and operator.endswith("+"):
            return _expand(word, known) if found else ""
        return found or (_expand(word, known) if operator else "")

    return _VARIABLE.sub(value, text.strip("\"'"))
