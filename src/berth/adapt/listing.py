"""What is in an image, read from its layers, without unpacking it: programs, links, and the text of a few files.

Owns the names of the merged tree; `facts` asks. It is exact where layers say what they mean, and no gate: a layer that
breaks the rules of docs/images.md is refused when it is unpacked. Memory is bounded, whatever the layers hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from berth.errors import ImageFormatError
from berth.oci import tar
from berth.oci.layer import MERGED, OPAQUE, WHITEOUT, Limits
from berth.oci.tree import split

_LINKS_MAX = 40  # as the kernel
_TEXT_MAX = 64 * 1024  # bytes of a file whose text is wanted
_ENTRIES_MAX = Limits().entries
_ENTRY = 200  # bytes that a name takes here, besides its letters
_MEMORY_MAX = 256 * 1024 * 1024


class Found(NamedTuple):
    """What a path leads to. text: of a file that was wanted."""

    path: bytes
    is_program: bool
    text: bytes = b""


class _Node(NamedTuple):
    """A link (link: its target), a program, or a wanted file, and the number of the layer that brought it."""

    layer: int
    link: bytes | None
    is_program: bool
    text: bytes = b""


class Listing:
    """The tree that the layers make; `add` them from the bottom up."""

    def __init__(self, texts: Collection[bytes] = ()) -> None:
        """texts: the paths of files whose text is wanted."""
        self._texts = frozenset(texts)
        self._nodes: dict[bytes, _Node] = {}
        self._layer = 0
        self._hidden: set[bytes] = set()  # by the current layer, of those below
        self._taken = 0  # bytes of memory, about

    def add(self, reader: tar.TarReader, *, where: str) -> None:
        """Take a layer on top. Raises ImageFormatError when it is damaged or lists more than fits in memory."""
        self._layer += 1
        self._hidden.clear()
        for count, entry in enumerate(reader):
            if count >= _ENTRIES_MAX:
                raise ImageFormatError(f"{where} has more than {_ENTRIES_MAX} entries")
            try:
                self._take(entry, reader)
            except ImageFormatError as error:
                raise ImageFormatError(f"{where}: {error.message}") from error
        if self._hidden:
            self._nodes = {path: node for path, node in self._nodes.items() if not self._is_hidden(path, node)}

    def find(self, path: bytes) -> Found | None:
        """Follow `path` inside the image; None when it ends at nothing known, or in a loop."""
        true = self._resolve(path)
        node = None if true is None else self._nodes.get(true)
        return None if true is None or node is None else Found(true, node.is_program, node.text)

    # Taking entries in

    def _take(self, entry: tar.Entry, reader: tar.TarReader) -> None:
        folder, _, name = split(entry.name).rpartition(b"/")
        parent = self._resolve(folder) if folder else b""
        if parent is None or not name:
            return
        path = _join(parent, name)
        if name.startswith(WHITEOUT):
            self._hide(parent if name == OPAQUE else _join(parent, name[len(WHITEOUT) :]), opaque=name == OPAQUE)
            return
        node = self._node(entry, path, reader)
        if node is not None:
            self._taken += _ENTRY + len(path) + len(node.link or b"") + len(node.text)
            self._check_memory()
            self._nodes[path] = node
        elif not (entry.kind == tar.DIRECTORY and self._stays_link(path)):
            self._nodes.pop(path, None)

    def _node(self, entry: tar.Entry, path: bytes, reader: tar.TarReader) -> _Node | None:
        match entry.kind:
            case tar.SYMLINK:
                return _Node(self._layer, entry.link, is_program=False)
            case tar.HARDLINK:
                same = self._nodes.get(self._resolve(split(entry.link), last=False) or b"")
                return None if same is None else same._replace(layer=self._layer)
            case tar.FILE:
                is_wanted = path in self._texts and entry.size <= _TEXT_MAX
                text = b"".join(reader.pieces()) if is_wanted and entry.sparse is None else b""
                is_program = bool(entry.mode & 0o111) and entry.size > 0
                return _Node(self._layer, None, is_program, text) if is_program or is_wanted else None
            case _:
                return None

    def _hide(self, path: bytes, *, opaque: bool) -> None:
        self._hidden.add(path)
        self._taken += _ENTRY + len(path)
        self._check_memory()
        below = self._nodes.get(path)
        if not opaque and below is not None and below.layer < self._layer:
            del self._nodes[path]  # at once: a link that is gone leads nowhere any more

    def _is_hidden(self, path: bytes, node: _Node) -> bool:
        if node.layer == self._layer:
            return False
        return path in self._hidden or any(folder in self._hidden for folder in _folders(path)) or b"" in self._hidden

    def _stays_link(self, path: bytes) -> bool:
        node = self._nodes.get(path)
        return node is not None and node.link is not None and path in MERGED and self._resolve(path) == b"usr/" + path

    def _check_memory(self) -> None:
        if self._taken > _MEMORY_MAX:
            raise ImageFormatError("more programs and links than any image has")

    # Finding the way

    def _resolve(self, path: bytes, *, last: bool = True) -> bytes | None:
        """Return the true path of a name, its links followed inside the tree (the last one too); None for a loop."""
        waiting = [part for part in path.split(b"/") if part not in (b"", b".")][::-1]
        true = b""
        links = 0
        while waiting:
            part = waiting.pop()
            if part == b"..":
                true = true.rpartition(b"/")[0]
                continue
            here = _join(true, part)
            node = self._nodes.get(here)
            if node is None or node.link is None or (not waiting and not last):
                true = here
                continue
            links += 1
            if links > _LINKS_MAX or len(waiting) > 4096:
                return None
            if node.link.startswith(b"/"):
                true = b""
            waiting += [name for name in node.link.split(b"/") if name not in (b"", b".")][::-1]
        return true


def _folders(path: bytes) -> Iterator[bytes]:
    while b"/" in path:
        path = path.rpartition(b"/")[0]
        yield path


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name
