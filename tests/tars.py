"""Layers and images for tests: archives with any member one likes, also those that no tool would write."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from berth.oci import spec
from berth.oci.layer import Devices, Limits, UnpackReport
from berth.oci.unpack import unpack_layers

NAMES = {tarfile.DIRTYPE: b"5", tarfile.SYMTYPE: b"2", tarfile.LNKTYPE: b"1"}
END = bytes(1024)


def member(
    name: str | bytes,
    data: bytes = b"",
    *,
    kind: bytes = b"0",
    link: str | bytes = b"",
    mode: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    mtime: int = 1_000_000_000,
    size: int | bytes | None = None,
    device: tuple[int, int] = (0, 0),
    pax: Mapping[str, str | bytes] | None = None,
) -> bytes:
    """One member: header blocks, data, padding. size: what the header says, when it is to lie."""
    name, link = os.fsencode(name), os.fsencode(link)
    records = dict(pax or {})
    if len(name) > 100:
        records.setdefault("path", name)
    if len(link) > 100:
        records.setdefault("linkpath", link)
    head = b""
    if records:
        body = pax_records(records)
        head = header(b"pax", b"x", size=len(body)) + padded(body)
    block = header(
        name[:100], kind, link=link[:100], mode=mode if mode is not None else (0o755 if kind == b"5" else 0o644),
        uid=os.getuid() if uid is None else uid, gid=os.getgid() if gid is None else gid, mtime=mtime,
        size=len(data) if size is None else size, device=device,
    )  # fmt: skip
    return head + block + padded(data)


def header(
    name: bytes, kind: bytes, *, link: bytes = b"", mode: int = 0o644, uid: int = 0, gid: int = 0, mtime: int = 0,
    size: int | bytes = 0, device: tuple[int, int] = (0, 0), magic: bytes = b"ustar\x0000",
) -> bytes:  # fmt: skip
    """One header block with a right checksum."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:124] = octal(mode, 8) + octal(uid, 8) + octal(gid, 8)
    block[124:136] = size if isinstance(size, bytes) else octal(size, 12)
    block[136:148] = octal(mtime, 12)
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = magic
    block[329:345] = octal(device[0], 8) + octal(device[1], 8)
    return with_checksum(block)


def with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(value: int, width: int) -> bytes:
    """A number as tar writes it: octal digits, base 256 when they do not do."""
    digits = b"%0*o\0" % (width - 1, value) if value >= 0 else b""
    if len(digits) == width:
        return digits
    return (
        (value + (1 << (8 * width - 1))).to_bytes(width, "big")
        if value >= 0
        else value.to_bytes(width, "big", signed=True)
    )


def pax_records(records: Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]) -> bytes:
    items = records.items() if isinstance(records, Mapping) else records
    out = b""
    for key, value in items:
        text = b" " + os.fsencode(key) + b"=" + os.fsencode(value) + b"\n"
        length = len(text) + 1
        while len(str(length)) + len(text) != length:
            length = len(str(length)) + len(text)
        out += str(length).encode() + text
    return out


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def directory(name: str | bytes, *, mode: int = 0o755, mtime: int = 1_000_000_000) -> bytes:
    return member(name, kind=b"5", mode=mode, mtime=mtime)


def symlink(name: str | bytes, target: str | bytes) -> bytes:
    return member(name, kind=b"2", link=target)


def hardlink(name: str | bytes, target: str | bytes) -> bytes:
    return member(name, kind=b"1", link=target)


@contextlib.contextmanager
def file_of(data: bytes) -> Generator[int]:
    """A descriptor of a nameless file with that content."""
    fd = os.memfd_create("test")
    try:
        os.write(fd, data) if len(data) < 2**30 else None
        yield fd
    finally:
        os.close(fd)


def unpack(
    root: Path,
    *layers: bytes,
    devices: Devices = "skip",
    limits: Limits | None = None,
    media_type: str = spec.LAYER,
) -> UnpackReport:
    """Apply layers (without their end marks) to a directory."""
    root.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        fds = [(stack.enter_context(file_of(layer + END)), media_type) for layer in layers]
        target = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, target)
        return unpack_layers(target, fds, devices=devices, limits=limits)


def listing(root: Path) -> dict[str, str]:
    """All names below a directory, with what they are: `dir`, the content of a file, `-> TARGET`."""
    found: dict[str, str] = {}
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(folder, name)
            shown = str(path.relative_to(root))
            if path.is_symlink():
                found[shown] = f"-> {os.readlink(path)}"
            else:
                found[shown] = "dir" if path.is_dir() else path.read_text(errors="replace")
    return found


# An ELF header of x86-64, or of another machine, as long as what berth reads of it, and a byte more.
def elf(machine: int = 62) -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0" + machine.to_bytes(2, "little") + bytes(44)


def rootfs(machine: int = 62) -> bytes:
    """A root file system as small as can be."""
    return (
        directory("./") + directory("./usr/") + directory("./usr/bin/") + symlink("./bin", "usr/bin")
        + member("./usr/bin/dash", elf(machine), mode=0o755) + symlink("./usr/bin/sh", "dash")
        + directory("./etc/") + member("./etc/hostname", b"test\n") + END
    )  # fmt: skip


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def descriptor(data: bytes, media_type: str, **more: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}


class LayoutWriter:
    """An OCI layout being written, as other tools write it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}

    def blob(self, data: bytes, media_type: str, **more: object) -> dict[str, object]:
        self.files[f"blobs/sha256/{digest(data).removeprefix('sha256:')}"] = data
        return descriptor(data, media_type, **more)

    def image(
        self, *layers: bytes, architecture: str = "amd64", compress: bool = True, **more: object
    ) -> dict[str, object]:
        """Write an image; return the descriptor of its manifest."""
        kind = spec.LAYER_GZIP if compress else spec.LAYER
        blobs = [self.blob(gzip.compress(layer, 1, mtime=0) if compress else layer, kind) for layer in layers]
        config = {
            "architecture": architecture, "os": "linux", "created": "2026-01-02T03:04:05Z",
            "config": {"Cmd": ["/sbin/init"], "Env": ["A=b"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
        }  # fmt: skip
        manifest = {
            "schemaVersion": 2, "mediaType": spec.MANIFEST, "config": self.blob(encode(config), spec.CONFIG),
            "layers": blobs, "annotations": {"test": "yes"},
        }  # fmt: skip
        return self.blob(encode(manifest), spec.MANIFEST, **more)

    def index(self, *manifests: dict[str, object], **more: object) -> dict[str, object]:
        document = {"schemaVersion": 2, "mediaType": spec.INDEX, "manifests": list(manifests)}
        return self.blob(encode(document), spec.INDEX, **more)

    def top(self, *manifests: dict[str, object]) -> None:
        self.files["index.json"] = encode({"schemaVersion": 2, "manifests": list(manifests)})

    def write(self, root: Path) -> Path:
        for name, data in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root

    def archive(self, path: Path) -> Path:
        path.write_bytes(tar_of(self.files))
        return path


def named(name: str) -> dict[str, str]:
    return {spec.REF_NAME: name}


def platform(architecture: str) -> dict[str, str]:
    return {"os": "linux", "architecture": architecture}


def encode(document: object) -> bytes:
    return json.dumps(document).encode()


def tar_of(files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    """An archive of files, and of symbolic links."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return out.getvalue()
