"""Credentials, challenges and tokens: docker's and podman's files, helpers, a token server in this process."""

from __future__ import annotations

import base64
import json
import stat
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import InvalidArgumentError, RegistryError, StateFormatError
from berth.images import Images
from berth.layout import Layout
from berth.oci.registry import transport
from berth.oci.registry.auth import Challenge, parse_challenges
from berth.oci.registry.authfile import Credentials, find_credentials, remove_credentials, save_credentials
from berth.oci.registry.hosts import load_registries, parse_host
from berth.oci.registry.login import login, logout
from registries import Exchange, FakeRegistry, clear_environment


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    clear_environment(monkeypatch.delenv, monkeypatch.setenv, tmp_path / "home")
    monkeypatch.setattr(transport, "_BACK_OFF_S", 0.01)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(Layout(*(tmp_path / name for name in ("data", "run", "config", "cache"))))


def pair(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


# Files


@pytest.mark.parametrize(
    ("key", "registry"),
    [
        ("host:5000", "host:5000"),
        ("https://host:5000/v1/", "host:5000"),
        ("https://host:5000/v2/", "host:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("HOST", "host"),
    ],
)
def test_keys_as_docker_and_podman_write_them(home: Path, key: str, registry: str) -> None:
    write(home / ".docker/config.json", {"auths": {key: {"auth": pair("u", "p:w")}}})
    assert find_credentials(registry, "team/dev") == Credentials("u", "p:w")
    assert find_credentials("other") is None


def test_the_most_special_entry_counts(home: Path) -> None:
    auths = {"h": "a", "h/team": "b", "h/team/dev": "c"}
    write(
        home / ".config/containers/auth.json",
        {"auths": {key: {"auth": pair(user, "")} for key, user in auths.items()}},
    )
    found = [find_credentials("h", name) for name in ("x", "team", "team/x", "team/dev", "team/dev/x", "teams")]
    assert [item.username if item else "" for item in found] == ["a", "b", "b", "c", "c", "a"]


def test_which_file_counts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        home / ".docker/config.json",
        home / ".config/containers/auth.json",
        home / "run/containers/auth.json",
        home / "own/config.json",
        home / "named",
    ]
    for number, path in enumerate(files):
        write(path, {"auths": {"h": {"auth": pair(str(number), "x")}, f"only{number}": {"auth": pair("o", "")}}})

    def user() -> str:
        found = find_credentials("h")
        return found.username if found else ""

    assert user() == "2"
    assert find_credentials("only0")
    assert find_credentials("only1")
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "own"))
    assert user() == "3"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / "named"))
    assert user() == "4"
    assert find_credentials("only0") is None
    save_credentials("h", Credentials("new", "p"))
    assert user() == "new"


def test_saving_keeps_what_is_there_and_is_private(home: Path) -> None:
    path = write(home / ".docker/config.json", {"auths": {"a": {"auth": "eDp5"}}, "psFormat": "x", "HttpHeaders": {}})
    path.chmod(0o644)
    assert save_credentials("docker.io", Credentials("u", "pässword")) == str(path)
    document = json.loads(path.read_text())
    assert list(document["auths"]) == ["a", "https://index.docker.io/v1/"]
    assert document["psFormat"] == "x"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert find_credentials("docker.io") == Credentials("u", "pässword")
    assert remove_credentials("docker.io") == [str(path)]
    assert list(json.loads(path.read_text())["auths"]) == ["a"]
    assert remove_credentials("docker.io") == []
    assert [item.name for item in path.parent.iterdir()] == ["config.json"]


def test_where_credentials_are_saved(home: Path) -> None:
    assert save_credentials("h", Credentials("u", "p")) == str(home / ".docker/config.json")
    assert stat.S_IMODE((home / ".docker").stat().st_mode) == 0o700
    podman = write(home / ".config/containers/auth.json", {})
    assert save_credentials("h", Credentials("u", "q")) == str(podman)
    assert find_credentials("h") == Credentials("u", "q")
    assert len(remove_credentials("h")) == 2


def test_a_link_stays_a_link(home: Path) -> None:
    real = write(home / "dotfiles/docker.json", {})
    (home / ".docker").mkdir()
    (home / ".docker/config.json").symlink_to(real)
    save_credentials("h", Credentials("u", "p"))
    assert (home / ".docker/config.json").is_symlink()
    assert "auths" in json.loads(real.read_text())


@pytest.mark.parametrize("text", ["", "no json s3cret", "[]", '{"auths": {"h": {"auth": "s3cret!"}}}'])
def test_damaged_files_are_told_without_what_is_in_them(home: Path, text: str) -> None:
    write(home / ".docker/config.json", {}).write_text(text)
    with pytest.raises(StateFormatError) as caught:
        find_credentials("h")
    assert "config.json" in caught.value.message
    assert "s3cret" not in caught.value.message
    assert "s3cret" not in repr(Credentials("u", "s3cret", "s3cret"))


