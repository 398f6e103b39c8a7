"""Puts the network together, part by part, and puts right what is missing. Layer 3, used by `network` only.

Each part looks first and does nothing when all is well, so the same walk serves the first machine, every later start
(milliseconds) and the repair after somebody killed something. The caller holds hub.lock.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from berth import userns
from berth.errors import BerthError, DeadlineError
from berth.layout import Layout
from berth.log import log
from berth.net import attach, firewall, hub, plan, record
from berth.net.addresses import bridge_name
from berth.net.processes import Process, end, find_programs, identify
from berth.net.record import Record
from berth.net.subnet import Subnet
from berth.proc import find_program, install_command, run

RESOLV_CONF = Path("/etc/resolv.conf")
_TUN = "/dev/net/tun"
_START_S = 5.0
_RETRY_S = 60.0


class Assembly:
    """One walk over the parts. `record` says what there was, and in the end what there is."""

    def __init__(self, layout: Layout, found: Record, subnet: Subnet, holder: Sequence[str]) -> None:
        self.record = found
        self.bridge = bridge_name(layout)
        self._table = plan.table_name(self.bridge)
        self._layout = layout
        self._subnet = subnet
        self._holder = holder
        self._user = os.geteuid() != 0
        self._fresh = False
        self._resolv_conf = read_text(RESOLV_CONF)

    def run(self) -> None:
        """Make every part be there. Raises BerthError when machines could have no network at all."""
        if self._user:
            self._ensure_namespaces()
        self._ensure_bridge()
        self._ensure_routing()
        if self._user:
            self._ensure_uplink()
        self._ensure_names()
        if self._fresh:
            self._connect_again()

    def inside(self, argv: Sequence[str]) -> list[str]:
        """Turn a command into one that runs where the bridge is."""
        holder = self.record.holder
        return list(argv) if holder is None else userns.enter_command(holder.pid, argv)

    def _note(self, part: str, text: str | None) -> None:
        if text is None:
            self.record.notes.pop(part, None)
        else:
            self.record.notes[part] = text

    # The namespaces of a user ---------------------------------------------------------------------------------------

    def _ensure_namespaces(self) -> None:
        if self.record.holder is not None and self.record.holder.alive():
            return
        self.record.holder = next(iter(hub.find_holders(self._layout)), None) or self._start_holder()
        record.save(self._layout, self.record)  # at once, whatever fails after it

    def _start_holder(self) -> Process:
        command = self._holder or hub.holder_command(self._layout)
        for dnsmasq in find_dnsmasq(self._layout):
            return hub.start_beside(command, dnsmasq)
        running = record.running_machines(self._layout)
        for machine in running:
            found = hub.start_by_tap(command, machine.process) if machine.tap else None
            if found is not None:
                return found
        self._forget_namespaces()
        relatives = [machine.process for machine in running if not machine.tap]
        return hub.start_new(command, relatives)

    def _forget_namespaces(self) -> None:
        """Everything inside is gone with the namespaces; pasta, which only looks into them, is ended."""
        stop_pasta(self._layout, self.record)
        self.record = Record(self.record.boot, subnet=str(self._subnet), retry_pasta=self.record.retry_pasta)

    # The bridge and what goes through it ------------------------------------------------------------------------------

    def _ensure_bridge(self) -> None:
        if self.record.subnet != str(self._subnet):
            self._remove_bridge()
        if self.record.bridge and (self._user or self._bridge_exists()):
            return
        # dnsmasq holds on to the bridge that was.
        stop_dnsmasq(self._layout, self.record)
        self.record.rules = self.record.forwarding = False
        batch = plan.bridge_batch(self.bridge, self._subnet, exists=self._bridge_exists())
        run(self.inside(["ip", "-batch", "-"]), input=batch.encode(), timeout_s=_START_S)
        self.record.bridge = True
        self.record.subnet = str(self._subnet)
        self._fresh = True

    def _bridge_exists(self) -> bool:
        if self._user:
            return (
                run(self.inside(["ip", "link", "show", "dev", self.bridge]), success=(0, 1), timeout_s=10).status == 0
            )
        return exists(self.bridge)

    def _remove_bridge(self) -> None:
        self.record.bridge = self.record.rules = False
        if self._bridge_exists():
            run(self.inside(["ip", "link", "delete", "dev", self.bridge]), timeout_s=_START_S)

    def _ensure_routing(self) -> None:
        if self._user:
            if not self.record.forwarding:
                self._note("forwarding", firewall.enable_forwarding(self.inside))
                self.record.forwarding = True
        else:
            self._note("forwarding", firewall.enable_forwarding_here())
        # Docker may have come since and set its policy to drop what is forwarded.
        docker = not self._user and exists("docker0")
        known = self.record.rules and docker == self.record.docker
        if known and (self._user or firewall.rules_present(self._table, self.inside)):
            return
        notes = firewall.apply_rules(self.bridge, self._table, self._subnet, self.inside, hub=self._user)
        if not self._user:
            firewall.disable_ipv6(self.bridge)
            notes |= firewall.admit_in_iptables(self.bridge)
        for part in ("nat", "guard", "forward", "input"):
            self._note(part, notes.get(part))
        self.record.rules = "nat" not in notes
        self.record.docker = docker

    # The way out of the hub -------------------------------------------------------------------------------------------

    def _ensure_uplink(self) -> None:
        resolver = self._host_resolver()
        # pasta reads resolv.conf once: when the host asks somebody else on its loopback by now, it needs a new one.
        if self.record.pasta is not None and self.record.pasta.alive() and self.record.resolver == resolver:
            return
        stop_pasta(self._layout, self.record)
        self._note("uplink", self._start_pasta())
        self.record.resolver = resolver

    def _host_resolver(self) -> str:
        """The resolver that only pasta can reach: the first on the host's loopback, or none."""
        upstream = plan.plan_upstream(self._resolv_conf, user=True, path=RESOLV_CONF)
        return (plan.parse_nameservers(self._resolv_conf) or [""])[0] if upstream.server else ""

    def _start_pasta(self) -> str | None:
        """Start the uplink; return why it can't be, in words."""
        missing = _uplink_missing()
        if missing is not None:
            return f"no internet in machines: {missing}"
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        if self.record.holder is None or now < self.record.retry_pasta:
            return self.record.notes.get("uplink", "no internet in machines: pasta failed a moment ago")
        pid_file = pasta_pid_file(self._layout)
        argv = plan.pasta_command(
            self.record.holder.pid, forward_dns=bool(self._host_resolver()),
            pid_file=pid_file, log=self._layout.hub / "pasta.log",
        )  # fmt: skip
        try:
            run(argv, timeout_s=_START_S)  # it returns when the uplink stands, and goes on in the background
            self.record.pasta = _read_pid(pid_file)
            run(self.inside(["ip", "-batch", "-"]), input=plan.uplink_batch().encode(), timeout_s=_START_S)
        except DeadlineError as error:
            self.record.retry_pasta = now + _RETRY_S
            return f"no internet in machines: {error}"
        except BerthError as error:
            return f"no internet in machines: {error}"
        return None

    # Names ------------------------------------------------------------------------------------------------------------

    def _ensure_names(self) -> None:
        upstream = plan.plan_upstream(self._resolv_conf, user=self._user, path=RESOLV_CONF)
        told = upstream.server or str(upstream.file)
        running = self.record.dnsmasq is not None and self.record.dnsmasq.alive()
        if running and self.record.upstream == told:
            return
        stop_dnsmasq(self._layout, self.record)
        self._note("names", self._start_dnsmasq(upstream))
        self.record.upstream = told

    def _start_dnsmasq(self, upstream: plan.Upstream) -> str | None:
        if find_program("dnsmasq") is None:
            how = install_command("dnsmasq-base")
            return f"machines can't find each other by name: dnsmasq is not installed ({how})"
        pid_file = dnsmasq_pid_file(self._layout)
        hosts = self._layout.hub_hosts
        user = pwd.getpwuid(os.getuid()).pw_name if self._user else _dnsmasq_user(hosts)
        argv = plan.dnsmasq_command(
            self.bridge, hosts=hosts, pid_file=pid_file, log=self._layout.hub / "dnsmasq.log", user=user,
            upstream=upstream,
        )  # fmt: skip
        try:
            run(self.inside(argv), timeout_s=_START_S)  # it returns when it listens, and goes on in the background
        except BerthError as error:
            return f"machines can't find each other by name: {error}"
        self.record.dnsmasq = _read_pid(pid_file)
        return None

    def answering(self) -> list[str]:
        """List whom machines ask for names: our dnsmasq, else the best that they can reach."""
        if self.record.dnsmasq is not None:
            return [self._subnet.gateway]
        if self.record.pasta is not None and self.record.resolver:
            return [plan.FORWARDED_DNS]
        # systemd-resolved keeps the list of whom it asks itself.
        texts = (self._resolv_conf, read_text(Path("/run/systemd/resolve/resolv.conf")))
        servers = [server for text in texts for server in plan.parse_nameservers(text)]
        return [server for server in servers if not server.startswith("127.")][:3]

    def resolv_conf(self) -> str:
        """Write the machines' resolv.conf."""
        return plan.machine_resolv_conf(self._resolv_conf, self.answering())

    # Machines that were there before ----------------------------------------------------------------------------------

    def _connect_again(self) -> None:
        """Hang running machines on a bridge that had to be made anew."""
        for machine in record.running_machines(self._layout):
            log.debug("connecting %s again", machine.name)
            try:
                self._attach(machine)
            except BerthError as error:
                log.warning("machine '%s' has lost its network: %s", machine.name, error)

    def _attach(self, machine: record.Attached) -> None:
        holder = self.record.holder
        address = machine.address.to_json()
        match holder, machine.tap:
            case None, True:
                attach.hang(self.bridge, machine.address)
            case None, False:
                attach.attach(self.bridge, machine.address, machine.process.pid)
            case _, True:
                self._call("berth.net.attach:hang_inside", {"bridge": self.bridge, "address": address})
            case _:
                arguments = {"bridge": self.bridge, "address": address, "pid": machine.process.pid}
                self._call("berth.net.attach:attach_inside", arguments)

    def _call(self, function: str, arguments: Mapping[str, object]) -> None:
        holder = self.record.holder
        userns.call(function, arguments, holder=holder.pid if holder else None, timeout_s=30)


