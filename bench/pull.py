"""How fast an image comes out of a registry, beside skopeo and podman. Used by __main__.

A docker-registry on loopback serves an image of 200 MB in 6 layers. Everybody pulls it into an empty store, in turns.
podman unpacks the layers besides, which the others do not. Memory is the largest resident set of the process, as the
kernel reports it to who waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import os
import shutil
import sys
import tarfile
from collections.abc import Generator
from pathlib import Path

from bench.budget import Rounds
from bench.goals import Goal, Result
from bench.turns import take_turns
from bench.watch import BenchError
from bench.worlds import Installed, install_hint
from berth import proc
from berth.errors import CommandError
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
_DEADLINE_S = 120.0

TIME_GOAL = Goal(
    below=("skopeo", "podman"),
    why={
        "skopeo": "the bytes cost both the same; berth adds an interpreter's start and the imports of its HTTP client"
    },
)
MEMORY_GOAL = Goal(at_most=150)


@dataclasses.dataclass(frozen=True, slots=True)
class Puller:
    """One program that pulls; `{}` in argv is the folder of this round."""

    name: str
    argv: tuple[str, ...]


def pull(scratch: Path, installed: Installed, rounds: Rounds) -> list[Result]:
    """Measure pulls below `scratch`. Raises BenchError where no registry can be had."""
    if proc.find_program("docker-registry") is None:
        raise BenchError(f"docker-registry is not installed: {install_hint('docker-registry')}")
    folder = scratch / "pull"
    with _removed(folder), docker_registry(folder / "registry") as served:
        image = f"{served.host}/bench/image:latest"
        size = _push(folder / "source", image)
        what = f"pull of an image of {size / 1e6:.0f} MB in {_LAYERS} layers, whole process"
        seconds = Result("pull", "root", what, "s", TIME_GOAL, part="image")
        peak = Result("pull", "root", "its peak memory", "MiB", MEMORY_GOAL, part="image")
        pullers = [one for one in _pullers(installed, image) if _is_there(one, seconds)]

        def measure(one: Puller) -> float:
            with _removed(folder / "round") as target:
                took, most = _run([word.replace("{}", str(target)) for word in one.argv], target)
            peak.samples.setdefault(one.name, []).append(most / MIB)
            return took

        take_turns(seconds, pullers, rounds, measure)
    return [seconds, peak]


def _pullers(installed: Installed, image: str) -> list[Puller]:
    podman = ("podman", "--root", "{}/root", "--runroot", "{}/runroot", "--storage-driver", "overlay")
    source = ("--src-tls-verify=false", f"docker://{image}")
    return [
        Puller("berth", (str(installed.berth), "image", "pull", image)),
        Puller("skopeo", ("skopeo", "--insecure-policy", "copy", *source, "oci:{}/oci:x")),
        Puller("podman", (*podman, "pull", "--tls-verify=false", image)),
    ]


def _is_there(one: Puller, result: Result) -> bool:
    if proc.find_program(one.argv[0]) is not None:
        return True
    result.absent[one.name] = f"not installed: {install_hint(one.argv[0])}"
    return False


@contextlib.contextmanager
def _removed(folder: Path) -> Generator[Path]:
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _push(folder: Path, name: str) -> int:
    """Make the image and have the registry have it; return its bytes."""
    layout = Layout(*(folder / name for name in ("data", "run", "config", "cache")))
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
    """Run a program; return its seconds and its largest resident set in bytes. Raises BenchError."""
    roots = {f"BERTH_{kind}_DIR": f"{target}/{kind.lower()}" for kind in ("DATA", "RUNTIME", "CONFIG", "CACHE")}
    log = target / "log"
    watch = [sys.executable, "-I", "-S", "-c", _WATCH, str(log)]
    try:
        done = proc.run([*watch, *argv], env={**os.environ, "PYTHONPATH": "", **roots}, timeout_s=_DEADLINE_S)
    except CommandError as error:
        raise BenchError(f"{argv[0]}: {error}") from error
    took, peak, status = done.stdout.decode().split()
    if status != "0":
        raise BenchError(f"{argv[0]} failed: {log.read_text(errors='replace')[-4000:]}")
    return float(took), int(peak)