HELPER = """#!/bin/sh
read -r line
case $1 in
get) [ -f "$HOME/kept" ] && [ "$(cat "$HOME/kept.url")" = "$line" ] && cat "$HOME/kept" && exit 0
     echo "credentials not found in native keychain"; exit 1 ;;
store) printf '%s' "$line" > "$HOME/kept"; printf 'h' > "$HOME/kept.url" ;;
erase) rm "$HOME/kept" ;;
esac
"""


@pytest.mark.parametrize("setting", [{"credsStore": "test"}, {"credHelpers": {"h": "test"}}])
def test_credential_helpers(home: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, object]) -> None:
    path = write(home / ".docker/config.json", setting)
    (home / "bin").mkdir()
    helper = home / "bin/docker-credential-test"
    helper.write_text(HELPER)
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}/bin:/usr/bin:/bin")
    assert find_credentials("h") is None
    assert save_credentials("h", Credentials("u", "s3cret")) == "credential helper test"
    assert "s3cret" not in path.read_text()
    assert find_credentials("h") == Credentials("u", "s3cret")
    (home / "kept").write_text(json.dumps({"ServerURL": "h", "Username": "<token>", "Secret": "t"}))
    assert find_credentials("h") == Credentials("", "", "t")
    assert remove_credentials("h") == ["credential helper test"]
    assert find_credentials("h") is None
    helper.write_text("#!/bin/sh\necho 'it is locked' >&2; exit 1")
    with pytest.raises(RegistryError, match="credential helper test failed: it is locked"):
        find_credentials("h")
    helper.unlink()
    with pytest.raises(RegistryError, match="docker-credential-test is not installed"):
        find_credentials("h")


# Challenges


