"""The host's own apt sources: where its packages come from. Owns their two formats; `bootstrap` uses it; layer 2.

Source: sources.list(5): the one-line format (*.list) and deb822 (*.sources).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s*(?P<components>.*)")


@dataclasses.dataclass(frozen=True, slots=True)
class AptSource:
    """One suite of one archive. signed_by: the path of a keyring, "" when the source names none."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""

    def line(self) -> str:
        """Print it in the one-line format."""
        options = f"[signed-by={self.signed_by}] " if self.signed_by else ""
        return f"deb {options}{self.uri} {self.suite} {' '.join(self.components)}"


def read_apt_sources(root: Path = Path("/etc/apt")) -> list[AptSource]:
    """Read all enabled binary sources; a file that can't be read has none."""
    found: list[AptSource] = []
    for path in [root / "sources.list", *sorted((root / "sources.list.d").glob("*"))]:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        if path.suffix == ".list":
            found += _parse_lines(text)
        elif path.suffix == ".sources":
            found += parse_deb822(text)
    return found


def _parse_lines(text: str) -> Iterator[AptSource]:
    for line in text.splitlines():
        match = _LINE.fullmatch(line.partition("#")[0].strip())
        if match is None:
            continue
        options = str(match["options"] or "").split()
        keyring = next((option.removeprefix("signed-by=") for option in options if option.startswith("signed-by=")), "")
        components = tuple(str(match["components"]).split())
        yield AptSource(str(match["uri"]), str(match["suite"]), components, _keyring(keyring.strip('"')))


def parse_deb822(text: str) -> Iterator[AptSource]:
    """Read stanzas of the deb822 format."""
    for stanza in re.split(r"\n(?:[ \t]*\n)+", "\n".join(_without_comments(text))):
        fields = _fields(stanza)
        if fields.get("enabled", "yes").lower() in ("no", "false", "0") or "deb" not in fields.get("types", "").split():
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                components = tuple(fields.get("components", "").split())
                yield AptSource(uri, suite, components, _keyring(fields.get("signed-by", "")))


def _without_comments(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if not line.startswith("#"))


def _fields(stanza: str) -> Mapping[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1] in (" ", "\t"):
            fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
        else:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def _keyring(signed_by: str) -> str:
    """Return the first keyring; a key that stands in the file itself is left to apt's trusted ones."""
    first = signed_by.split(",")[0].strip()
    return first if first.startswith("/") and "\n" not in first else ""
