"""What tests with a hostile machine share: its weapon, what a command of berth's costs, how its errors have to look.

tests/enemy is the program that attacks; the fixture `weapon` (tests/integration/conftest.py) builds it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from person import Person
from support import ROOT

SOURCE = ROOT / "tests/enemy"
MOST_MEMORY = 96  # MiB that the command line may take; it takes about 40


def arm(person: Person, name: str, weapon: Path) -> None:
    """Bring the attacking program into a machine: below /den, for root's home there is the host's."""
    script = "mkdir -p /den && cat > /den/enemy.new && chmod 755 /den/enemy.new && mv /den/enemy.new /den/enemy"
    person.berth("run", "-n", name, "--root", "--", "sh", "-c", script, input=weapon.read_bytes())


# A small process in between: what has just forked counts the memory of whom it forked from, and that is the tests' own.
_MEASURE = """
import os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss}")
"""


def peak(person: Person, *words: str, timeout_s: float = 60.0) -> tuple[int, bytes, bytes, int]:
    """Run berth; return its status, both outputs and the most memory that it had, in MiB."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.NamedTemporaryFile() as told:
        argv = person.command([*person.program, *words], {}, None)
        measured = [sys.executable, "-S", "-c", _MEASURE, told.name, *argv]
        subprocess.run(measured, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=timeout_s, check=True)
        status, most = Path(told.name).read_text().split()
        out.seek(0)
        err.seek(0)
        return int(status), out.read(1 << 20), err.read(1 << 20), int(most) // 1024


def assert_one_error(stderr: bytes) -> None:
    """One message, perhaps with a hint, and nothing in it that a terminal would obey."""
    lines = stderr.decode().splitlines()
    assert lines[0].startswith("berth: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
    assert not [letter for line in lines for letter in line if not letter.isprintable()], lines


def resident(pid: int) -> int:
    """Return how much memory a process has, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") >> 20
