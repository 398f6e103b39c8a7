"""The network that machines hang on: what the engines call. Layer 3; docs/network.md tells the whole story.

For root: a bridge in the host's namespace, NAT by nftables, names by dnsmasq. For an ordinary user: the same in the
*hub*, a user and network namespace of the user's own, with one pasta as the way out. There is no daemon that watches:
every call of `ensure` finds out what lives and puts right what does not.

The order for a machine: `addresses.allocate` once; then, for each start, `ensure`, `publish`, `attach.attach` (inside),
`publish` with its pid; `withdraw` when it has stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import stat
from collections.abc import Sequence
from pathlib import Path

from berth import locks
from berth.errors import BerthError, InvalidStateError
from berth.files import make_private_directory
from berth.layout import Layout
from berth.names import MachineName
from berth.net import addresses, firewall, hub, record
from berth.net.addresses import Address
from berth.net.assembly import Assembly, exists, find_dnsmasq, stop_dnsmasq, stop_pasta
from berth.net.plan import DOMAIN, table_name
from berth.net.processes import end, identify, network_namespace, send
from berth.proc import run

_LOCK_S = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """What a machine needs to know of the network.

    bridge: its name, in the host's namespace, or in that of the process `holder_pid`, whose user and network namespaces
    the launcher enters (None for root). resolv_conf: the text for machines. notes: what is missing, in words; offline:
    which of that keeps machines from the internet.
    """

    bridge: str
    gateway: str
    holder_pid: int | None
    resolv_conf: str
    notes: tuple[str, ...]
    offline: str | None = None


def ensure(layout: Layout, *, holder: Sequence[str] = ()) -> Network:
    """Make sure that the network is there, and say how to reach it; quick when it is.

    holder: what keeps a user's namespaces; the guest agent's `pause` when it isn't said.
    What can't be had (internet, names) becomes a note. Raises UnsupportedError when there can be no network at all:
    no iproute2, no subordinate ids.
    """
    subnet = addresses.subnet(layout)
    _make_directories(layout)
    with locks.hold(layout.hub_lock, timeout_s=_LOCK_S, what="the machines' network"):
        before = record.load(layout)
        assembly = Assembly(layout, before.copy(), subnet, holder)
        try:
            assembly.run()
        finally:
            if assembly.record != before or not layout.hub_record.exists():
                record.save(layout, assembly.record)
    process = assembly.record.holder
    notes = tuple(text for _, text in sorted(assembly.record.notes.items()))
    return Network(
        assembly.bridge, subnet.gateway, process.pid if process else None, assembly.resolv_conf(), notes,
        assembly.record.offline,
    )  # fmt: skip


def publish(layout: Layout, name: MachineName, address: Address, pid: int | None = None, *, tap: bool = False) -> None:
    """Make a machine known to the others by its name, NAME and NAME.berth; idempotent.

    pid: a process in its network namespace, when there is one: a network that has to be made anew connects it again.
    tap: it is a VM with a TAP (`tap.open_tap`), and pid is its QEMU, which holds that.
    """
    _make_directories(layout)
    # Moved in whole: dnsmasq reads whatever is closed in that directory, half-written names included.
    partial = _partial_hosts(layout, name)
    partial.write_text(f"{address.ip} {name} {name}.{DOMAIN}\n")
    partial.chmod(0o644)
    partial.replace(layout.hub_hosts / name)
    if pid is not None:
        record.save_attached(layout, name, address, pid, tap=tap)


def _partial_hosts(layout: Layout, name: MachineName) -> Path:
    """Say where a machine's name is written before it is published; run.lock is held, so there is one writer."""
    return layout.hub / f"{name}.hosts"


def withdraw(layout: Layout, name: MachineName) -> None:
    """Forget a machine that has stopped (or its old name); idempotent."""
    record.forget_attached(layout, name)
    _partial_hosts(layout, name).unlink(missing_ok=True)  # of a start that was killed
    try:
        (layout.hub_hosts / name).unlink()
    except FileNotFoundError:
        return
    dnsmasq = record.load(layout).dnsmasq
    if dnsmasq is not None:
        # It notices new names by itself, but keeps those whose files have gone.
        send(dnsmasq, signal.SIGHUP)


def teardown(layout: Layout) -> None:
    """End the network: no process, interface, rule or file of it is left; idempotent.

    Raises InvalidStateError while a machine is attached. Routing (ip_forward) stays enabled: others may need it by now.
    """
    if not layout.runtime.is_dir():
        return
    with locks.hold(layout.hub_lock, timeout_s=_LOCK_S, what="the machines' network"):
        running = record.running_machines(layout)
        if running:
            raise InvalidStateError(f"machine '{running[0].name}' is running", hint=f"berth stop {running[0].name}")
        found = record.load(layout)
        if os.geteuid() == 0:
            stop_dnsmasq(layout, found)
            _remove_from_host(layout)
        else:
            _end_hub(layout, found)
        import shutil  # only here, and every start imports this module

        for folder in (layout.hub, layout.hub_hosts):
            shutil.rmtree(folder, ignore_errors=True)
        layout.hub_lock.unlink(missing_ok=True)


def _remove_from_host(layout: Layout) -> None:
    bridge = addresses.bridge_name(layout)
    firewall.remove_rules(table_name(bridge), list)
    firewall.dismiss_from_iptables(bridge)
    if exists(bridge):
        with contextlib.suppress(BerthError):
            run(["ip", "link", "delete", "dev", bridge], timeout_s=10)


def _end_hub(layout: Layout, found: record.Record) -> None:
    """End whatever stands in the hub's network namespace, then pasta, which stands beside it."""
    known = [*hub.find_holders(layout), *find_dnsmasq(layout)]
    if found.holder is not None and found.holder.alive():
        known.append(found.holder)
    namespaces = {network_namespace(process.pid) for process in known} - {network_namespace()}
    for namespace in namespaces:
        for pid in hub.members(namespace):
            process = identify(pid)
            if process is not None:
                end(process)
    stop_pasta(layout, found)


def _make_directories(layout: Layout) -> None:
    make_private_directory(layout.runtime)
    make_private_directory(layout.hub)
    layout.hub_machines.mkdir(exist_ok=True)
    if os.geteuid() != 0:
        layout.hub_hosts.mkdir(exist_ok=True)
    else:
        _make_readable_directory(layout.hub_hosts)


def _make_readable_directory(path: Path) -> None:
    """Ensure a directory of ours that everyone may read (0755); idempotent."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(parents=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise BerthError(f"{path} is not a directory of this user's own")
    if stat.S_IMODE(status.st_mode) != 0o755:
        path.chmod(0o755)
