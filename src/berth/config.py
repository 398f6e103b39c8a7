"""What a machine is (`MachineConfig`, written once) and how it boots (`BootConfig`, settable).

Owns both documents, their validation, and the one table of settable keys that serves the flags of `create`,
`set KEY=VALUE` and the help. Layer 2: `bundle` loads and saves them; lifecycle, the engines and `cli` read them.
"""

from __future__ import annotations

import dataclasses
import grp
import os
import pwd
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

from berth.errors import BerthError, InvalidArgumentError, NotFoundError, StateFormatError
from berth.names import MachineName, parse_bundle_name
from berth.units import GIB, MIB, format_size, parse_size

HomeMount = Literal["rw", "ro", "none"]
Isolation = Literal["container", "vm"]
When = Literal["now", "restart"]

HOME_MOUNTS: tuple[HomeMount, ...] = ("rw", "ro", "none")
ISOLATIONS: tuple[Isolation, ...] = ("container", "vm")
MIN_MEMORY = 16 * MIB
MIN_VM_MEMORY = 128 * MIB  # a kernel, its page tables and an init
MIN_DISK = 64 * MIB
MAX_CPUS = 1024
MAX_MEMORY = 64 * 1024 * GIB

_INIT = ("/sbin/init",)
_ID = re.compile(r"[0-9a-f]{32}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z")
_PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9]+)?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ENV_KEY = re.compile(r"[^=\0\s]+")
# What a mount may not hide: the guest's own plumbing. `/run` and `/tmp` themselves, but not folders below `/tmp`.
_SYSTEM = ("/proc", "/sys", "/dev", "/run")
_WHOLE = ("/", "/bin", "/boot", "/etc", "/lib", "/lib64", "/root", "/sbin", "/tmp", "/usr", "/var")  # noqa: S108

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class HostUser:
    """The person on the host whose twin the machine has. home, shell: absolute paths on the host."""

    name: str
    uid: int
    gid: int
    group: str
    home: str
    shell: str

    @classmethod
    def current(cls) -> HostUser:
        """Read who runs this process from the host's own user database.

        A user or group that it does not know (a bare uid in a container) gets a name made of its number.
        """
        uid, gid = os.getuid(), os.getgid()
        home = os.environ.get("HOME", "")
        name, shell = f"user{uid}", os.environ.get("SHELL") or "/bin/sh"
        try:
            entry = pwd.getpwuid(uid)
            name, home, shell = entry.pw_name, entry.pw_dir, entry.pw_shell or "/bin/sh"
        except KeyError:
            pass
        try:
            group = grp.getgrgid(gid).gr_name
        except KeyError:
            group = name
        return cls(name, uid, gid, group, os.path.normpath(home) if home.startswith("/") else f"/home/{name}", shell)

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name, "uid": self.uid, "gid": self.gid,
            "group": self.group, "home": self.home, "shell": self.shell,
        }  # fmt: skip

    @classmethod
    def from_json(cls, doc: object, *, where: str) -> HostUser:
        reader = _Reader(doc, where)
        return cls(
            name=reader.text("name"), uid=reader.integer("uid", 0), gid=reader.integer("gid", 0),
            group=reader.text("group"), home=reader.path("home"), shell=reader.path("shell"),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class MachineConfig:
    """A machine's identity: written by `create`, never changed.

    id: 32 hex digits, the boot document's `instance`. image_digest: of the manifest. platform: ``linux/amd64``.
    created: RFC 3339, UTC. init: the argv of the image's init; none makes berth's agent the init.
    """

    name: MachineName
    id: str
    image_reference: str
    image_digest: str
    platform: str
    isolation: Isolation
    created: str
    user: HostUser
    init: tuple[str, ...] = _INIT

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "id": self.id,
            "image": {"reference": self.image_reference, "digest": self.image_digest},
            "platform": self.platform,
            "isolation": self.isolation,
            "created": self.created,
            "user": self.user.to_json(),
            "init": list(self.init),
        }

    @classmethod
    def from_json(cls, doc: object, *, where: str) -> MachineConfig:
        """Check `doc`, the parsed JSON found at `where`. Raises StateFormatError, which names file and member."""
        reader = _Reader(doc, where)
        image = _Reader(reader.member("image"), f"{where}: image")
        return cls(
            name=MachineName(reader.checked("name", parse_bundle_name)),
            id=reader.matching("id", _ID),
            image_reference=image.text("reference"),
            image_digest=image.matching("digest", _DIGEST),
            platform=reader.matching("platform", _PLATFORM),
            isolation=reader.choice("isolation", ISOLATIONS),
            created=reader.matching("created", _TIME),
            user=HostUser.from_json(reader.member("user"), where=f"{where}: user"),
            init=reader.texts("init", str) if reader.has("init") else _INIT,  # machines of berth 0.1 have none there
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Mount:
    """A folder (or file) of the host that the machine sees. Both paths absolute and normal."""

    source: str
    destination: str
    read_only: bool = False

    def __str__(self) -> str:
        """Print it as `parse_mount` reads it."""
        middle = "" if self.destination == self.source else f":{self.destination}"
        return f"{self.source}{middle}{':ro' if self.read_only else ''}"

    def to_json(self) -> dict[str, object]:
        return {"source": self.source, "destination": self.destination, "readOnly": self.read_only}

    @classmethod
    def from_json(cls, doc: object, *, where: str) -> Mount:
        reader = _Reader(doc, where)
        destination = reader.checked("destination", check_mount_destination)
        return cls(reader.path("source"), destination, read_only=reader.flag("readOnly"))


@dataclasses.dataclass(frozen=True, slots=True)
class BootConfig:
    """What `set` changes. memory, disk: bytes; None in cpus, memory and disk: no limit of the machine's own.

    expose: credential paths that are not hidden, absolute or relative to the home. env: ``K=V``, one per K.
    kernel: an absolute path on the host (vm only).
    """

    cpus: int | None = None
    memory: int | None = None
    disk: int | None = None
    home_mount: HomeMount = "rw"
    mounts: tuple[Mount, ...] = ()
    expose: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    kernel: str | None = None
    virtualization: bool = False
    autostart: bool = False
    ssh_agent: bool = True

    def to_json(self) -> dict[str, object]:
        return {
            "cpus": self.cpus,
            "memory": self.memory,
            "disk": self.disk,
            "homeMount": self.home_mount,
            "mounts": [mount.to_json() for mount in self.mounts],
            "expose": list(self.expose),
            "env": list(self.env),
            "kernel": self.kernel,
            "virtualization": self.virtualization,
            "autostart": self.autostart,
            "sshAgent": self.ssh_agent,
        }

    @classmethod
    def from_json(cls, doc: object, *, where: str) -> BootConfig:
        """Check `doc`, the parsed JSON found at `where`. Raises StateFormatError, which names file and member."""
        reader = _Reader(doc, where)
        return cls(
            cpus=reader.optional_integer("cpus", 1, MAX_CPUS),
            memory=reader.optional_integer("memory", MIN_MEMORY, MAX_MEMORY),
            disk=reader.optional_integer("disk", MIN_DISK),
            home_mount=reader.choice("homeMount", HOME_MOUNTS),
            mounts=tuple(Mount.from_json(item, where=at) for item, at in reader.items("mounts")),
            expose=reader.texts("expose", check_expose),
            env=reader.texts("env", check_env),
            kernel=None if reader.member("kernel") is None else reader.path("kernel"),
            virtualization=reader.flag("virtualization"),
            autostart=reader.flag("autostart"),
            ssh_agent=reader.flag("sshAgent"),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One key that `apply_assignments` changed, and when that takes effect."""

    key: str
    when: When


# What people give ------------------------------------------------------------------------------------------------


def parse_cpus(text: str) -> int:
    """Read a number of CPUs, 1 or more."""
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
    if not 1 <= count <= MAX_CPUS:
        raise InvalidArgumentError(f"invalid number of CPUs '{text}'", hint=f"give a whole number, 1 to {MAX_CPUS}")
    return count


def parse_memory(text: str) -> int:
    return _parse_bounded_size(text, "memory size", MIN_MEMORY, MAX_MEMORY)


def parse_disk(text: str) -> int:
    return _parse_bounded_size(text, "disk size", MIN_DISK, 2**63 - 1)


def _parse_bounded_size(text: str, what: str, low: int, high: int) -> int:
    size = parse_size(text, what=what)
    if not low <= size <= high:
        hint = f"give at least {format_size(low)}" if size < low else f"give at most {format_size(high)}"
        raise InvalidArgumentError(f"invalid {what} '{text}'", hint=hint)
    return size


def parse_home_mount(text: str) -> HomeMount:
    for choice in HOME_MOUNTS:
        if text == choice:
            return choice
    raise InvalidArgumentError(f"invalid home mount '{text}'", hint="give rw, ro or none")


def parse_boolean(text: str) -> bool:
    """Read true/false as people write them: true, yes, on, 1 and their opposites."""
    word = text.lower()
    if word not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise InvalidArgumentError(f"invalid switch '{text}'", hint="give true or false")
    return word in ("true", "yes", "on", "1")


def parse_mount(text: str) -> Mount:
    """Read ``SRC[:DST][:ro|:rw]``: SRC must exist (relative to the working directory, ``~`` is the home)."""
    fields = text.split(":")
    read_only = False
    if len(fields) > 1 and fields[-1] in ("ro", "rw"):
        read_only = fields.pop() == "ro"
    if not 1 <= len(fields) <= 2 or not fields[0]:
        raise InvalidArgumentError(f"invalid mount '{text}'", hint="write it as SRC[:DST][:ro]")
    source = os.path.abspath(os.path.expanduser(fields[0]))
    if "\0" in source or not os.path.exists(source):
        raise InvalidArgumentError(f"invalid mount '{text}': {source} does not exist", hint=f"mkdir -p {source}")
    return Mount(source, check_mount_destination(fields[1] if len(fields) == 2 else source), read_only)


def check_mount_destination(path: str) -> str:
    """Return `path` in normal form if a machine can have something mounted there."""
    normal = _normal(path)
    if normal is None:
        raise InvalidArgumentError(
            f"invalid mount destination '{path}'", hint="it must be an absolute path without '..' in it"
        )
    if normal in _WHOLE or any(normal == root or normal.startswith(root + "/") for root in _SYSTEM):
        raise InvalidArgumentError(
            f"invalid mount destination '{path}': the machine needs that place itself", hint="give another as SRC:DST"
        )
    return normal


def check_expose(path: str) -> str:
    """Return a path to expose in normal form: absolute, or relative to the home and inside it."""
    path = path.removeprefix("~/")
    normal = _normal(path if path.startswith("/") else f"/{path}")
    if normal is None or normal == "/":
        raise InvalidArgumentError(
            f"invalid path to expose '{path}'", hint="give a path below the home, for example .ssh"
        )
    return normal if path.startswith("/") else normal[1:]


def check_env(text: str) -> str:
    """Check ``K=V``."""
    key, equals, value = text.partition("=")
    if not equals or not _ENV_KEY.fullmatch(key) or "\0" in value:
        raise InvalidArgumentError(f"invalid environment variable '{text}'", hint="write it as KEY=VALUE")
    return text


def parse_env(text: str) -> str:
    """Read ``K=V``, or ``K`` alone, which copies the value from this process's environment."""
    if text and "=" not in text:
        if text not in os.environ:
            raise InvalidArgumentError(f"invalid environment variable '{text}': it is not set here")
        text = f"{text}={os.environ[text]}"
    return check_env(text)


def parse_kernel(text: str) -> str:
    path = os.path.abspath(os.path.expanduser(text))
    if not os.path.isfile(path):
        raise InvalidArgumentError(
            f"invalid kernel '{text}': {path} is not a file",
            hint="give the path of a bzImage, a vmlinux or an Image; without any berth fetches a kernel",
        )
    return path


def parse_platform(text: str) -> str:
    """Read ``os/arch``; a bare architecture means linux."""
    names = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64"}
    system, slash, arch = text.lower().partition("/")
    if not slash:
        system, arch = "linux", system
    platform = f"{system}/{names.get(arch, arch)}"
    if not _PLATFORM.fullmatch(platform):
        raise InvalidArgumentError(f"invalid platform '{text}'", hint="write it as linux/amd64 or linux/arm64")
    return platform


def _normal(path: str) -> str | None:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        return None
    return "/" + os.path.normpath(path).lstrip("/")


# The settable keys ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """One settable key. field: of BootConfig. operators: what may follow the key in an assignment.

    apply: (config, operator, value) -> config; raises InvalidArgumentError. flag: the option of `create`
    (None: `create` has no such option); boolean flags take no value there.
    """

    name: str
    field: str
    metavar: str
    help: str
    when: When
    apply: Callable[[BootConfig, str, str], BootConfig]
    operators: tuple[str, ...] = ("=",)
    flag: str | None = None
    boolean: bool = False


def _with(boot: BootConfig, field: str, value: object) -> BootConfig:
    # The table pairs each field with the parser of its type; the type checkers can't follow a name in a string.
    return dataclasses.replace(boot, **cast("dict[str, Any]", {field: value}))


def _scalar(field: str, parse: Callable[[str], object], *, empty: bool = False) -> Callable[..., BootConfig]:
    def apply(boot: BootConfig, _operator: str, value: str) -> BootConfig:
        new = None if empty and not value else parse(value)
        return _with(boot, field, new)

    return apply


def _apply_disk(boot: BootConfig, _operator: str, value: str) -> BootConfig:
    size = parse_disk(value)
    if boot.disk is not None and size < boot.disk:
        raise InvalidArgumentError(
            f"invalid disk size '{value}': a disk can only grow, it has {format_size(boot.disk)}"
        )
    return dataclasses.replace(boot, disk=size)


def _listed(
    field: str, parse: Callable[[str], T], identity: Callable[[T], object], matches: Callable[[T, str], bool]
) -> Callable[..., BootConfig]:
    """Make the `apply` of a list: ``+=`` and ``=`` add (an item of the same identity is replaced in place),
    ``-=`` takes away, ``=`` with nothing empties it, as in a systemd unit."""

    def apply(boot: BootConfig, operator: str, value: str) -> BootConfig:
        items = cast("tuple[T, ...]", getattr(boot, field))
        if operator == "-=":
            kept = tuple(item for item in items if not matches(item, value))
            if len(kept) == len(items):
                raise NotFoundError(f"{field.rstrip('s')} '{value}' not found in the machine's configuration")
        elif operator == "=" and not value:
            kept = ()
        else:
            new = parse(value)
            same = [identity(item) == identity(new) for item in items]
            kept = tuple(new if is_same else item for item, is_same in zip(items, same, strict=True))
            kept = kept if any(same) else (*items, new)
        return _with(boot, field, kept)

    return apply


def _mount_matches(mount: Mount, text: str) -> bool:
    return text in (str(mount), mount.source, mount.destination, f"{mount.source}:{mount.destination}")


def _expose_matches(path: str, text: str) -> bool:
    return path == check_expose(text)


def _env_matches(item: str, text: str) -> bool:
    return text in (item, item.partition("=")[0])


def _env_key(item: str) -> str:
    return item.partition("=")[0]


def check_fits(isolation: Isolation, boot: BootConfig) -> None:
    """Refuse settings that a machine of this isolation can't have. Raises InvalidArgumentError."""
    if isolation == "vm" and boot.memory is not None and boot.memory < MIN_VM_MEMORY:
        raise InvalidArgumentError(
            f"invalid memory size '{format_size(boot.memory)}': a VM has a kernel of its own",
            hint=f"give at least {format_size(MIN_VM_MEMORY)}",
        )
    for key, given in (("kernel", boot.kernel is not None), ("virtualization", boot.virtualization)):
        if isolation == "container" and given:
            raise InvalidArgumentError(
                f"invalid setting '{key}': a container shares the host's kernel", hint="create it with --isolation vm"
            )


_LIST = ("=", "+=", "-=")

KEYS: tuple[Key, ...] = (
    Key("cpus", "cpus", "N", "how many CPUs it may use; empty: all", "restart",
        _scalar("cpus", parse_cpus, empty=True), flag="--cpus"),
    Key("memory", "memory", "SIZE", "how much memory it may use (512M, 8G); empty: all", "restart",
        _scalar("memory", parse_memory, empty=True), flag="--memory"),
    Key("disk", "disk", "SIZE", "how large its disk is; it can only grow", "restart", _apply_disk, flag="--disk"),
    Key("home-mount", "home_mount", "MODE", "your home in the machine: rw (shared), ro (read-only) or none", "restart",
        _scalar("home_mount", parse_home_mount), flag="--home-mount"),
    Key("mount", "mounts", "SRC[:DST][:ro]", "share another folder of this host", "restart",
        _listed("mounts", parse_mount, lambda mount: mount.destination, _mount_matches),
        operators=_LIST, flag="--mount"),
    Key("expose", "expose", "PATH", "let the machine see a path of your home that berth hides, as .ssh", "restart",
        _listed("expose", check_expose, str, _expose_matches), operators=_LIST, flag="--expose"),
    Key("env", "env", "K=V", "an environment variable for every command; K alone copies yours", "restart",
        _listed("env", parse_env, _env_key, _env_matches), operators=_LIST, flag="--env"),
    Key("kernel", "kernel", "PATH", "boot this kernel (isolation vm); empty: berth's choice", "restart",
        _scalar("kernel", parse_kernel, empty=True), flag="--kernel"),
    Key("virtualization", "virtualization", "BOOL", "let the machine run virtual machines itself", "restart",
        _scalar("virtualization", parse_boolean), flag="--virtualization", boolean=True),
    Key("autostart", "autostart", "BOOL", "start it by `berth system start` and, when enabled, with the login", "now",
        _scalar("autostart", parse_boolean)),
    Key("ssh-agent", "ssh_agent", "BOOL", "forward your SSH agent into the machine", "restart",
        _scalar("ssh_agent", parse_boolean)),
)  # fmt: skip

_BY_NAME: Mapping[str, Key] = {key.name: key for key in KEYS}
_ASSIGNMENT = re.compile(r"([A-Za-z][A-Za-z_-]*?)(\+=|-=|=)(.*)", re.DOTALL)


def apply_assignments(boot: BootConfig, assignments: Sequence[str]) -> tuple[BootConfig, list[Change]]:
    """Apply ``KEY=VALUE``, ``KEY+=VALUE``, ``KEY-=VALUE`` one after the other: all of them, or an error and none.

    Returns the new configuration and the keys whose value is another now, in the table's order.
    Raises InvalidArgumentError (unknown key, bad value), NotFoundError (``-=`` of what is not there).
    """
    new = boot
    for assignment in assignments:
        key, operator, value = _split_assignment(assignment)
        new = key.apply(new, operator, value)
    changed = [key for key in KEYS if getattr(new, key.field) != getattr(boot, key.field)]
    return new, [Change(key.name, key.when) for key in changed]


def _split_assignment(text: str) -> tuple[Key, str, str]:
    match = _ASSIGNMENT.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(f"invalid setting '{text}'", hint="write it as KEY=VALUE, for example cpus=4")
    name, operator, value = match.groups()
    key = _BY_NAME.get(name.lower().replace("_", "-"))
    if key is None:
        raise InvalidArgumentError(f"invalid setting '{name}': no such key", hint=f"the keys are {', '.join(_BY_NAME)}")
    if operator not in key.operators:
        raise InvalidArgumentError(
            f"invalid setting '{text}': {key.name} is no list", hint=f"write {key.name}={key.metavar}"
        )
    return key, operator, value


# Reading JSON -----------------------------------------------------------------------------------------------------


class _Reader:
    """Takes typed members out of a parsed JSON object; every error names the place and the member."""

    def __init__(self, doc: object, where: str) -> None:
        if not isinstance(doc, dict):
            raise StateFormatError(f"{where} is damaged: it is no JSON object")
        self._doc = cast("dict[str, object]", doc)
        self._where = where

    def damaged(self, member: str, why: str) -> StateFormatError:
        return StateFormatError(f"{self._where} is damaged: member '{member}' {why}")

    def has(self, name: str) -> bool:
        return name in self._doc

    def member(self, name: str) -> object:
        if name not in self._doc:
            raise self.damaged(name, "is missing")
        return self._doc[name]

    def text(self, name: str) -> str:
        value = self.member(name)
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.damaged(name, "is no text")
        return value

    def path(self, name: str) -> str:
        value = self.text(name)
        if not value.startswith("/"):
            raise self.damaged(name, "is no absolute path")
        return value

    def matching(self, name: str, pattern: re.Pattern[str]) -> str:
        value = self.text(name)
        if not pattern.fullmatch(value):
            raise self.damaged(name, f"is not valid: {value!r:.80}")
        return value

    def checked(self, name: str, check: Callable[[str], str]) -> str:
        return self._check(name, self.text(name), check)

    def _check(self, name: str, value: str, check: Callable[[str], str]) -> str:
        try:
            return check(value)
        except BerthError as error:
            raise self.damaged(name, f"is not valid: {error.message}") from error

    def choice(self, name: str, choices: Sequence[T]) -> T:
        value = self.member(name)
        for choice in choices:
            if value == choice:
                return choice
        raise self.damaged(name, f"is not one of {', '.join(map(str, choices))}")

    def flag(self, name: str) -> bool:
        value = self.member(name)
        if not isinstance(value, bool):
            raise self.damaged(name, "is neither true nor false")
        return value

    def integer(self, name: str, low: int, high: int = 2**63 - 1) -> int:
        value = self.member(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.damaged(name, f"is no whole number from {low} to {high}")
        return value

    def optional_integer(self, name: str, low: int, high: int = 2**63 - 1) -> int | None:
        return None if self.member(name) is None else self.integer(name, low, high)

    def items(self, name: str) -> list[tuple[object, str]]:
        """Return the elements of a list, each with the place to name in an error."""
        value = self.member(name)
        if not isinstance(value, list):
            raise self.damaged(name, "is no list")
        return [(item, f"{self._where}: {name}[{i}]") for i, item in enumerate(cast("list[object]", value))]

    def texts(self, name: str, check: Callable[[str], str]) -> tuple[str, ...]:
        values = [item for item, _ in self.items(name)]
        if not all(isinstance(value, str) for value in values):
            raise self.damaged(name, "is no list of texts")
        return tuple(self._check(name, value, check) for value in cast("list[str]", values))
