"""Make the pictures beside this: what a person sees of berth in a terminal, taken by tmux and drawn by rich.

    .venv/bin/pip install -e '.[docs]' && .venv/bin/python docs/images/make.py

Needs tmux, docker-registry and mmdebstrap. Machines and images are in a folder of their own and gone at the end. What
is drawn is the terminal's own content; a moment that passes (a bar) is waited for.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from berth import proc  # noqa: E402
from images import bootstrap  # noqa: E402
from registries import docker_registry  # noqa: E402

COLUMNS, LINES = 100, 12
_DEADLINE_S = 240.0
_PROMPT = re.compile(r"^\$ ?$", re.MULTILINE)


class Terminal:
    """A shell in a tmux of our own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        size = ["-x", str(COLUMNS), "-y", str(LINES)]
        shell = ["env", *(f"{name}={value}" for name, value in environment.items()), "PS1=$ ", "bash", "--norc"]
        proc.run([*self._tmux, "new-session", "-d", *size, *shell], env={"TERM": "xterm-256color"})
        proc.run([*self._tmux, "set", "-g", "status", "off"])
        self.wait(_PROMPT)

    def type(self, line: str) -> None:
        proc.run([*self._tmux, "send-keys", "-l", line])
        proc.run([*self._tmux, "send-keys", "Enter"])

    def wait(self, until: re.Pattern[str]) -> str:
        """Return the screen, colours and all, as soon as `until` is on it."""
        end = time.monotonic() + _DEADLINE_S
        while True:
            screen = proc.run([*self._tmux, "capture-pane", "-p", "-e"]).stdout.decode()
            if until.search(Text.from_ansi(screen).plain):
                return screen
            if time.monotonic() > end:
                raise TimeoutError(f"{until.pattern!r} never came:\n{screen}")
            time.sleep(0.005)

    def clear(self) -> None:
        self.type("clear")
        time.sleep(0.5)

    def run(self, *lines: str) -> str:
        """Type lines on a clean screen, each when the one before is done; return the screen."""
        self.clear()
        for line in lines:
            self.type(line)
            time.sleep(0.3)
            self.wait(_PROMPT)
        return self.wait(_PROMPT)

    def close(self) -> None:
        proc.run([*self._tmux, "kill-server"])


def draw(name: str, screen: str) -> None:
    """Write docs/images/NAME.svg."""
    text = Text.from_ansi(screen.rstrip("\n").removesuffix("\n$"))
    console = Console(width=COLUMNS, record=True, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(text, no_wrap=True, crop=True)
    path = ROOT / f"docs/images/{name}.svg"
    path.write_text(console.export_svg(title="", theme=MONOKAI, unique_id=name))
    print(path)


@contextmanager
def world() -> Generator[tuple[Terminal, str]]:
    """A terminal with a berth of its own, and a registry with a Debian in it; yields that image's reference, too."""
    with ExitStack() as kept:
        folder = Path(tempfile.mkdtemp(prefix="berth-pictures-"))
        kept.callback(shutil.rmtree, folder)
        roots = {f"BERTH_{kind}_DIR": str(folder / kind.lower()) for kind in ("DATA", "RUNTIME", "CONFIG", "CACHE")}
        program = Path(sys.executable).with_name("berth")

        def berth(*words: str) -> None:
            proc.run([str(program), *words], env=roots, timeout_s=_DEADLINE_S)

        host = kept.enter_context(docker_registry(folder / "registry")).host
        reference = f"{host}/team/debian:12"
        berth("image", "import", str(bootstrap("bookworm")), reference)
        berth("image", "push", reference)
        berth("image", "rm", reference)
        kept.callback(berth, "rm", "--force", "--all")
        terminal = Terminal(folder, {**roots, "PATH": f"{program.parent}:{os.environ['PATH']}"})
        kept.callback(terminal.close)
        yield terminal, reference


def main() -> None:
    with world() as (terminal, reference):
        terminal.clear()
        terminal.type(f"berth create {reference} --name dev")
        draw("progress", terminal.wait(re.compile(r"\d+%.*left")))
        terminal.wait(_PROMPT)
        terminal.run(
            f"berth create {reference} --name build --cpus 2 --memory 4G",
            f"berth create {reference} --name own --isolation vm",
            f"berth create {reference} --name old --no-boot",
        )
        draw("ls", terminal.run("berth ls", "berth run -- uname -r", "berth run -n own -- uname -r"))


if __name__ == "__main__":
    main()
