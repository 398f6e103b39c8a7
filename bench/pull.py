"""How fast an image comes out of a registry, beside skopeo and podman: ``python -m bench.pull``.

A docker-registry on loopback serves an image of 200 MB in 6 layers. Everybody pulls it into an empty store, in turns, a
first round that does not count included. podman unpacks the layers besides, which the others do not. Memory is the
largest resident set of the process, as the kernel reports it to who waits for it.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path

from bench.watch import BenchError
from berth import proc
from berth.images import Images
from berth.layout import Layout
from berth.oci import spec
from berth.oci.digest import digest_of
from berth.oci.sources import store_manifest
from berth.oci.store import Store
from registries import docker_registry

MIB = 1024 * 1024
_LAYERS = 6
_BYTES = 200_000_000
_ROUNDS = 5
_DEADLINE_S = 120.0


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="bench-pull-") as name:
        folder = Path(name)
        with docker_registry(folder / "registry") as served:
            image = f"{served.host}/bench/image:latest"
            size = _push(folder / "source", image)
            sys.stdout.write(f"an image of {size / 1e6:.0f} MB in {_LAYERS} layers\n")
            _measure(folder, image)
    return 0


def _layout(folder: Path) -> Layout:
    return Layout(*(folder / name for name in ("data", "run", "config", "cache")))


def _push(folder: Path, name: str) -> int:
    """Make the image and have the registry have it; return its bytes."""
    layout = _layout(folder)
    store = Store(layout.images)
    with store.ingest() as ingest:
        tars = [_layer(number) for number in range(_LAYERS)]
        layers = [ingest.add_bytes(gzip.compress(tar, 1)).described(spec.LAYER_GZIP) for tar in tars]
        config = spec.ImageConfig(spec.host_platform(), diff_ids=tuple(digest_of(tar) for tar in tars))
        described = ingest.add_json(config.to_json(), spec.CONFIG)
        ingest.commit(store_manifest(ingest, described, layers), [name])
    Images(layout).push(name)
    return sum(layer.size for layer in layers)


def _layer(number: int) -> bytes:
    """Make a tar archive with one file, of bytes that do not compress."""
    data = os.urandom(_BYTES // _LAYERS)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo(f"file-{number}")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _commands(folder: Path, image: str) -> dict[str, list[str]]:
    podman = ["podman", "--root", f"{folder}/root", "--runroot", f"{folder}/runroot", "--storage-driver", "overlay"]
    return {
        "berth image pull": [sys.executable, "-m", "berth", "image", "pull", image],
        "skopeo copy": [
            "skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", f"docker://{image}", f"oci:{folder}/oci:x",
        ],
        "podman pull": [*podman, "pull", "--tls-verify=false", image],
    }  # fmt: skip


def _measure(folder: Path, image: str) -> None:
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for turn in range(_ROUNDS + 1):
        target = folder / f"round-{turn}"
        target.mkdir()
        for name, argv in _commands(target, image).items():
            if shutil.which(argv[0]) is None:
                continue
            took, peak = _run(argv, target)
            if turn:
                seconds.setdefault(name, []).append(took)
                peaks[name] = max(peaks.get(name, 0), peak)
        shutil.rmtree(target)
    for name, taken in seconds.items():
        spread = f"{min(taken):.2f} to {max(taken):.2f}"
        sys.stdout.write(
            f"{name:17} {statistics.median(taken):6.2f} s  ({spread})  peak memory {peaks[name] / MIB:.0f} MiB\n"
        )


# The kernel counts what a process was before its exec, too: whoever starts it has to be small.
_WATCH = """
import os, sys, time
log = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
began = time.perf_counter()
files = [(os.POSIX_SPAWN_DUP2, log, number) for number in (1, 2)]
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ, file_actions=files)
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - began, usage.ru_maxrss * 1024, status)
"""


def _run(argv: list[str], target: Path) -> tuple[float, int]:
    """Run a program; return its seconds and its largest resident set in bytes."""
    roots = {f"BERTH_{kind}_DIR": f"{target}/{kind.lower()}" for kind in ("DATA", "RUNTIME", "CONFIG", "CACHE")}
    log = target / "log"
    watch = [sys.executable, "-I", "-S", "-c", _WATCH, str(log)]
    done = proc.run([*watch, *argv], env={**os.environ, **roots}, timeout_s=_DEADLINE_S)
    took, peak, status = done.stdout.decode().split()
    if status != "0":
        raise BenchError(f"{argv[0]} failed: {log.read_text(errors='replace')[-4000:]}")
    return float(took), int(peak)


if __name__ == "__main__":
    sys.exit(main())
