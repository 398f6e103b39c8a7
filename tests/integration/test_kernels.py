"""Kernels out of the distribution's real packages, as root and as an ordinary user; and one of them boots."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import cast

import pytest

from berth import host, proc
from berth.errors import CommandError
from berth.kernels.initramfs import document_cpio, make_initramfs
from berth.kernels.model import Kernel
from berth.kernels.store import Kernels
from hatch_build import find_go
from person import Person
from support import need

pytestmark = pytest.mark.container("it is about the store of kernels, whatever the isolation")

INIT = """\
package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"unsafe"
)

// Loads what modules.order names, shows the first modules disk it meets, and ends the VM.
func main() {
	syscall.Mount("proc", "/proc", "proc", 0, "")
	syscall.Mount("sys", "/sys", "sysfs", 0, "")
	syscall.Mount("dev", "/dev", "devtmpfs", 0, "")
	none, _ := syscall.BytePtrFromString("")
	order, _ := os.ReadFile("/modules.order")
	for _, path := range strings.Fields(strings.ReplaceAll(string(order), "--", "")) {
		file, err := os.Open(path)
		if err == nil {
			// 313: finit_module on amd64.
			if _, _, number := syscall.Syscall(313, file.Fd(), uintptr(unsafe.Pointer(none)), 0); number != 0 {
				err = number
			}
		}
		fmt.Println("test: loaded", path, err)
	}
	document, _ := os.ReadFile("/boot.json")
	fmt.Println("test: document", string(document))
	os.Mkdir("/disk", 0755)
	fmt.Println("test: mounted", syscall.Mount("/dev/vda", "/disk", "ext4", syscall.MS_RDONLY, ""))
	folders, _ := os.ReadDir("/disk")
	for _, folder := range folders {
		var status syscall.Stat_t
		if syscall.Stat("/disk/"+folder.Name()+"/modules.dep", &status) == nil {
			fmt.Println("test: modules of", folder.Name(), status.Uid, status.Gid)
		}
	}
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
}
"""


def need_packages() -> None:
    for feature in ("root", "mirror"):
        need(feature)
    missing = [name for name in ("apt-get", "dpkg-deb", "depmod", "mke2fs", "lz4") if not proc.find_program(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.fixture(scope="session")
def stored(person: Person) -> Kernel:
    """This host's kernel for VMs, fetched by this person."""
    need_packages()
    version = person.berth("system", "kernel", "fetch", "--progress", "plain", timeout_s=300).strip()
    kernel = Kernels(person.layout).find(host.architecture())  # root may look into everybody's
    assert kernel
    assert kernel.version == version
    return kernel


def owners(disk: Path, path: str) -> tuple[int, int]:
    """Ask debugfs for the owner of a file in a disk image."""
    said = proc.run(["debugfs", "-R", f"stat {path}", str(disk)]).stdout.decode().split()
    return int(said[said.index("User:") + 1]), int(said[said.index("Group:") + 1])


def left_behind(person: Person) -> list[str]:
    return [path.name for path in person.layout.kernels.iterdir() if path.suffix in (".partial", ".trash")]


def test_fetched(person: Person, stored: Kernel) -> None:
    if stored.arch == "amd64":
        assert stored.vmlinux, "the distributions' kernels have a PVH entry point"
    assert stored.modules_disk
    assert stored.modules
    assert stored.e2fsck
    assert (stored.modules / "modules.dep").stat().st_size > 1000
    proc.run([str(stored.e2fsck), "-fn", str(stored.modules_disk)])  # a static one runs here as well
    version = stored.version
    for name in ("/", f"/{version}", f"/{version}/modules.dep", f"/{version}/kernel/drivers/block/virtio_blk.ko"):
        assert owners(stored.modules_disk, name) == (0, 0)
    for path in (stored.image, stored.modules_disk, stored.e2fsck, *([stored.vmlinux] if stored.vmlinux else [])):
        assert path.stat().st_uid == person.uid
        assert path.stat().st_mode & 0o444 == 0o444
        assert path.parent.stat().st_mode & 0o777 == 0o755
    assert person.layout.kernels.stat().st_mode & 0o777 == 0o700
    rows = cast("list[dict[str, object]]", json.loads(person.berth("system", "kernel", "ls", "--format", "json")))
    assert [row["problem"] for row in rows if row["version"] == version and row["used"]] == [None]
    assert left_behind(person) == []


