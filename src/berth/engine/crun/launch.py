"""Carry out a `LaunchPlan`: assemble the root file system, start the container. Runs through `berth.inside` only.

A process of its own, because it leaves namespaces behind: it moves itself into the machine's cgroup, enters the
namespaces of the user's hub (ordinary users), takes a mount namespace, mounts, and lets crun make the container in a
*further* user namespace. Mounts that come from here are locked there: the machine's root can't undo them.
Source: mount_namespaces(7), "Restrictions on mount namespaces".
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

from berth import inside, syscalls
from berth.engine.crun import cgroups
from berth.engine.crun.launchplan import PLAIN, Bind, LaunchPlan
from berth.engine.crun.spec import AGENT_FD
from berth.errors import BerthError
from berth.idmapped import open_userns
from berth.net.attach import attach_inside
from berth.proc import run, start_time
from berth.rooted import open_inside

_CRUN_S = 30.0


def launch(plan: LaunchPlan, listener: int, bridge: str, address: dict[str, object]) -> object:
    """Start the machine; return ``{"pid": …, "startTime": …, "cgroups": […]}``.

    listener: the agent's listening socket, an inherited descriptor. bridge, address: where the machine hangs on the
    network. Raises BerthError; then nothing runs.
    """
    made = cgroups.enter(
        cgroups.Placement(
            plan["cgroup_directory"],
            tuple(plan["cgroup_v1"]),
            tuple((name, text) for name, text in plan["cgroup_writes"]),
        )
    )
    if plan["holder"] is not None:
        inside.enter(plan["holder"])
    if made:
        cgroups.give(made[0], plan["root"])
    syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWCGROUP)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    _assemble(plan)
    _show_cgroup2()
    pid = _create(plan, listener)
    ticks = start_time(pid)  # now, while it waits for its start: then it is busy becoming the init
    try:
        attach_inside(bridge, address, pid)
        _crun(plan, "start", plan["id"])
    except BaseException:
        _crun(plan, "delete", "--force", plan["id"])
        raise
    return {"pid": pid, "startTime": ticks, "cgroups": made}


def _show_cgroup2() -> None:
    """Let crun, which refuses the hybrid layout, see version 2 alone at its usual place."""
    try:
        syscalls.mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0)
    except OSError as error:
        if error.errno != errno.EBUSY:  # it is there already: a host with version 2 alone
            raise


def _assemble(plan: LaunchPlan) -> None:
    """Mount the machine's root file system and everything of the host that it sees."""
    for folder in plan["own"]:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        os.chown(folder, plan["root"], plan["root"])
    # The host's side first: what is mounted below may cover the place that it comes from.
    agent = syscalls.open_tree(plan["agent"], recursive=False)
    syscalls.mount_setattr(agent, set_attr=syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID)
    idmap = open_userns(plan["idmap"]) if any(bind["idmapped"] for bind in plan["binds"]) else None
    trees = [_open_bind(bind, idmap) for bind in plan["binds"]]
    os.chdir(plan["data"])
    try:
        syscalls.mount("overlay", plan["rootfs"], "overlay", syscalls.MS_NODEV, plan["overlay"])
    except OSError as error:
        raise BerthError(f"the machine's root file system can't be mounted: {error.strerror}") from error
    if os.statvfs(plan["rootfs"]).f_flag & os.ST_RDONLY:
        # overlayfs mounts it read-only, without a word, when it can't make its work directory.
        raise BerthError(f"the machine's root file system can't be written: no space left on {plan['data']}")
    root = os.open(plan["rootfs"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    _mount_run(plan, root, agent)
    for bind, tree in zip(plan["binds"], trees, strict=True):
        _attach(tree, root, bind["target"], directory=bind["directory"], owner=plan["root"])
    os.close(root)


def _mount_run(plan: LaunchPlan, root: int, agent: int) -> None:
    """Give the machine its /run with the agent and the boot document in it: a mounted /run is kept by every init."""
    owner = plan["root"]
    target = open_inside(root, "/run", directory=True, owner=owner)
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("tmpfs", f"/proc/self/fd/{target}", "tmpfs", flags, f"mode=755,uid={owner},gid={owner}")
    os.close(target)
    os.close(open_inside(root, "/run/berth", directory=True, owner=owner))
    for name, text in plan["run"].items():
        place = open_inside(root, f"/run/berth/{name}", directory=False, owner=owner)
        # The way from an O_PATH descriptor to one that can be written.
        Path(f"/proc/self/fd/{place}").write_text(text)
        os.close(place)
    _attach(agent, root, "/run/berth/agent", directory=False, owner=owner)


def _attach(tree: int, root: int, path: str, *, directory: bool, owner: int) -> None:
    target = open_inside(root, path, directory=directory, owner=owner)
    syscalls.move_mount(tree, target)
    os.close(tree)
    os.close(target)


def _open_bind(bind: Bind, idmap: int | None) -> int:
    """Clone what the machine shall see of the host, with its attributes and id map; return the detached mount."""
    attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
    if bind["read_only"]:
        attributes |= syscalls.MOUNT_ATTR_RDONLY
    if bind["target"] in PLAIN:
        attributes = syscalls.MOUNT_ATTR_NODEV  # images in there hold setuid programs that must work
    try:
        tree = syscalls.open_tree(bind["source"], recursive=True)
        syscalls.mount_setattr(tree, set_attr=attributes, recursive=True)
    except OSError as error:
        raise BerthError(f"{bind['source']} can't be mounted in the machine: {error.strerror}") from error
    try:
        if bind["idmapped"] and idmap is not None:
            syscalls.mount_setattr(tree, userns=idmap, recursive=True)
    except OSError as error:
        raise BerthError(
            f"{bind['source']} can't be mounted in the machine: its file system has no idmapped mounts",
            hint="keep it out with --home-mount none (or without that --mount), or run berth as an ordinary user",
        ) from error
    return tree


def _create(plan: LaunchPlan, listener: int) -> int:
    """Let crun make the container with the agent's socket as its descriptor 3; return the init's process id."""
    bundle = Path(plan["bundle"])
    (bundle / "config.json").write_text(json.dumps(plan["spec"]))
    pid_file = bundle / "init.pid"
    # In two steps: dup2 of a descriptor onto itself would leave it close-on-exec.
    copy = fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, AGENT_FD + 1)
    os.dup2(copy, AGENT_FD)
    os.close(copy)
    _crun(
        plan, "create", "--bundle", str(bundle), "--console-socket", plan["console_socket"],
        "--preserve-fds", "1", "--pid-file", str(pid_file), plan["id"], pass_fds=(AGENT_FD,),
    )  # fmt: skip
    return int(pid_file.read_text())


def _crun(plan: LaunchPlan, *words: str, pass_fds: tuple[int, ...] = ()) -> None:
    argv = ["crun", "--root", plan["crun_state"], "--cgroup-manager=disabled", *words]
    run(argv, timeout_s=_CRUN_S, pass_fds=pass_fds, env={"XDG_RUNTIME_DIR": str(Path(plan["crun_state"]).parent)})