@pytest.mark.parametrize(
    ("headers", "challenges"),
    [
        (['Basic realm="a, b"'], [("basic", {"realm": "a, b"})]),
        (
            ['Bearer realm="https://t/x",service="s",scope="repository:a/b:pull,push"'],
            [("bearer", {"realm": "https://t/x", "service": "s", "scope": "repository:a/b:pull,push"})],
        ),
        (["Negotiate, BASIC realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (["Negotiate", 'Basic realm="\\"q\\""'], [("negotiate", {}), ("basic", {"realm": '"q"'})]),
        (['realm="x"', "", '"'], []),
    ],
)
def test_challenges(headers: list[str], challenges: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(headers) == [Challenge(*challenge) for challenge in challenges]


@given(st.text())
def test_any_challenge_is_read_to_its_end(header: str) -> None:
    parse_challenges([header])


# Tokens


class TokenServer:
    """Have a FakeRegistry want tokens, which it gives itself. uses: how often each is good."""

    def __init__(self, registry: FakeRegistry, *, user: str = "", uses: int = 1000) -> None:
        self.registry = registry
        self.given: list[dict[str, list[str]]] = []
        self._user = user
        self._uses = uses
        registry.behaviours.append(self)

    def __call__(self, exchange: Exchange) -> bool:
        parts = urllib.parse.urlsplit(exchange.path)
        if parts.path == "/token":
            return self._give(exchange, parts.query)
        used = exchange.headers.get("Authorization", "")
        number = int(used.removeprefix("Bearer t") or -1) if used.startswith("Bearer t") else -1
        uses = sum(seen.authorization == used for seen in self.registry.seen)
        if number == len(self.given) - 1 >= 0 and uses <= self._uses:
            return False
        realm = f"http://{self.registry.host}/token"
        return exchange.answer(401, www_authenticate=f'Bearer realm="{realm}",service="tests"')

    def _give(self, exchange: Exchange, query: str) -> bool:
        form = urllib.parse.parse_qs(exchange.body().decode() if exchange.command == "POST" else query)
        wanted = f"Basic {pair(self._user, 's3cret')}" if self._user else ""
        if exchange.command != "POST" and exchange.headers.get("Authorization", "") != wanted:
            return exchange.answer(401)
        self.given.append(form)
        return exchange.answer(200, json.dumps({"token": f"t{len(self.given) - 1}"}).encode())


def test_anonymous_tokens(registry: FakeRegistry, images: Images) -> None:
    server = TokenServer(registry)
    registry.put_image("team/dev:1", b"1", b"2", b"3")
    images.ensure(f"{registry.host}/team/dev:1")
    assert server.given == [{"service": ["tests"], "scope": ["repository:team/dev:pull"]}]


def test_tokens_for_a_user_and_when_they_expire(
    registry: FakeRegistry, images: Images, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/registries.toml").write_text("parallel-layers = 1\n")
    server = TokenServer(registry, user="u", uses=2)
    write(home / ".docker/config.json", {"auths": {registry.host: {"auth": pair("u", "s3cret")}}})
    registry.put_image("dev:1", *(bytes([number]) for number in range(5)))
    images.ensure(f"{registry.host}/dev:1")
    assert len(server.given) >= 3
    assert server.given[0]["account"] == ["u"]


def test_identity_tokens(registry: FakeRegistry, images: Images, home: Path) -> None:
    server = TokenServer(registry)
    entry = {"auth": pair("u", ""), "identitytoken": "refresh"}
    write(home / ".docker/config.json", {"auths": {registry.host: entry}})
    registry.put_image("dev:1", b"1")
    images.ensure(f"{registry.host}/dev:1")
    assert server.given[0]["grant_type"] == ["refresh_token"]
    assert server.given[0]["refresh_token"] == ["refresh"]


def test_a_wrong_password(registry: FakeRegistry, images: Images, home: Path) -> None:
    TokenServer(registry, user="u")
    write(home / ".docker/config.json", {"auths": {registry.host: {"auth": pair("u", "wrong")}}})
    with pytest.raises(RegistryError, match="denies access: the user name or the password is wrong") as caught:
        images.ensure(f"{registry.host}/dev:1")
    assert caught.value.hint == f"berth login {registry.host}"


@pytest.mark.parametrize(
    "challenge",
    [
        "Bearer", 'Bearer realm=""', 'Bearer realm="ftp://x/"', 'Bearer realm="http://127.0.0.1:1/"', "Digest realm=x",
        "Basic realm=x", "",
    ],
)  # fmt: skip
def test_challenges_that_lead_nowhere(registry: FakeRegistry, images: Images, challenge: str) -> None:
    registry.behaviours.append(lambda exchange: exchange.answer(401, www_authenticate=challenge))
    with pytest.raises(RegistryError):
        images.ensure(f"{registry.host}/dev:1")


@pytest.mark.parametrize(
    "token", [b"", b"[]", b'{"token": ""}', b'{"token": "a\\r\\nX-Evil: 1"}', b'{"token": 7}', b" " * 2_000_000]
)
def test_token_servers_that_give_none(registry: FakeRegistry, images: Images, token: bytes) -> None:
    realm = f"http://{registry.host}/token"
    registry.behaviours.append(
        lambda exchange: (
            exchange.answer(200, token)
            if exchange.path.startswith("/token")
            else exchange.answer(401, www_authenticate=f'Bearer realm="{realm}"')
        )
    )
    with pytest.raises(RegistryError, match=r"gave no token|document of"):
        images.ensure(f"{registry.host}/dev:1")


# Login


def test_login_checks_before_it_keeps(registry: FakeRegistry, tmp_path: Path) -> None:
    good = f"Basic {pair('u', 'p')}"
    registry.behaviours.append(
        lambda exchange: (
            exchange.headers.get("Authorization") != good and exchange.answer(401, www_authenticate='Basic realm="x"')
        )
    )
    with pytest.raises(RegistryError, match="denies access"):
        login(registry.host, "u", "wrong", registries=tmp_path / "none")
    assert find_credentials(registry.host) is None
    place = login(f"http://{registry.host}/", "u", "p", registries=tmp_path / "none")
    assert logout(registry.host) == [place]
    assert logout(registry.host) == []


@pytest.mark.parametrize("text", ["", "a b", "host/path", "http://", "-x", "host:port"])
def test_hosts_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="invalid registry"):
        parse_host(text)


# registries.toml


def test_endpoints(tmp_path: Path) -> None:
    path = tmp_path / "registries.toml"
    path.write_text(
        'parallel-layers = 5\n[registry."docker.io"]\nmirrors = ["m:5000/hub", "n"]\n'
        '[registry."m:5000"]\ninsecure = true\n[registry."own"]\nca = "~/ca.pem"\n'
    )
    found = load_registries(path)
    assert found.parallel_layers == 5
    first, second, origin = found.endpoints("docker.io")
    assert (first.name, first.prefix, first.insecure, first.host, first.port) == ("m:5000", "hub/", True, "m", 5000)
    assert (second.name, second.insecure, second.plain) == ("n", False, False)
    assert (origin.name, origin.address) == ("docker.io", "registry-1.docker.io")
    assert found.endpoints("index.docker.io") == found.endpoints("docker.io")
    assert found.origin("own").authorities == (Path("~/ca.pem").expanduser(),)
    assert found.origin("localhost:5000").plain
    assert found.origin("[::1]:5000").plain
    assert (found.origin("[::1]:5000").host, found.origin("[::1]:5000").port) == ("::1", 5000)
    assert load_registries(tmp_path / "none").parallel_layers == 3


@pytest.mark.parametrize(
    "text",
    [
        "x", "unknown = 1", "parallel-layers = 0", 'parallel-layers = "3"', "registry = 1", "[registry.h]\nx = 1",
        "[registry.h]\nmirrors = 1", '[registry.h]\nmirrors = ["https://x"]', '[registry.h]\nmirrors = ["a b"]',
        '[registry.h]\ninsecure = "yes"', "[registry.h]\nca = 1", '[registry."a b"]', "[registry]\nh = 1", "\udc80",
    ],
)  # fmt: skip
def test_settings_that_are_wrong(tmp_path: Path, text: str) -> None:
    path = tmp_path / "registries.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StateFormatError, match=r"registries\.toml: "):
        load_registries(path)
