"""The network's record, and processes known by more than their pid."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from berth.layout import Layout
from berth.names import MachineName
from berth.net import record
from berth.net.addresses import plan_address
from berth.net.processes import Process, end, find_programs, identify, network_namespace, send
from berth.net.record import Record
from berth.net.subnet import Subnet

ADDRESS = plan_address("10.209.0.2", Subnet.parse("10.209.0.0/22"), 0)
GONE = Process(2**22 + 1, 1)  # above the kernel's limit of pids


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout(tmp_path / "data", tmp_path / "run", tmp_path / "config", tmp_path / "cache")
    found.hub_machines.mkdir(parents=True)
    return found


@pytest.fixture
def sleeper() -> Generator[subprocess.Popen[bytes]]:
    """A process that waits for its end of file."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process


def test_record_survives_saving(layout: Layout) -> None:
    boot = record.load(layout).boot
    saved = Record(
        boot, "10.209.0.0/22", Process(1, 2), None, Process(3, 4), bridge=True, forwarding=True, rules=True,
        upstream="/etc/resolv.conf", retry_pasta=7.5, notes={"uplink": "no internet"},
    )  # fmt: skip
    record.save(layout, saved)
    assert record.load(layout) == saved
    copy = saved.copy()
    copy.notes.clear()
    assert saved.notes


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 9}', '{"schema": 1, "boot": 7}', "\0"])
def test_damaged_record_is_an_empty_one(layout: Layout, text: str, caplog: pytest.LogCaptureFixture) -> None:
    layout.hub_record.write_text(text)
    assert record.load(layout) == Record(record.load(layout).boot)
    assert "starting over" in caplog.text


def test_record_of_another_boot_is_an_empty_one(layout: Layout) -> None:
    record.save(layout, Record("another", bridge=True))
    assert not record.load(layout).bridge


def test_attached_machines_are_those_that_live(layout: Layout, sleeper: subprocess.Popen[bytes]) -> None:
    record.save_attached(layout, MachineName("dev"), ADDRESS, sleeper.pid)
    record.save_attached(layout, MachineName("gone"), ADDRESS, GONE.pid)
    (layout.hub_machines / "bad.json").write_text("{")
    (layout.hub_machines / "other").write_text("?")
    files = json.loads((layout.hub_machines / "dev.json").read_text())
    files["process"]["start"] -= 1  # the pid has been given to somebody else
    (layout.hub_machines / "reused.json").write_text(json.dumps(files))
    process = identify(sleeper.pid)
    assert process is not None
    assert record.running_machines(layout) == [record.Attached(MachineName("dev"), ADDRESS, process)]
    record.forget_attached(layout, MachineName("dev"))
    record.forget_attached(layout, MachineName("dev"))
    assert record.running_machines(layout) == []


def test_nothing_is_attached_where_nothing_was(tmp_path: Path) -> None:
    assert record.running_machines(Layout(tmp_path, tmp_path, tmp_path, tmp_path)) == []


def test_process_is_more_than_its_pid(sleeper: subprocess.Popen[bytes]) -> None:
    process = identify(sleeper.pid)
    assert process is not None
    assert process.alive()
    assert not Process(process.pid, process.start + 1).alive()
    assert not send(Process(process.pid, process.start + 1), signal.SIGKILL)
    end(Process(process.pid, process.start + 1))
    assert sleeper.poll() is None
    assert identify(GONE.pid) is None
    assert not send(GONE, signal.SIGKILL)
    end(GONE)


def test_end_ends_and_a_zombie_is_not_alive(sleeper: subprocess.Popen[bytes]) -> None:
    process = identify(sleeper.pid)
    assert process is not None
    end(process)
    assert not process.alive()  # we have not waited for it yet
    assert sleeper.wait() == -signal.SIGTERM


def test_end_does_not_take_no_for_an_answer() -> None:
    script = 'trap "" TERM; echo ready; exec 1>&-; read -r line'
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        found = identify(process.pid)
        assert found is not None
        end(found, grace_s=0.01)
        assert process.wait() == -signal.SIGKILL


def test_send_reaches_the_process(sleeper: subprocess.Popen[bytes]) -> None:
    process = identify(sleeper.pid)
    assert process is not None
    assert send(process, signal.SIGHUP)
    assert sleeper.wait() == -signal.SIGHUP


def test_programs_are_found_by_name_and_argument(tmp_path: Path) -> None:
    mark = f"--pid-file={tmp_path}"
    argv = ["sh", "-c", "echo ready; read -r line", mark]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()  # before it runs, its arguments may not be there yet
        assert [found.pid for found in find_programs("sh", mark)] == [process.pid]
        assert find_programs("dnsmasq", mark) == []
        assert find_programs("sh", mark[:-1]) == []
        with contextlib.suppress(BrokenPipeError):
            process.communicate(b"\n")
    assert find_programs("sh", mark) == []


def test_our_network_namespace() -> None:
    assert network_namespace() == network_namespace(os.getpid()) is not None
    assert network_namespace(GONE.pid) is None


def test_what_keeps_machines_from_the_internet() -> None:
    found = Record("boot", notes={"names": "no dnsmasq", "uplink": "no pasta"})
    assert found.offline == "no pasta"
    found.notes["forwarding"] = "no routing"  # the first on the way out
    assert found.offline == "no routing"
    assert Record("boot", notes={"names": "no dnsmasq", "input": "a firewall"}).offline is None