def test_fetched_again(person: Person, stored: Kernel) -> None:
    before = stored.image.stat()
    assert person.berth("system", "kernel", "fetch", timeout_s=300).strip() == stored.version
    assert stored.image.stat() == before


def test_killed_while_fetching(person: Person, stored: Kernel) -> None:
    """SIGKILL at several moments: what was there stays, nothing half is shown, and the next command cleans up."""
    assert stored.e2fsck
    stored.e2fsck.unlink()  # damaged, so that it is fetched again
    folder = person.layout.kernels
    for pattern in (
        "fetch.partial",
        "fetch.partial/*/packages",
        "fetch.partial/kernel/lib",
        "fetch.partial/kernel/vmlinux",
    ):
        with person.popen("system", "kernel", "fetch") as process:
            while not list(folder.glob(pattern)) and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        assert person.berth("system", "kernel", "ls", "-q") in ("", f"{stored.version}\n")
    assert person.berth("system", "kernel", "fetch", timeout_s=300).strip() == stored.version
    assert left_behind(person) == []
    assert Kernels(person.layout).find(stored.arch) == stored


def test_a_foreign_one(person: Person) -> None:
    """By lists of our own: the host has none for another architecture."""
    need_packages()
    if not person.is_root or host.architecture() != "amd64":
        pytest.skip("one download of a foreign kernel is enough: a user's takes the same way")
    version = person.berth("system", "kernel", "fetch", "--platform", "linux/arm64", timeout_s=300).strip()
    try:
        kernel = Kernels(person.layout).find("arm64")
        assert kernel
        assert kernel.version == version
        assert kernel.image.read_bytes()[0x38:0x3C] == b"ARM\x64"
        assert kernel.vmlinux is None
        assert kernel.modules_disk
        assert kernel.e2fsck
        assert kernel.e2fsck.read_bytes()[18] == 183
    finally:
        person.berth("system", "kernel", "rm", version, "--platform", "linux/arm64")


@pytest.fixture(scope="session")
def init(session: Path) -> Path:
    """A static /init that tells what it finds."""
    need("go")
    go = find_go()
    assert go
    folder = session / "init"
    folder.mkdir()
    (folder / "go.mod").write_text("module init\n\ngo 1.22\n")
    (folder / "main.go").write_text(INIT)
    env = {
        "CGO_ENABLED": "0", "GOARCH": "amd64", "GOOS": "linux", "GOTOOLCHAIN": "local", "GOPROXY": "off",
        "GOCACHE": str(folder / "cache"), "GOFLAGS": "-mod=mod",
    }  # fmt: skip
    try:
        proc.run([str(go), "build", "-o", "init", "."], cwd=folder, env=env, timeout_s=280)
    except CommandError as error:
        pytest.fail(error.stderr)
    return folder / "init"


@pytest.mark.parametrize("form", ["vmlinux", "bzimage"])
def test_it_boots_and_loads_its_modules(form: str, person: Person, stored: Kernel, init: Path, scratch: Path) -> None:
    if proc.find_program("qemu-system-x86_64") is None or stored.arch != "amd64":
        pytest.skip("needs qemu-system-x86_64 and a kernel for amd64")
    if not person.is_root:
        pytest.skip("root's boot is enough: the files are the same")
    initrd = scratch / "initrd"
    initrd.write_bytes(make_initramfs(person.layout, stored, init).read_bytes() + document_cpio({"schema": 1}))
    kernel = stored.vmlinux if form == "vmlinux" else stored.image
    argv = [
        "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "512", "-nodefaults", "-display", "none",
        "-no-reboot", "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(initrd),
        "-append", "console=ttyS0 quiet panic=-1",
        "-drive", f"if=none,id=modules,file={stored.modules_disk},format=raw,readonly=on",
        "-device", "virtio-blk-pci,drive=modules,disable-legacy=on",
    ]  # fmt: skip
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True)
    said = [
        line[line.index(b"test: ") + 6 :].strip().decode() for line in done.stdout.splitlines() if b"test: " in line
    ]
    loaded = [line for line in said if line.startswith("loaded")]
    assert "loaded /modules/virtio_blk.ko <nil>" in loaded
    assert "loaded /modules/virtiofs.ko <nil>" in loaded
    assert all(line.endswith(" <nil>") for line in loaded), loaded
    assert 'document {"schema": 1}' in said
    assert "mounted <nil>" in said
    assert f"modules of {stored.version} 0 0" in said
