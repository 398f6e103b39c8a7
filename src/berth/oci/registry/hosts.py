"""Where a registry is reached and how far it is trusted: registries.toml, certs.d. Owns both; layer 2.

Sources: certificates: docker's and podman's certs.d. Loopback may be plain HTTP without being asked, as in docker.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from berth.errors import InvalidArgumentError, StateFormatError

_CERTIFICATES = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))
_NAMED = {"docker.io": "registry-1.docker.io"}  # the name in references is not the host that serves them
_ALIASES = {"index.docker.io": "docker.io", "registry-1.docker.io": "docker.io"}
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:]+\])(?::[0-9]{1,5})?")
_PREFIX = re.compile(r"(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*")
_PARALLEL_MAX = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """A place that serves a registry's images.

    name: what people call it, ``host[:port]``, for messages and credentials. address: what is connected to. prefix: put
    before every repository, ``""`` or ``proxy/``. insecure: certificates are not checked, and plain HTTP will do.
    authorities: files with certificates of further CAs.
    """

    name: str
    address: str
    prefix: str = ""
    insecure: bool = False
    authorities: tuple[Path, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether plain HTTP will do where TLS is not spoken."""
        return self.insecure or is_loopback(self.host)

    @property
    def host(self) -> str:
        return _split(self.address)[0]

    @property
    def port(self) -> int | None:
        return _split(self.address)[1]


@dataclasses.dataclass(frozen=True, slots=True)
class Registry:
    """What registries.toml says of one registry."""

    mirrors: tuple[str, ...] = ()
    insecure: bool = False
    ca: Path | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Registries:
    """registries.toml. parallel_layers: how many layers of an image are on their way at once."""

    parallel_layers: int = 3
    registries: Mapping[str, Registry] = dataclasses.field(default_factory=dict[str, Registry])

    def endpoints(self, name: str) -> list[Endpoint]:
        """Return where images of registry `name` are asked for: its mirrors, in order, and last the registry itself."""
        mirrors = self.registries.get(canonical(name), Registry()).mirrors
        return [*(self._mirror(mirror) for mirror in mirrors), self.origin(name)]

    def origin(self, name: str) -> Endpoint:
        """Return where registry `name` itself is: what is pushed goes there, and logins."""
        name = canonical(name)
        return self._endpoint(name, _NAMED.get(name, name), "")

    def _mirror(self, text: str) -> Endpoint:
        address, _, prefix = text.partition("/")
        return self._endpoint(address, _NAMED.get(address, address), f"{prefix}/" if prefix else "")

    def _endpoint(self, name: str, address: str, prefix: str) -> Endpoint:
        said = self.registries.get(name, Registry())
        found = [path for folder in _CERTIFICATES for path in sorted((folder / name).glob("*.crt"))]
        authorities = (*([said.ca] if said.ca else []), *found)
        return Endpoint(name, address, prefix, said.insecure, authorities)


def canonical(name: str) -> str:
    """Return the one name of a registry that has several."""
    name = name.lower()
    return _ALIASES.get(name, name)


def parse_host(text: str) -> str:
    """Read a registry as people give it to login: a host, maybe with a port. Raises InvalidArgumentError."""
    name = canonical(text.removeprefix("https://").removeprefix("http://").rstrip("/"))
    if not _HOST.fullmatch(name):
        raise InvalidArgumentError(f"invalid registry '{text}'", hint="write it as host or host:port")
    return name


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_registries(path: Path) -> Registries:
    """Read registries.toml; what it does not say, and no file, is the default. Raises StateFormatError."""
    try:
        document: dict[str, object] = tomllib.loads(path.read_text())
        return _parse(document)
    except FileNotFoundError:
        return Registries()
    except (OSError, ValueError) as error:
        raise StateFormatError(f"{path}: {error}", hint="docs/registries.md says how it is written") from error


def _parse(document: Mapping[str, object]) -> Registries:
    _refuse_unknown(document, ("parallel-layers", "registry"), "the file")
    parallel = document.get("parallel-layers", 3)
    if not isinstance(parallel, int) or not 1 <= parallel <= _PARALLEL_MAX:
        raise ValueError(f"parallel-layers is a number from 1 to {_PARALLEL_MAX}")
    tables = document.get("registry", {})
    if not isinstance(tables, dict):
        raise ValueError('registry is a table: write [registry."HOST"]')  # noqa: TRY004 (as the rest of what is wrong)
    found = {canonical(name): _parse_registry(name, table) for name, table in cast("dict[str, object]", tables).items()}
    return Registries(parallel, found)


def _parse_registry(name: str, table: object) -> Registry:
    if not _HOST.fullmatch(canonical(name)) or not isinstance(table, dict):
        raise ValueError(f'registry.{name} is no table of a registry: write [registry."HOST"]')
    members = cast("dict[str, object]", table)
    _refuse_unknown(members, ("mirrors", "insecure", "ca"), f'registry."{name}"')
    mirrors, insecure, ca = members.get("mirrors", []), members.get("insecure", False), members.get("ca")
    if not isinstance(mirrors, list) or not all(_is_mirror(item) for item in cast("list[object]", mirrors)):
        raise ValueError(f'registry."{name}": mirrors is a list of "HOST[:PORT][/PREFIX]"')
    if not isinstance(insecure, bool):
        raise ValueError(f'registry."{name}": insecure is true or false')  # noqa: TRY004 (likewise)
    if not (ca is None or (isinstance(ca, str) and ca)):
        raise ValueError(f'registry."{name}": ca is the path of a file')
    return Registry(tuple(cast("list[str]", mirrors)), insecure, Path(ca).expanduser() if ca else None)


def _is_mirror(item: object) -> bool:
    if not isinstance(item, str):
        return False
    host, slash, prefix = item.partition("/")
    return bool(_HOST.fullmatch(host) and _PREFIX.fullmatch(f"{slash}{prefix}") and not item.endswith("/"))


def _refuse_unknown(members: Mapping[str, object], known: Sequence[str], where: str) -> None:
    unknown = sorted(set(members) - set(known))
    if unknown:
        raise ValueError(f"{where} has the unknown key '{unknown[0]}'; there are {', '.join(known)}")


def _split(address: str) -> tuple[str, int | None]:
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        return address.strip("[]"), None
    return host.strip("[]"), int(port)
