"""What a VM machine has changed on its disk, as a layer: read by a small VM of berth's own, the *reader*. Layer 3.

`engine` calls `write_changes`. The disk is a file system that a guest may have made, so no program of the host
reads it: QEMU shows a copy of it to a kernel, with the template that it was made on, and the agent writes the
differences to a third disk (guest/internal/layer). Nothing of the machine runs; its own disk is only copied.

    root     the copy (qcow2 on the template): the journal may be replayed in it
    base     the template, read-only
    output   a file: 4096 bytes of JSON that say how it went, then the layer

What comes out is believed no more than a layer from the net: the caller checks it. The reader ends with us.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import select
import time
from base64 import b64encode
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, cast

from berth import host
from berth.engine.base import Machine
from berth.engine.qemu import disks
from berth.engine.qemu.accel import Accelerator
from berth.engine.qemu.launch import arch_of, as_nobody, has_qboot, initial_ramfs, opened, qemu_owner
from berth.engine.qemu.plan import Disk, Reader, kernel_command_line, reader_command
from berth.engine.running import ESCAPES
from berth.errors import BerthError, DeadlineError
from berth.kernels.model import Kernel
from berth.layout import Layout
from berth.log import log
from berth.oci.tarwriter import END
from berth.proc import spawn
from berth.units import GIB, MIB

_HEAD = 4096
_FULL = 16 * MIB  # less than this free: the host's disk is why it failed
_MEMORY = 512 * MIB  # a directory of a million files takes a quarter of it
_SIGN = b"berth: reading the changes"  # on the console: it has booted
_BOOT_S = {"kvm": 20.0, "tcg": 120.0}
_READ_S = 3600.0
_KEPT = 4096  # bytes of the console
# Its QEMU ends with us, however we end.
_WITH_US = ("--pdeathsig", "KILL")


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """What the reader says. start, size: where in the file the layer is. left_out: what no layer can hold."""

    start: int
    size: int
    left_out: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """Whose disk is read, and by what."""

    machine: Machine
    kernel: Kernel
    accelerator: Accelerator
    layout: Layout


def write_changes(
    setting: Setting, out: IO[bytes], *, exclude: Collection[str], still: AbstractContextManager[None]
) -> Changes:
    """Write the layer to the empty file `out`, not from its beginning: the result says where.

    exclude: paths below the root that are not looked at. still: what keeps the disk from changing, entered while it is
    copied. Raises BerthError when the disk can't be read, DeadlineError.
    """
    bundle = setting.machine.bundle
    found = disks.find_disk(bundle)
    if found is None:  # it has never run
        out.write(END)
        out.flush()
        return Changes(0, len(END))
    owner = qemu_owner()
    check = not disks.was_clean(bundle)
    document = _document(setting.machine, exclude, check=check)
    with contextlib.ExitStack() as kept:
        with still:
            disk = kept.enter_context(disks.copied_disk(bundle, owner=owner))
        if owner is not None:
            os.fchown(out.fileno(), owner, owner)
        initrd = kept.enter_context(initial_ramfs(setting.kernel, setting.layout, document, check=check))
        # All that fits on the disk, and the headers.
        limit = _HEAD + found.size + found.size // 8 + GIB
        console = _read(setting, _plan(setting, disk, initrd, out, kept), out, limit)
    return _verdict(setting.machine, out, console)


def _plan(setting: Setting, disk: disks.OpenDisk, initrd: int, out: IO[bytes], kept: contextlib.ExitStack) -> Reader:
    kernel = setting.kernel
    return Reader(
        id=secrets.token_hex(6),
        arch=arch_of(kernel),
        host_arch=host.architecture(),
        accel=setting.accelerator.kind,
        cpus=1,
        memory=_MEMORY,
        kernel_fd=kept.enter_context(opened(kernel.vmlinux or kernel.image)),
        kernel_is_pvh=kernel.vmlinux is not None,
        has_qboot=has_qboot(),
        initrd_fd=initrd,
        cmdline=kernel_command_line(kernel.arch, setting.accelerator.kind),
        disk=Disk(disk.disk, disk.template),
        # Opened anew: QEMU tells its descriptors apart by their numbers.
        template_fd=kept.enter_context(opened(Path(f"/proc/self/fd/{disk.template}"))),
        output_fd=out.fileno(),
    )


def _read(setting: Setting, vm: Reader, out: IO[bytes], limit: int) -> str:
    """Let the reader fill `out`, with at most `limit` bytes; return its console's last words."""
    owner, accelerator = qemu_owner(), setting.accelerator
    words = () if owner is None else as_nobody(owner, accelerator)[1:-1]
    argv = ["setpriv", *words, *_WITH_US, "--", *reader_command(vm)]
    for attempt in (1, 2):
        out.truncate(0)
        out.truncate(limit)
        try:
            return _run(argv, vm.inherited_fds, _BOOT_S[accelerator.kind])
        except DeadlineError:
            # An emulated timer is now and then calibrated wrongly, and the kernel waits for ever.
            if attempt == 2:
                raise
            log.debug("the reader of machine '%s' got stuck: once more", setting.machine.config.name)
    raise AssertionError


