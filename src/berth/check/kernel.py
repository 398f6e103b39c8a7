"""Checks of the kernel: user namespaces, overlayfs, id-mapped mounts, devices, limits. Tried where possible."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

from berth import proc, syscalls, userns
from berth.check.model import Check, Place, Probe
from berth.check.tools import existing_parent
from berth.errors import BerthError, CommandError, UnsupportedError

_DEADLINE_S = 10
# Source: overlayfs.rst, "userxattr": overlayfs in user namespaces came with Linux 5.11; open_tree's id maps with 5.12.
_KERNEL = (5, 11)
_MAX_USER_INSTANCES = 512
_NAMESPACES_AFFECT = "without it no container machine runs; VMs do"
# Every knob that forbids user namespaces: its file, the value that does, the value that does not.
_FORBIDDING = (
    ("kernel.apparmor_restrict_unprivileged_userns", "1", 0,
     "AppArmor forbids them to ordinary users (as Ubuntu sets it)"),
    ("kernel.unprivileged_userns_clone", "0", 1, "this kernel forbids them to ordinary users"),
    ("user.max_user_namespaces", "0", 15000, "none is allowed"),
)  # fmt: skip


def check_kernel(place: Place) -> Check:
    """Compare the kernel's version with the oldest that has what machines need."""
    wanted = ".".join(str(number) for number in _KERNEL)
    if place.host.os != "linux":
        return Check(
            "kernel", "missing", place.host.release, "not Linux", "container machines need Linux", None, required=True
        )
    if place.host.kernel < _KERNEL:
        detail = f"older than {wanted}"
        return Check(
            "kernel", "missing", place.host.release, detail, "an ordinary user's machines need it", None, required=True
        )
    where = f", in a container ({place.host.container})" if place.host.container else ""
    detail = f"{place.host.name}{where}"
    return Check("kernel", "ok", place.host.release, detail, _NAMESPACES_AFFECT, None, required=True)


def check_user_namespaces(place: Place) -> Check:
    """Make a user namespace and a mount namespace in it, as machines do."""
    name = "user-namespaces"
    # The mount namespace is what tells: where AppArmor is in the way, the user namespace itself still appears.
    argv = ["unshare", "--user", "--map-root-user", "--mount", "true"]
    try:
        proc.run(argv, timeout_s=_DEADLINE_S)
    except BerthError as error:
        detail, fix = _why_forbidden(place, error.message)
        return Check(name, "missing", None, detail, _NAMESPACES_AFFECT, fix, required=True)
    return Check(name, "ok", None, "allowed", _NAMESPACES_AFFECT, None, required=True)


def _why_forbidden(place: Place, said: str) -> tuple[str, str | None]:
    for key, bad, good, why in _FORBIDDING:
        if _sysctl(key) == bad:
            return why, place.set_sysctl(key, good)
    if place.host.container:
        return f"the container that we run in forbids them: {said}", None
    return f"forbidden: {said}", None


def check_overlayfs(place: Place) -> Check:
    """Mount an overlay as machines do: on the data directory's file system and, for a user, in a user namespace."""
    affects = "without it no container machine runs"
    folder = existing_parent(place.layout.data)
    try:
        idmap = None if place.is_root else userns.plan_idmap(place.uid, place.gid)
        _try_overlay(folder, idmap)
    except UnsupportedError as error:
        return Check("overlayfs", "warning", None, f"could not be tried: {error.message}", affects, None, required=True)
    except (BerthError, OSError) as error:
        detail = f"not on {folder}: {error}; set BERTH_DATA_DIR to a folder on ext4, xfs or btrfs"
        return Check("overlayfs", "missing", None, detail, affects, None, required=True)
    how = "as root" if idmap is None else "in a user namespace"
    return Check("overlayfs", "ok", None, f"works {how} on {folder}", affects, None, required=True)


def _try_overlay(folder: Path, idmap: userns.IdMap | None) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=".berth-check-", dir=folder))
    try:
        for name in ("lower", "upper", "work", "merged"):
            (scratch / name).mkdir()
        userns.call("berth.check.kernel:mount_overlay", {"folder": str(scratch)}, idmap=idmap, timeout_s=_DEADLINE_S)
    finally:
        _remove_overlay(scratch)


def mount_overlay(folder: str) -> bool:
    """Mount and write to an overlay in `folder`, in a mount namespace that ends with us (run by `berth.inside`)."""
    userxattr = "" if _is_initial_user_namespace() else ",userxattr"
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    os.chdir(folder)
    options = f"lowerdir=lower,upperdir=upper,workdir=work{userxattr}"
    syscalls.mount("overlay", "merged", "overlay", syscalls.MS_NODEV, options)
    Path("merged/file").write_text("written")
    return Path("upper/file").read_text() == "written"


