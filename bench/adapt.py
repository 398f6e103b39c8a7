"""How long an image without an init takes to become a machine: adapted once, and from then on. Used by __main__."""

from __future__ import annotations

from pathlib import Path

from bench.goals import Result
from bench.turns import Place, fresh_name, take_turns
from bench.watch import Step

_IMAGE = "bench-bare:latest"
_SETUP_S = 300.0


def adapt(place: Place, tar: Path, berth: str) -> list[Result]:
    """Create a container of an image without an init, the first time and again. Raises BenchError.

    tar: its root file system, a Debian's. The first includes what the package mirror takes.
    """
    watch = place.berth.watch
    watch.output(berth, "image", "import", str(tar), _IMAGE, deadline_s=_SETUP_S)
    once = Result("adapt", place.person, "`create` of a Debian without an init, the first time", "s", part="image")
    again = Result("adapt", place.person, "the same again, adapted already", "s", part="image")
    once.extra = "berth: its packages come from a mirror"

    def measure(_one: object) -> float:
        name = fresh_name("a")
        create = (berth, "create", _IMAGE, "--name", name, "--isolation", "container")
        seconds = watch.time(Step(create), deadline_s=_SETUP_S)
        watch.time(Step((berth, "rm", "--force", name)))
        return seconds

    once.samples["berth"] = [measure(None)]
    take_turns(again, [place.berth], place.rounds(8, 3, share=0.3), measure)
    return [once, again]
