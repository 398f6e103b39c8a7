"""The book of addresses: stable, unique, whole."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import BerthError, ExistsError, NotFoundError, StateFormatError
from berth.layout import Layout
from berth.names import MachineName
from berth.net import addresses
from berth.net.addresses import Address, allocate, lookup, plan_address, plan_interface, release, rename, sweep
from berth.net.subnet import Subnet, choose_subnet

DEV, WEB, DB = MachineName("dev"), MachineName("web"), MachineName("db")
IPS = [*Subnet.parse("10.209.0.0/22").machines()]


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A layout on a host with no routes, of the user 1000, whose machines live in 10.209.224.0/22."""

    def choose(_owner: str, taken: Iterable[Subnet]) -> Subnet:
        first = Subnet.parse("10.209.224.0/22")
        return first if first not in list(taken) else choose_subnet("", taken)

    def no_routes(_bridge: str) -> list[Subnet]:
        return []

    monkeypatch.setattr(addresses, "host_routes", no_routes)
    monkeypatch.setattr(addresses, "choose_subnet", choose)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    return Layout(tmp_path / "data", tmp_path / "run", tmp_path / "config", tmp_path / "cache")


def test_all_of_an_address() -> None:
    address = plan_address("10.209.225.7", Subnet.parse("10.209.224.0/22"), 1000)
    assert address == Address(
        ip="10.209.225.7", prefix=22, gateway="10.209.224.1", mac="02:be:0a:d1:e1:07", interface="bth02b478-107",
        loopback="127.168.225.7",
    )  # fmt: skip


@given(st.sampled_from(IPS), st.sampled_from(IPS))
def test_interfaces_are_short_and_as_unique_as_addresses(one: str, other: str) -> None:
    assert len(plan_interface(one)) <= 15
    assert (plan_interface(one) == plan_interface(other)) == (one == other)
    # What the guard's rules match by: no port of another subnet begins so.
    assert plan_interface(one).startswith(addresses.port_prefix(Subnet.parse("10.209.0.0/22").base))
    assert not plan_interface("10.209.4.2").startswith(addresses.port_prefix(Subnet.parse("10.209.0.0/22").base))


def test_address_survives_json() -> None:
    address = plan_address("10.209.0.2", Subnet.parse("10.209.0.0/22"), 0)
    assert Address.from_json(json.loads(json.dumps(address.to_json())), where="here") == address
    with pytest.raises(StateFormatError, match="here is damaged"):
        Address.from_json({**address.to_json(), "prefix": "22"}, where="here")


def test_each_machine_has_its_own_for_life(book: Layout) -> None:
    dev, web = allocate(book, DEV), allocate(book, WEB)
    assert (dev.ip, web.ip) == ("10.209.224.2", "10.209.224.3")
    assert allocate(book, DEV) == lookup(book, DEV) == dev
    release(book, DEV)
    release(book, DEV)  # once more is fine
    assert allocate(book, WEB) == web
    with pytest.raises(NotFoundError, match="machine 'dev' has no address"):
        lookup(book, DEV)
    assert allocate(book, DB) == dev


def test_rename_keeps_the_address(book: Layout) -> None:
    dev = allocate(book, DEV)
    assert rename(book, DEV, WEB) == dev == lookup(book, WEB)
    allocate(book, DB)
    with pytest.raises(ExistsError, match="'db' already has"):
        rename(book, WEB, DB)
    with pytest.raises(NotFoundError):
        rename(book, DEV, DB)
    assert rename(book, WEB, WEB) == dev


