"""What `berth run` needs before anything else: the roots, a name's rule, a few paths, all as plain strings. Layer 0.

`layout` and `names` build on it; only `cli.run` uses it directly. It exists for its import time: it imports `os` alone,
where pathlib, typing and dataclasses would cost 15 ms of the 45 that `berth run -- true` may take.
"""

from __future__ import annotations

import os

# Source: unix(7), sun_path: 108 bytes on Linux with the final NUL, 104 on macOS.
SUN_PATH_MAX = 103

_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


def is_machine_name(text: str) -> bool:
    """Say whether `text` is 1 to 63 of ``a-z0-9-`` with a letter or digit at both ends."""
    return 0 < len(text) < 64 and _NAME_LETTERS.issuperset(text) and "-" not in (text[0], text[-1])


def root(kind: str) -> str:
    """Return the DATA, RUNTIME, CONFIG or CACHE root: BERTH_{kind}_DIR, else by the XDG rules; root's are fixed.

    With a data root of its own comes a runtime root of its own.
    """
    override = os.environ.get(f"BERTH_{kind}_DIR")
    if override:
        return override if override.startswith("/") else os.path.join(os.getcwd(), override)
    path = _system_root(kind) if os.geteuid() == 0 else _user_root(kind)
    return f"{path}-{_other_data()}" if kind == "RUNTIME" and os.environ.get("BERTH_DATA_DIR") else path


def _other_data() -> str:
    """Return a few digits of the data root: machines kept elsewhere may have the names of those at the usual place."""
    import zlib

    return f"{zlib.crc32(os.fsencode(os.path.normpath(root('DATA')))):08x}"


def live(name: str) -> str:
    """Return the runtime directory of one machine."""
    return os.path.join(root("RUNTIME"), "m", name)


def agent_socket(name: str) -> str:
    return os.path.join(live(name), "agent.sock")


def records(name: str) -> tuple[str, str]:
    """Return the files one of which names the processes of a machine that has been started: a container's, a VM's."""
    return os.path.join(live(name), "container.json"), os.path.join(live(name), "vm.json")


def keeper_lock(name: str) -> str:
    return os.path.join(live(name), "keeper.lock")


def boot_config(name: str) -> str:
    return os.path.join(root("DATA"), "machines", name, "boot-config.json")


def find_default_machine() -> str | None:
    """Return what the file of the default machine says, if that is a name; whether the machine exists is not asked."""
    try:
        with open(os.path.join(root("DATA"), "default-machine"), "rb") as file:
            name = file.read(65).decode("ascii", "replace").strip()
    except OSError:
        return None
    return name if is_machine_name(name) else None


def _system_root(kind: str) -> str:
    parents = {"DATA": "/var/lib", "RUNTIME": "/run", "CONFIG": "/etc", "CACHE": "/var/cache"}
    return f"{parents[kind]}/berth"


def _user_root(kind: str) -> str:
    # The XDG rules by hand: platformdirs costs 16 ms, these lines nothing.
    home = os.environ.get("HOME") or os.path.expanduser("~")
    match kind:
        case "DATA":
            base = os.environ.get("XDG_DATA_HOME") or f"{home}/.local/share"
        case "CONFIG":
            base = os.environ.get("XDG_CONFIG_HOME") or f"{home}/.config"
        case "CACHE":
            base = os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
        case _:
            run = f"/run/user/{os.getuid()}"
            base = os.environ.get("XDG_RUNTIME_DIR") or (run if os.path.isdir(run) else "")
            return f"{base}/berth" if base else f"/tmp/berth-{os.getuid()}"  # noqa: S108 (made 0700 and checked)
    return f"{base}/berth"
