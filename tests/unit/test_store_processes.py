"""Several processes on one store: importing, pruning, and making machines, which never lose what they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from berth.images import Images
from berth.layout import Layout
from support import ROOT

_ROUNDS = 25
_COMMON = f"""
import hashlib, os, pathlib, sys
sys.path[:0] = [{str(ROOT / "src")!r}, {str(ROOT / "tests")!r}]
from berth.errors import NotFoundError
from berth.images import Images
from berth.layout import Layout
from tars import END, member, rootfs
folder, number = pathlib.Path(sys.argv[1]), sys.argv[2]
images = Images(Layout(*(folder / name for name in ("data", "run", "config", "cache"))))
machines = folder / "machines"

def in_use():
    return {{path.read_text(): [path.name] for path in machines.iterdir() if not path.name.startswith(".")}}

def put(note):
    path = folder / f"{{number}}.tar"
    path.write_bytes(rootfs()[:-1024] + member("note", note.encode()) + END)
    return images.import_(path, f"image:{{note}}")
"""
_IMPORT = """
for round in range(ROUNDS):
    put(str(round % 5))  # names that move, blobs that others write as well
"""
_PRUNE = """
for round in range(ROUNDS * 4):
    images.prune(in_use, unused=True)
"""
_CREATE = """
made = 0
for round in range(ROUNDS):
    image = put(f"{number}-{round}")
    try:
        with images.keeping(image):  # as lifecycle.create: the bundle comes to be while the image can't go
            partial = machines / f".{number}-{round}"
            partial.write_text(image.digest)
            partial.rename(machines / f"{number}-{round}")
    except NotFoundError:
        continue  # pruned before: nothing of a machine is there
    with images.opened_layers(image) as layers:
        for fd, _ in layers:
            assert os.pread(fd, 10, 0)
    made += 1
print(made)
"""


def test_nobody_loses_what_a_machine_needs(tmp_path: Path) -> None:
    (tmp_path / "machines").mkdir()
    scripts = [_IMPORT, _IMPORT, _PRUNE, _PRUNE, _CREATE, _CREATE]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _COMMON + script.replace("ROUNDS", str(_ROUNDS)), str(tmp_path), f"p{number}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number, script in enumerate(scripts)
    ]  # fmt: skip
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(scripts), [error[-2000:] for _, error in answers]
    made = sum(int(output) for output, _ in answers[4:])
    machines = [path for path in (tmp_path / "machines").iterdir() if not path.name.startswith(".")]
    assert made == len(machines) > 0
    images = Images(Layout(*(tmp_path / name for name in ("data", "run", "config", "cache"))))
    for machine in machines:
        image = images.find(machine.read_text())
        assert not image.problem
        with images.opened_layers(image) as layers:
            assert layers
    images.prune(dict, unused=True)
    assert images.size() == 0, "what nobody needs is gone"
