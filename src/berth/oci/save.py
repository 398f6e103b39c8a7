"""Images out of the store into one file: `image save`. Owns the writing of OCI archives; layer 2.

Source: OCI image-spec v1.1, image-layout.md, as a tar archive: what skopeo and podman call oci-archive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import stat
import tarfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from berth.oci import spec, stream
from berth.oci.digest import Digest, hex_of
from berth.oci.spec import Descriptor
from berth.oci.store import LAYOUT_VERSION, writing


def save_archive(
    target: Path | IO[bytes],
    images: Sequence[tuple[Descriptor, str | None]],
    blobs: Mapping[Digest, int],
    progress: Callable[[int, int | None], None],
) -> None:
    """Write manifests, each with its reference, and all `blobs` (open descriptors); same images, same bytes.

    progress: told bytes. Raises BerthError when it can't be written; then a path is as before.
    """
    total = sum(os.fstat(fd).st_size for fd in blobs.values())
    done = 0

    def consumed(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    manifests = [
        dataclasses.replace(item, annotations={spec.REF_NAME: name} if name else {}).to_json() for item, name in images
    ]
    index: dict[str, object] = {"schemaVersion": 2, "mediaType": spec.INDEX, "manifests": manifests}
    with (
        writing(target if isinstance(target, Path) else "the archive"),
        _replacing(target) if isinstance(target, Path) else contextlib.nullcontext(target) as file,
        tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        _add(tar, "oci-layout", spec.encode_json({"imageLayoutVersion": LAYOUT_VERSION}))
        _add(tar, "index.json", spec.encode_json(index))
        for digest, fd in sorted(blobs.items()):
            info = _info(f"blobs/sha256/{hex_of(digest)}", os.fstat(fd).st_size)
            tar.addfile(info, cast("IO[bytes]", _Reader(fd, consumed)))


class _Reader:
    """What tarfile reads a blob from."""

    def __init__(self, fd: int, consumed: Callable[[int], None]) -> None:
        self._data = stream.ByteStream(stream.FileChunks(fd, consumed=consumed), where="a blob")

    def read(self, count: int) -> bytes:
        return self._data.read(count)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    tar.addfile(_info(name, len(data)), io.BytesIO(data))


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info


@contextlib.contextmanager
def _replacing(path: Path) -> Generator[IO[bytes]]:
    """Write a file that appears when it is whole; a pipe or terminal is written to as it is."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            with open(path, "wb") as file:
                yield file
            return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