def _is_initial_user_namespace() -> bool:
    # Source: user_namespaces(7): the initial one maps every id to itself.
    return Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


def _remove_overlay(scratch: Path) -> None:
    # By name, not by walking: overlayfs leaves work/work without any permission, owned by another id than ours.
    with contextlib.suppress(FileNotFoundError):
        (scratch / "upper/file").unlink()
    for name in ("work/work", "work/index", "work", "upper", "lower", "merged", "."):
        with contextlib.suppress(FileNotFoundError, OSError):
            os.rmdir(scratch / name if name != "." else scratch)


def check_idmapped_mounts(place: Place) -> Check:
    """Clone the home's mount and send its ids through a user namespace, as root's machines do with their home."""
    name = "idmapped-mounts"
    home = Path.home()
    affects = "without it root's machines see no folder of the host with the right owner"
    if not place.is_root:
        return Check(name, "ok", None, "an ordinary user's machines do without", "nothing", None)
    try:
        _try_idmapped_mount(home)
    except (BerthError, OSError) as error:
        detail = f"not on {home}: {error}; keep the folders that machines share on ext4, xfs or btrfs"
        return Check(name, "missing", None, detail, affects, None)
    return Check(name, "ok", None, f"works on {home}", affects, None)


def _try_idmapped_mount(folder: Path) -> None:
    # cat, once it has answered, is certainly in its namespace; it ends when its stdin does.
    with proc.spawn(["unshare", "--user", "--map-root-user", "cat"], stdin=-1, stdout=-1) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"?")
        process.stdin.flush()
        if os.read(process.stdout.fileno(), 1) != b"?":
            raise CommandError(("unshare",), process.wait(timeout=_DEADLINE_S))
        with _opened(Path(f"/proc/{process.pid}/ns/user"), os.O_RDONLY) as namespace:
            tree = syscalls.open_tree(str(folder), recursive=False)
            try:
                syscalls.mount_setattr(tree, userns=namespace)
            finally:
                os.close(tree)
        process.stdin.close()


def check_tun(place: Place) -> Check:
    """Open /dev/net/tun as pasta does, and as the TAP of a VM needs it."""
    path = Path("/dev/net/tun")
    affects = "without it an ordinary user's containers have no network but forwarded ports, and each VM is alone"
    if not path.exists():
        return Check("tun", "missing", None, f"{path} does not exist", affects, place.as_root("modprobe tun"))
    try:
        with _opened(path, os.O_RDWR):
            return Check("tun", "ok", None, f"{path} can be opened", affects, None)
    except OSError as error:
        detail = f"{path} can't be opened: {error.strerror}"
        return Check("tun", "missing", None, detail, affects, place.as_root(f"chmod 0666 {path}"))


def check_inotify(place: Place) -> Check:
    """Compare the limits that many machines with systemd reach first."""
    key = "fs.inotify.max_user_instances"
    value = _sysctl(key)
    affects = "each machine with systemd uses about ten: with fewer, services of the fifth or tenth fail to start"
    if value.isdecimal() and int(value) < _MAX_USER_INSTANCES:
        fix = place.set_sysctl(key, 1024)
        return Check("inotify", "warning", None, f"{key} is {value}, below {_MAX_USER_INSTANCES}", affects, fix)
    return Check("inotify", "ok", None, f"{key} is {value or 'unknown'}", affects, None)


def check_low_ports(place: Place) -> Check:
    """Look whether this user may listen on the ports of services, to forward them."""
    key = "net.ipv4.ip_unprivileged_port_start"
    value = _sysctl(key)
    affects = "without it an ordinary user's machines have 8080 for 80, 8022 for 22"
    if place.is_root or not value.isdecimal() or int(value) <= 22:
        return Check("low-ports", "ok", None, "every port can be forwarded", affects, None)
    detail = f"ports below {value} can't be forwarded"
    return Check("low-ports", "warning", None, detail, affects, place.set_sysctl(key, 0), optional=True)


def _sysctl(key: str) -> str:
    """Read a kernel parameter; empty when this kernel has none of that name."""
    try:
        return Path("/proc/sys", key.replace(".", "/")).read_text().strip()
    except OSError:
        return ""


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Generator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


PROBES: tuple[Probe, ...] = (
    check_kernel,
    check_user_namespaces,
    check_overlayfs,
    check_idmapped_mounts,
    check_tun,
    check_inotify,
    check_low_ports,
)