def dnsmasq_pid_file(layout: Layout) -> Path:
    return layout.hub / "dnsmasq.pid"


def pasta_pid_file(layout: Layout) -> Path:
    return layout.hub / "pasta.pid"


def find_dnsmasq(layout: Layout) -> list[Process]:
    """Find our dnsmasq by the pid file that it was told, wherever the record has gone."""
    return find_programs("dnsmasq", f"--pid-file={dnsmasq_pid_file(layout)}")


def stop_dnsmasq(layout: Layout, found: Record) -> None:
    """End our dnsmasq, known to the record or not."""
    for process in find_dnsmasq(layout):
        end(process)
    found.dnsmasq = None


def stop_pasta(layout: Layout, found: Record) -> None:
    """End our pasta, known to the record or not."""
    for process in find_programs("pasta", str(pasta_pid_file(layout))):
        end(process)
    found.pasta = None


def exists(interface: str) -> bool:
    """Say whether this network namespace has an interface."""
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True


def read_text(path: Path) -> str:
    """Read a file of the host's; empty when it can't be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _read_pid(path: Path) -> Process | None:
    text = read_text(path).strip()
    return identify(int(text)) if text.isdecimal() else None


def _uplink_missing() -> str | None:
    if find_program("pasta") is None:
        return f"pasta is not installed ({install_command('passt')})"
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"{_TUN} is not there (sudo modprobe tun)"
    except PermissionError:
        return f"{_TUN} can't be opened (sudo chmod 666 {_TUN})"
    except OSError as error:
        return f"{_TUN} can't be opened: {error.strerror} (sudo modprobe tun)"
    return None


def _dnsmasq_user(hosts: Path) -> str:
    """Choose whom root's dnsmasq becomes: its own user, nobody, or root where only root can read the hosts files."""
    for folder in (hosts, *hosts.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return "root"
    for name in ("dnsmasq", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return "root"
