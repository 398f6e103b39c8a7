"""The OCI runtime-spec document of a system container. Pure: same inputs, same document. Used by `plan` only.

Source: runtime-spec 1.0, config.md and config-linux.md; crun(1).
"""

from __future__ import annotations

from collections.abc import Sequence

from berth.userns import Extent, IdMap

# linux/capability.h, by bit.
_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip

# These act on the kernel that all machines share. A user namespace refuses them already; this is the second wall.
_FORBIDDEN_CALLS = (
    "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "open_by_handle_at",
    "swapon", "swapoff", "acct", "iopl", "ioperm",
)  # fmt: skip

# What runs besides the processor's own programs, as images name it. Source: seccomp_arch_add(3).
_ARCHITECTURES = {
    "amd64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "arm64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}

# Worth nothing outside of the host's own user namespace, and systemd takes their presence as a promise
# (ConditionCapability=): debugfs, the audit socket, the hardware clock would be tried and fail.
_HOLLOW = frozenset((
    "SYS_MODULE", "SYS_RAWIO", "SYS_PACCT", "SYS_TIME", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "AUDIT_CONTROL",
    "AUDIT_READ", "WAKE_ALARM", "BLOCK_SUSPEND",
))  # fmt: skip

AGENT_FD = 3  # the agent's listening socket, handed through crun (--preserve-fds)


def runtime_spec(
    *,
    rootfs: str,
    hostname: str,
    idmap: IdMap,
    bounding_set: int,
    devices: Sequence[str],
    cgroup: bool,
    architecture: str,
) -> dict[str, object]:
    """Say how crun is to make the container.

    rootfs: the assembled tree on the host. idmap: from the container's ids to those of the namespace crun runs in.
    bounding_set: CapBnd of our own process (asking for more fails). devices: host device nodes to bind, if there.
    cgroup: whether the container gets a cgroup of its own to manage. architecture: this host's, as images name it.
    """
    capabilities = [
        f"CAP_{name}" for bit, name in enumerate(_CAPABILITIES) if bounding_set >> bit & 1 and name not in _HOLLOW
    ]
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": {"path": rootfs, "readonly": False},
        "process": {
            "terminal": True,
            "consoleSize": {"height": 25, "width": 80},
            "user": {"uid": 0, "gid": 0},
            "args": ["/run/berth/agent", "boot"],
            # Without a HOME crun looks into the machine's /etc/passwd, which may be a FIFO, and waits.
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=linux", "HOME=/root"],
            "cwd": "/",
            "noNewPrivileges": False,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        },
        "mounts": _mounts(devices, cgroup=cgroup),
        "linux": {
            "namespaces": [
                {"type": kind} for kind in ("user", "pid", "ipc", "uts", "mount", "network", "cgroup")
            ],
            "uidMappings": _mappings(idmap.uids),
            "gidMappings": _mappings(idmap.gids),
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                # Without them a filter ends every program of the processor's 32-bit half.
                "architectures": list(_ARCHITECTURES.get(architecture, ())),
                "syscalls": [{"names": list(_FORBIDDEN_CALLS), "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
            },
            # Nothing of /proc is masked: in a user namespace the host's knobs are refused by their owner, and
            # containers inside the machine need an unmasked /proc to mount their own.
            "maskedPaths": [],
            "readonlyPaths": [],
        },
    }  # fmt: skip


def _mounts(devices: Sequence[str], *, cgroup: bool) -> list[dict[str, object]]:
    mounts = [
        _mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _mount("/dev/shm", "tmpfs", "nosuid", "nodev", "mode=1777"),  # noqa: S108 (in the guest)
        _mount("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        # Read-only tells systemd that devices and links are managed from outside.
        _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
    ]
    if cgroup:
        mounts.append(_mount("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "rw"))
    return mounts + [_mount(path, "bind", "bind", "rw", "nosuid", "noexec", source=path) for path in devices]


def _mount(destination: str, kind: str, *options: str, source: str = "") -> dict[str, object]:
    return {"destination": destination, "type": kind, "source": source or kind, "options": list(options)}


def _mappings(extents: Sequence[Extent]) -> list[dict[str, int]]:
    return [{"containerID": extent.inside, "hostID": extent.outside, "size": extent.size} for extent in extents]
