"""What the network of this runtime directory consists of: Layout.hub_record, and one file per attached machine.

Owns these files (schema 1) and the decoding of them; layer 3, used by `net` only. They are true until the next boot at
most: every process in them is checked by pid and start time before anything relies on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import cast

from berth import files
from berth.errors import StateFormatError
from berth.layout import Layout
from berth.log import log
from berth.names import MachineName
from berth.net.addresses import Address
from berth.net.processes import Process, identify

SCHEMA = 1
_WAY_OUT = ("forwarding", "nat", "uplink", "forward")  # the parts without which nothing gets out


@dataclasses.dataclass(slots=True)
class Record:
    """The parts that have been set up. boot: the kernel's boot id.

    holder, dnsmasq, pasta: the processes, None where there is none.
    upstream, resolver: whom dnsmasq and pasta were told to ask. docker: there was a docker0 when the rules were made.
    retry_pasta: seconds since boot before which a pasta that hung isn't tried again. notes: by part, what is missing.
    """

    boot: str
    subnet: str = ""
    holder: Process | None = None
    dnsmasq: Process | None = None
    pasta: Process | None = None
    bridge: bool = False
    forwarding: bool = False
    rules: bool = False
    docker: bool = False
    upstream: str = ""
    resolver: str = ""
    retry_pasta: float = 0.0
    notes: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def copy(self) -> Record:
        return dataclasses.replace(self, notes=dict(self.notes))

    @property
    def offline(self) -> str | None:
        """Why machines can't reach the internet, in words; None when nothing is known to be in the way."""
        return next((self.notes[part] for part in _WAY_OUT if part in self.notes), None)


def load(layout: Layout) -> Record:
    """Load the record; an empty one when there is none, it is damaged, or from before the last boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        document = files.load_json(layout.hub_record, schema=SCHEMA)
        record = _parse(document, where=str(layout.hub_record))
    except FileNotFoundError:
        return Record(boot)
    except StateFormatError as error:
        # Nothing in it can't be found again by looking at the processes.
        log.warning("%s; starting over", error)
        return Record(boot)
    return record if record.boot == boot else Record(boot)


def save(layout: Layout, record: Record) -> None:
    """Write the record; the caller holds hub.lock."""
    document = dataclasses.asdict(record)
    for part in ("holder", "dnsmasq", "pasta"):
        document[part] = _process_to_json(getattr(record, part))
    files.save_json(layout.hub_record, document, schema=SCHEMA)


def _parse(document: dict[str, object], *, where: str) -> Record:
    match document:
        case {
            "boot": str(boot), "subnet": str(subnet), "bridge": bool(bridge), "forwarding": bool(forwarding),
            "rules": bool(rules), "docker": bool(docker), "upstream": str(upstream), "resolver": str(resolver),
            "retry_pasta": float(retry), "notes": dict(),
        }:  # fmt: skip
            notes = {str(part): str(text) for part, text in cast("dict[str, object]", document["notes"]).items()}
        case _:
            raise StateFormatError(f"{where} is damaged: a member is missing or wrong")
    holder, dnsmasq, pasta = (_process_from_json(document.get(part)) for part in ("holder", "dnsmasq", "pasta"))
    return Record(
        boot, subnet, holder, dnsmasq, pasta, bridge, forwarding, rules, docker, upstream, resolver, retry, notes
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Attached:
    """A machine that hangs on the bridge. process: one inside its network namespace (its init).

    tap: it is a VM; process is its QEMU, which holds the TAP and stands in no network namespace of the machine's.
    """

    name: MachineName
    address: Address
    process: Process
    tap: bool = False


def save_attached(layout: Layout, name: MachineName, address: Address, pid: int, *, tap: bool = False) -> None:
    """Remember where a running machine's cable ends, so that a new hub can connect it again."""
    process = identify(pid)
    if process is not None:
        layout.hub_machines.mkdir(parents=True, exist_ok=True)
        document = {"address": address.to_json(), "process": _process_to_json(process), "tap": tap}
        files.save_json(layout.hub_machines / f"{name}.json", document, schema=SCHEMA)


def forget_attached(layout: Layout, name: MachineName) -> None:
    """Forget a machine; idempotent."""
    (layout.hub_machines / f"{name}.json").unlink(missing_ok=True)


def running_machines(layout: Layout) -> list[Attached]:
    """List the attached machines whose process lives, by name."""
    found: list[Attached] = []
    with contextlib.suppress(FileNotFoundError):
        for file in sorted(os.listdir(layout.hub_machines)):
            name, suffix = os.path.splitext(file)
            if suffix == ".json":
                found += _load_attached(layout.hub_machines / file, MachineName(name))
    return found


def _load_attached(path: Path, name: MachineName) -> list[Attached]:
    try:
        document = files.load_json(path, schema=SCHEMA)
        address = Address.from_json(document.get("address"), where=str(path))
        process = _process_from_json(document.get("process"))
    except (FileNotFoundError, StateFormatError) as error:
        log.debug("no attached machine: %s", error)
        return []
    is_tap = document.get("tap") is True
    return [Attached(name, address, process, is_tap)] if process is not None and process.alive() else []


def _process_to_json(process: Process | None) -> dict[str, int] | None:
    return None if process is None else {"pid": process.pid, "start": process.start}


def _process_from_json(document: object) -> Process | None:
    match document:
        case {"pid": int(pid), "start": int(start)}:
            return Process(pid, start)
        case _:
            return None
