"""Machines that come up with the login, or with the host: the systemd unit that runs `berth system start`. Layer 3.

Owns berth.service, in the user's systemd directory (or root's, /etc/systemd/system). Which machines it starts is not
decided here: each machine's own `autostart` setting says so. Only `cli` and lifecycle call it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path

from berth.errors import BerthError, CommandError, DeadlineError
from berth.files import write_atomic
from berth.layout import Layout
from berth.proc import find_program, run

UNIT = "berth.service"
_SYSTEMCTL_DEADLINE_S = 30.0
_OVERRIDES = ("BERTH_DATA_DIR", "BERTH_RUNTIME_DIR", "BERTH_CONFIG_DIR", "BERTH_CACHE_DIR")


@dataclasses.dataclass(frozen=True, slots=True)
class Autostart:
    """How things stand. unit: its file; state: `enabled`, `disabled` (the file is there, but systemd does not use it),
    `absent`; notes: what the person should know or do, one line each, commands whole."""

    unit: Path
    state: str
    notes: tuple[str, ...] = ()


def enable(layout: Layout) -> Autostart:
    """Write the unit and have systemd start it at login (root: at boot). Idempotent; starts nothing now.

    Where no systemd answers, the unit is written all the same and the notes say what to type, and when.
    """
    unit = unit_path()
    unit.parent.mkdir(parents=True, exist_ok=True)
    text = unit_text(berth_command(), overrides(layout), for_root=os.geteuid() == 0)
    write_atomic(unit, text.encode(), mode=0o644)
    missing = _why_no_systemd()
    if missing is not None:
        return Autostart(unit, "disabled", missing)
    _systemctl("daemon-reload")
    _systemctl("enable", UNIT)
    return Autostart(unit, "enabled", _linger_notes())


def disable(_layout: Layout) -> Autostart:
    """Take the unit away; machines that run go on. Idempotent. (One unit serves whatever roots berth is used with.)"""
    unit = unit_path()
    if not unit.exists():
        return Autostart(unit, "absent")
    missing = _why_no_systemd()
    if missing is None:
        _systemctl("disable", UNIT)
    unit.unlink(missing_ok=True)
    _wanted_by(unit).unlink(missing_ok=True)
    if missing is None:
        _systemctl("daemon-reload")
    return Autostart(unit, "absent")


def status() -> Autostart:
    """Say how things stand; asks systemd nothing, so it answers without one too."""
    unit = unit_path()
    if not unit.exists():
        return Autostart(unit, "absent", ("berth system autostart enable",))
    if not _wanted_by(unit).is_symlink():
        return Autostart(unit, "disabled", _why_no_systemd() or ("berth system autostart enable",))
    return Autostart(unit, "enabled", _linger_notes())


def unit_path() -> Path:
    """Say where the unit lies. Source: systemd.unit(5), "Unit File Load Path"."""
    if os.geteuid() == 0:
        return Path("/etc/systemd/system") / UNIT
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "systemd/user" / UNIT


def unit_text(command: tuple[str, ...], environment: dict[str, str], *, for_root: bool) -> str:
    """Write the unit. Same inputs, same text.

    KillMode=process: `berth system stop` ends what it started, politely. What else lives in the unit's control group
    (the network hub that the first machine brought up, machines started by hand meanwhile) serves others and must not
    be killed with it. Delegate: machines make control groups below ours. RemainAfterExit: there is no daemon to watch.
    """
    what = " ".join([_program(command[0]), *(_quote(word) for word in command[1:])])
    lines = ["[Unit]", "Description=berth machines that start by themselves"]
    if for_root:
        # Whoever loads a firewall flushes other tables on the way: be after them.
        lines += ["After=network.target nftables.service firewalld.service"]
    lines += ["", "[Service]", "Type=oneshot", "RemainAfterExit=yes"]
    lines += [f"Environment={_quote(f'{key}={value}', dollar='$')}" for key, value in sorted(environment.items())]
    lines += [
        f"ExecStart={what} system start",
        f"ExecStop={what} system stop",
        "KillMode=process",
        "Delegate=yes",
        "TimeoutStartSec=5min",
        "TimeoutStopSec=2min",
        "",
        "[Install]",
        f"WantedBy={'multi-user.target' if for_root else 'default.target'}",
    ]
    return "\n".join(lines) + "\n"


def berth_command() -> tuple[str, ...]:
    """Say how systemd can start this very berth: absolute, because it knows no PATH of ours."""
    beside = Path(sys.executable).parent / "berth"
    if os.access(beside, os.X_OK):
        return (str(beside),)
    installed = shutil.which("berth")
    return (os.path.abspath(installed),) if installed else (sys.executable, "-m", "berth")


def overrides(layout: Layout) -> dict[str, str]:
    """Say which BERTH_*_DIR the unit has to carry: those that differ from what it would find by itself."""
    roots = dict(zip(_OVERRIDES, (layout.data, layout.runtime, layout.config, layout.cache), strict=True))
    return {key: str(root) for key, root in roots.items() if os.environ.get(key)}


def _quote(word: str, *, dollar: str = "$$") -> str:
    # Source: systemd.syntax(7), "Quoting"; systemd.unit(5), "%%"; systemd.service(5), "$$" (in command lines only).
    if "\n" in word or "\0" in word:
        raise BerthError(f"a systemd unit can't hold {word!r}")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", dollar)
    plain = escaped == word and word and not set(word) & set(" \t';")
    return word if plain else f'"{escaped}"'


def _program(path: str) -> str:
    # Source: systemd.service(5): no variable is substituted in the first word; load-fragment.c refuses quotes in it.
    if set(path) & set("\"'\\"):
        raise BerthError(f"systemd starts no program whose path holds quotes or backslashes: {path}")
    return _quote(path, dollar="$")


def _wanted_by(unit: Path) -> Path:
    target = "multi-user.target.wants" if os.geteuid() == 0 else "default.target.wants"
    return unit.parent / target / UNIT


def _why_no_systemd() -> tuple[str, ...] | None:
    """Say what to do where systemd can't be asked; None where it can."""
    # Source: sd_booted(3).
    if not os.path.isdir("/run/systemd/system"):
        where = "a boot script of root's, such as /etc/rc.local" if os.geteuid() == 0 else "~/.profile"
        return (f"this host is not run by systemd: put '{' '.join(berth_command())} system start' into {where}",)
    if os.geteuid() != 0 and not _is_user_manager_there():
        return (
            "no systemd of this user's answers here (su and sudo do not start one); log in and type:",
            f"systemctl --user daemon-reload && systemctl --user enable {UNIT}",
        )
    return None


def _is_user_manager_there() -> bool:
    try:
        _systemctl("show", "--property=Version")
    except BerthError:
        return False
    return True


def _linger_notes() -> tuple[str, ...]:
    if os.geteuid() == 0:
        return ()
    user = os.environ.get("USER") or str(os.geteuid())
    if os.path.exists(f"/var/lib/systemd/linger/{user}"):  # Source: loginctl(1), enable-linger; logind's own folder
        return ()
    return (f"machines start when you log in; to start them with the host: sudo loginctl enable-linger {user}",)


def _systemctl(*arguments: str) -> None:
    scope = () if os.geteuid() == 0 else ("--user",)
    if find_program("systemctl") is None:
        raise BerthError("systemctl is not installed")
    try:
        run(["systemctl", *scope, *arguments], timeout_s=_SYSTEMCTL_DEADLINE_S)
    except (CommandError, DeadlineError) as error:
        raise BerthError(f"systemd did not do '{' '.join(arguments)}': {error.message}") from error
