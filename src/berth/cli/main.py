"""The entry point: sends the words of the command line to who knows them. Only the `berth` script calls it.

`berth run` (and `berth` alone) leaves here at once for `cli.run`: this module imports next to nothing at its top,
because every import costs every `berth run` its milliseconds.
"""

from __future__ import annotations

import os
import sys

from berth.cli.ending import clean_up_when_terminated, guarded


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status. The entry point of the `berth` script."""
    words = sys.argv[1:] if argv is None else argv
    _fill_standard_files()
    debug = os.environ.get("BERTH_DEBUG", "") not in ("", "0")
    while words and words[0] == "--debug":
        debug, words = True, words[1:]
    noun = words[0] if len(words) > 1 and words[0] in ("machine", "m") else None
    if not words or words[1 if noun else 0] == "run":
        from berth.cli import run

        return guarded(lambda: run.main(words[2 if noun else 1 :], debug=debug), debug=debug)
    if argv is None:
        clean_up_when_terminated()
    return guarded(lambda: _dispatch(words, debug=debug), debug=debug)


def _dispatch(words: list[str], *, debug: bool) -> int:
    if words[0] == "__complete":
        from berth.cli import complete

        return complete.main(words[1:])
    from berth.cli import commands

    return commands.dispatch(words, debug=debug)


def _fill_standard_files() -> None:
    """Open /dev/null where we were started without stdin, stdout or stderr (`<&-`), lest a socket take its number."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
            setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
