"""Whether this host carries VMs so well that a machine for which nobody asked for one should be one. Layer 3.

Called by `engine.select`, on the way of every create: what costs time is looked at last.
"""

from __future__ import annotations

import os

from berth import host
from berth.layout import Layout
from berth.proc import find_program


def why_no_vm(layout: Layout) -> str | None:
    """Say why a VM is no good choice here, in words; None when it is one."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "this host has no hardware virtualization that this user may use"
    from berth.engine.qemu.accel import probe
    from berth.engine.qemu.plan import qemu_program
    from berth.engine.qemu.virtiofsd import find_virtiofsd

    for program in (qemu_program(host.architecture()), "qemu-img", "mke2fs"):
        if find_program(program) is None:
            return f"{program} is not installed"
    if find_virtiofsd() is None:
        return "virtiofsd is not installed"
    found = probe(layout, host.architecture())
    return None if found.kind == "kvm" else found.reason