def _document(machine: Machine, exclude: Collection[str], *, check: bool) -> dict[str, object]:
    """Say what the agent is to do. Source: docs/protocol.md, "The boot document"."""
    changes = {
        "template": "base", "output": "output",
        "exclude": [b64encode(os.fsencode(path)).decode() for path in exclude],
    }  # fmt: skip
    vm: dict[str, object] = {
        "root": "root", "modules": None, "check": check, "mounts": [], "network": None, "unixNanos": time.time_ns(),
        "changes": changes,
    }  # fmt: skip
    return {"schema": 1, "instance": machine.config.id, "vm": vm}


def _run(argv: list[str], fds: Sequence[int], boot_s: float) -> str:
    """Run QEMU to its end; return the console's last words. Raises DeadlineError when it does not boot, or read."""
    with spawn(argv, stdout=-1, stderr=-2, pass_fds=fds, new_session=True) as process:  # -1 is PIPE, -2 STDOUT
        try:
            said = cast("IO[bytes]", process.stdout).fileno()
            first = _listen(said, b"", until=_SIGN, timeout_s=boot_s)
            last = _read_on(said, first)
        finally:
            process.kill()
    return ESCAPES.sub("", last.decode(errors="replace")).strip()


def _read_on(fd: int, said: bytes) -> bytes:
    try:
        return _listen(fd, said, until=None, timeout_s=_READ_S)
    except DeadlineError as error:  # no more of this: it is not the boot that has got stuck
        raise BerthError(f"the disk could not be read within {_READ_S:g} s") from error


def _listen(fd: int, said: bytes, *, until: bytes | None, timeout_s: float) -> bytes:
    """Read what QEMU prints, after `said`, up to some words or its end; return the last of it."""
    deadline = time.monotonic() + timeout_s
    while until is None or until not in said:
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise DeadlineError(f"the VM that reads the disk did not get on within {timeout_s:g} s")
        data = os.read(fd, _KEPT)
        if not data:
            return said
        said = (said + data)[-_KEPT:]
    return said


def _verdict(machine: Machine, out: IO[bytes], console: str) -> Changes:
    """Read how it went. Nothing in it is believed: it may be anything."""
    where = f"the disk of machine '{machine.config.name}' can't be read"
    text = os.pread(out.fileno(), _HEAD, 0).rstrip(b"\0")
    if not text:
        raise BerthError(f"{where}: {console or 'the VM that reads it ended early'}", hint=_room(out))
    try:
        document: object = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    match document:
        case {"error": str(error)}:
            raise BerthError(f"{where}: {ESCAPES.sub('', error)[:300]}", hint=_room(out))
        case {"size": int(size), "leftOut": int(left_out)} if 0 < size <= os.fstat(out.fileno()).st_size - _HEAD:
            out.truncate(_HEAD + size)
            return Changes(_HEAD, size, left_out)
        case _:
            raise BerthError(f"{where}: the VM that reads it does not say how it went")


def _room(out: IO[bytes]) -> str | None:
    """Say so when the host's disk is full: that is why it failed, then."""
    facts = os.fstatvfs(out.fileno())
    return "the host's disk is full" if facts.f_bavail * facts.f_frsize < _FULL else None
