"""What is to be mounted, limited and run for one container machine. Plans only: nothing is started or changed here.

`plan_launch` gives a `LaunchPlan`, plain JSON data, because `launch` carries it out in another process.
"""

from __future__ import annotations

import os
from pathlib import Path

from berth import host
from berth.engine.base import Machine
from berth.engine.common import Shared, cover_path, plan_covers, plan_shared
from berth.engine.crun import cgroups
from berth.engine.crun.launchplan import PLAIN, Bind, LaunchPlan
from berth.engine.crun.spec import runtime_spec
from berth.userns import IdMap

# Bound where the host lets everybody open them: FUSE and tunnels work inside, as on a real machine.
_DEVICES = ("/dev/fuse", "/dev/net/tun")


def plan_launch(
    machine: Machine,
    *,
    agent: Path,
    holder: int | None,
    idmap: IdMap,
    placement: cgroups.Placement,
    boot_document: str,
    bounding_set: int,
) -> LaunchPlan:
    """Say how to launch `machine`. Reads the host's file system (what exists, where links lead), changes nothing.

    holder: the process whose namespaces own the network (ordinary users); None for root, whose machines get `idmap`
    from the host's own namespace.
    """
    bundle, layout = machine.bundle, machine.bundle.layout
    live = layout.live(machine.config.name)
    shifted = holder is None
    # Where the launcher, in a mount namespace of its own, assembles the tree. crun looks at it with the rights of the
    # machine's root, to whom root's own directories are closed; FHS 3.0 has /mnt for "mounting temporarily".
    rootfs = "/mnt" if shifted else str(live / "rootfs")
    return LaunchPlan(
        id=container_id(machine),
        data=str(layout.data),
        overlay=_overlay_options(machine, shifted=shifted),
        own=[str(bundle.upper), *(_plain(machine, path) for path in PLAIN)],
        rootfs=rootfs,
        run={"boot.json": boot_document},
        agent=str(agent),
        binds=plan_binds(machine, idmapped=shifted),
        cgroup_directory=placement.directory,
        cgroup_v1=list(placement.v1),
        cgroup_writes=[list(write) for write in placement.writes],
        holder=holder,
        root=idmap.host_root() if shifted else 0,
        idmap=[[list(extent) for extent in extents] for extents in idmap],
        spec=runtime_spec(
            rootfs=rootfs,
            hostname=machine.config.name,
            idmap=idmap if shifted else idmap.nested(),
            bounding_set=bounding_set,
            devices=[path for path in _DEVICES if _is_open_to_all(path)],
            cgroup=placement.directory is not None,
            architecture=host.architecture(),
        ),
        bundle=str(live / "bundle"),
        crun_state=str(layout.crun),
        console_socket=str(live / "console.sock"),
    )


def _is_open_to_all(path: str) -> bool:
    try:
        return os.stat(path).st_mode & 0o006 == 0o006
    except OSError:
        return False


def container_id(machine: Machine) -> str:
    """Name the container for crun: unique on the host, whatever the data directory."""
    return f"berth-{machine.config.id[:12]}"


def _overlay_options(machine: Machine, *, shifted: bool) -> str:
    data = machine.bundle.layout.data
    lower = machine.bundle.layout.template(machine.config.image_digest).relative_to(data) / "rootfs"
    upper, work = (path.relative_to(data) for path in (machine.bundle.upper, machine.bundle.work))
    # In a user namespace overlayfs keeps its marks in user.* attributes; root's may rename directories of the image.
    mode = "redirect_dir=on" if shifted else "userxattr"
    return f"lowerdir={lower},upperdir={upper},workdir={work},{mode}"


def plan_binds(machine: Machine, *, idmapped: bool) -> list[Bind]:
    """Say what of the host the machine sees, in mounting order: home, mounts, then what covers the credentials."""
    shared = plan_shared(machine)
    binds = [_bind(one, idmapped=idmapped) for one in shared]
    binds += [
        Bind(
            source=str(cover_path(machine.bundle.private, hidden)), target=hidden.path, directory=hidden.directory,
            read_only=not hidden.directory, idmapped=idmapped,
        )
        for hidden in plan_covers(machine, shared)
    ]  # fmt: skip
    binds += [
        Bind(
            source=_plain(machine, path), target=path, directory=True, read_only=False, idmapped=False
        )
        for path in PLAIN
    ]  # fmt: skip
    return binds


def _plain(machine: Machine, path: str) -> str:
    return str(machine.bundle.plain / path.rpartition("/")[2])


def _bind(shared: Shared, *, idmapped: bool) -> Bind:
    return Bind(
        source=shared.source, target=shared.target, directory=shared.directory, read_only=shared.read_only,
        idmapped=idmapped,
    )  # fmt: skip