def test_subnet_stays_while_somebody_lives_in_it(book: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    dev = allocate(book, DEV)
    taken = [Subnet.parse("10.209.224.0/22")]
    monkeypatch.setattr(addresses, "host_routes", lambda _bridge: taken)
    assert allocate(book, WEB).ip == "10.209.224.3"
    release(book, DEV)
    release(book, WEB)
    assert allocate(book, DEV).ip != dev.ip
    assert addresses.subnet(book) == choose_subnet("", taken)


def test_twenty_at_once_get_twenty_addresses(book: Layout) -> None:
    names = [MachineName(f"m{number}") for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda name: allocate(book, name), names))
    assert len({address.ip for address in found}) == 20
    assert [lookup(book, name) for name in names] == found


def test_two_data_directories_begin_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No route tells of the other's subnet while none of its machines runs."""

    def no_routes(_bridge: str) -> list[Subnet]:
        return []

    monkeypatch.setattr(addresses, "host_routes", no_routes)
    one, other = (Layout(Path(data), tmp_path, tmp_path, tmp_path) for data in ("/tmp/one", "/tmp/two"))
    assert addresses._choose_subnet(one) != addresses._choose_subnet(other)


def test_full_subnet_says_so(book: Layout) -> None:
    subnet = addresses.subnet(book)
    machines = {f"m{number}": ip for number, ip in enumerate(subnet.machines())}
    book.addresses.write_text(json.dumps({"schema": 1, "subnet": str(subnet), "machines": machines}))
    with pytest.raises(BerthError, match=r"all addresses of 10\.209\.224\.0/22 are in use"):
        allocate(book, DEV)


@pytest.mark.parametrize(
    "document",
    [
        {"schema": 1, "subnet": "10.209.0.0/22"},
        {"schema": 1, "subnet": "10.209.0.0/22", "machines": []},
        {"schema": 1, "subnet": "ten", "machines": {}},
        {"schema": 1, "subnet": "10.209.0.0/16", "machines": {}},
        {"schema": 1, "subnet": "10.209.0.0/22", "machines": {"dev": "10.210.0.2"}},
        {"schema": 1, "subnet": "10.209.0.0/22", "machines": {"dev": 7}},
        {"schema": 1, "subnet": "10.209.0.0/22", "machines": {"dev": "10.209.0.2", "web": "10.209.0.2"}},
    ],
)
def test_damaged_book_is_refused_and_kept(book: Layout, document: object) -> None:
    book.data.mkdir()
    text = json.dumps(document)
    book.addresses.write_text(text)
    with pytest.raises(StateFormatError, match=r"addresses\.json is damaged"):
        allocate(book, DEV)
    assert book.addresses.read_text() == text


def test_book_of_a_newer_berth_is_refused(book: Layout) -> None:
    book.data.mkdir()
    book.addresses.write_text('{"schema": 2}')
    with pytest.raises(StateFormatError, match="newer berth"):
        allocate(book, DEV)


def test_bridge_is_named_after_an_unusual_place(book: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert addresses.bridge_name(book) == "berth0"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert addresses.bridge_name(dataclasses.replace(book, data=Path("/var/lib/berth"))) == "berth0"
    elsewhere = addresses.bridge_name(dataclasses.replace(book, data=Path("/tmp/x")))
    assert elsewhere.startswith("berth-")
    assert len(elsewhere) <= 15
    assert elsewhere != addresses.bridge_name(dataclasses.replace(book, data=Path("/tmp/y")))


def test_the_address_of_a_machine_that_never_came_to_be_is_free_again(book: Layout) -> None:
    (book.machines / "dev").mkdir(parents=True)
    (book.machines / "web.partial-0123abcd").mkdir()  # being made now
    kept = [allocate(book, name) for name in (DEV, WEB)]
    lost = allocate(book, DB)
    sweep(book)
    assert [lookup(book, name) for name in (DEV, WEB)] == kept
    with pytest.raises(NotFoundError):
        lookup(book, DB)
    assert allocate(book, MachineName("other")) == lost


def test_the_first_address_makes_a_folder_of_its_owners_alone(layout: Layout) -> None:
    sweep(layout)
    assert stat.S_IMODE(layout.data.stat().st_mode) == 0o700
