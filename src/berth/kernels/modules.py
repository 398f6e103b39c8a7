"""Which modules a VM needs, in the order in which they are loaded: read from the kernel's own lists. Pure but for that.

Source: modules.dep(5): each line names a module and all that it needs, to be loaded from the last to the first;
modules.builtin: what the image holds; modprobe.d(5): softdep; names take `-` and `_` for the same letter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

# Before the root file system can be mounted …
EARLY = ("virtio_pci", "virtio_blk", "ext4", "virtio_console")
# … and what can wait until then. What else the guest wants, it loads by itself from the modules disk.
LATER = ("virtiofs", "virtio_net", "virtio_balloon", "virtio_rng")

_SUFFIX = re.compile(r"\.ko(?:\.(?:gz|xz|zst))?$")


def module_name(path: str) -> str:
    """Return a module's name by its file: ``kernel/drivers/char/hw_random/virtio-rng.ko.xz`` is `virtio_rng`."""
    return _SUFFIX.sub("", PurePosixPath(path).name).replace("-", "_")


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleIndex:
    """The lists that come with a kernel's modules.

    needs: each module's file, with the files that it needs, in the order of loading. paths: file by name. builtin:
    names. before: names, or aliases, of what should be loaded before a module if it is there. aliases: names that stand
    for modules; those with patterns are left out.
    """

    needs: Mapping[str, tuple[str, ...]]
    paths: Mapping[str, str]
    builtin: frozenset[str]
    before: Mapping[str, tuple[str, ...]]
    aliases: Mapping[str, tuple[str, ...]]

    def order(self, names: Sequence[str], loaded: Sequence[str] = ()) -> list[str]:
        """List the files to load for `names`, each once and after all it needs; not those of `loaded` again.

        What is built in, and what this kernel does not have, is left out.
        """
        wanted: dict[str, None] = dict.fromkeys(loaded)
        for name in names:
            for path in self._resolve(name.replace("-", "_"), frozenset()):
                wanted.setdefault(path)
        return [path for path in wanted if path not in set(loaded)]

    def _resolve(self, name: str, above: frozenset[str]) -> Iterator[str]:
        path = self.paths.get(name)
        if path is None or name in above:  # in `above`: soft dependencies may lead in a circle
            return
        for needed in (*self.needs[path], path):
            for soft in self.before.get(module_name(needed), ()):
                for found in self._meant(soft):
                    yield from self._resolve(found, above | {name})
            yield needed

    def _meant(self, word: str) -> tuple[str, ...]:
        name = word.replace("-", "_")
        return (name,) if name in self.paths or name in self.builtin else self.aliases.get(name, ())


def load_index(folder: Path) -> ModuleIndex:
    """Read the lists of ``lib/modules/VERSION``; one that is missing is empty."""
    needs = dict(_parse_dependencies(_text(folder / "modules.dep")))
    return ModuleIndex(
        needs=needs,
        paths={module_name(path): path for path in needs},
        builtin=frozenset(module_name(line) for line in _text(folder / "modules.builtin").splitlines()),
        before=dict(_parse_soft(_text(folder / "modules.softdep"))),
        aliases=_parse_aliases(_text(folder / "modules.alias")),
    )


def _parse_dependencies(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for line in text.splitlines():
        path, colon, needed = line.partition(":")
        if colon and _is_inside(path) and all(map(_is_inside, needed.split())):
            yield path, tuple(reversed(needed.split()))


def _is_inside(path: str) -> bool:
    return bool(path) and not path.startswith("/") and ".." not in path.split("/")


def _parse_soft(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Read ``softdep NAME pre: A B post: C``: what stands behind `pre:`."""
    for line in text.splitlines():
        match = re.fullmatch(r"softdep\s+(\S+)\s+(?:post:.*?)?pre:\s*(.*?)(?:\s*post:.*)?", line.strip())
        if match:
            yield match[1].replace("-", "_"), tuple(match[2].split())


def _parse_aliases(text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "alias" and not set("*?[:") & set(words[1]):
            name = words[1].replace("-", "_")
            found[name] = (*found.get(name, ()), words[2].replace("-", "_"))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
