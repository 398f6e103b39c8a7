"""Root disks of VMs for real: mke2fs in a user namespace, qemu-img, QEMU; as root and as an ordinary user.

What came out is read by e2fsprogs' own tools, as root, whoever made it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import cast

import pytest

from berth import proc
from berth.bundle import Bundle
from berth.engine.qemu import disks, templates
from berth.engine.qemu.templates import list_templates
from berth.errors import BerthError, StateFormatError
from berth.layout import Layout
from berth.names import parse_machine_name
from berth.oci import spec
from berth.progress import Silent
from berth.units import GIB, MIB
from person import Person
from tars import END, directory, hardlink, member, symlink

pytestmark = pytest.mark.container("it is about files on the host: no machine runs")

# Source: capability.h, struct vfs_cap_data: VFS_CAP_REVISION_2 with the effective bit, cap_net_raw permitted.
CAPABILITY = bytes.fromhex("0100000200200000") + bytes(12)
XATTR = "SCHILY.xattr.security.capability"

SCRIPT = """
import json, os
from pathlib import Path
from berth.bundle import Bundle
from berth.engine.qemu import disks, templates
from berth.errors import BerthError
from berth.layout import Layout
from berth.names import parse_machine_name
from berth.progress import Silent
from berth.units import GIB
layout = Layout.from_environment()
def make(digest, layers, disk=None):
    pairs = [(os.open(path, os.O_RDONLY), kind) for path, kind in layers]
    templates.make_template(layout, digest, pairs, disk, Silent())
def refusal(function, *arguments):
    try:
        function(*arguments)
    except BerthError as error:
        return [type(error).__name__, error.message, error.hint]
"""


def digest_of(number: int) -> str:
    return f"sha256:{number:064x}"


@pytest.fixture
def store(person: Person) -> Generator[Layout]:
    """The person's layout, without templates afterwards."""
    for program in ("mke2fs", "debugfs", "e2fsck", "qemu-img"):
        if proc.find_program(program) is None:
            pytest.skip(f"needs {program}")
    yield person.layout
    doomed = sorted({item.digest for item in list_templates(person.layout)})
    person.script(f"{SCRIPT}\nfor digest in {doomed!r}: templates.remove_template(layout, digest)")
    left = [path.name for path in person.layout.disks.iterdir() if path.name != "disks.lock"]
    assert not [name for name in left if name.endswith(".partial")]


@pytest.fixture
def layer(scratch: Path) -> Callable[..., str]:
    """Write layers where everybody can read them; gives the expression of them for `make`."""

    def write(*layers: bytes) -> str:
        paths: list[tuple[str, str]] = []
        for number, data in enumerate(layers):
            path = scratch / f"{len(list(scratch.iterdir()))}-{number}.tar"
            path.write_bytes(data + END)
            path.chmod(0o644)
            paths.append((str(path), spec.LAYER))
        return repr(paths)

    return write


def debug(path: Path, request: str) -> str:
    return proc.run(["debugfs", "-R", request, str(path)]).stdout.decode()


def check(path: Path) -> None:
    """The file system is whole, says the program that knows."""
    done = proc.run(["e2fsck", "-f", "-n", str(path)], success=range(256))
    assert done.status == 0, done.stdout.decode()


def inode(path: Path, name: str) -> dict[str, str]:
    """What `stat` of debugfs says of a file, word by word."""
    words = debug(path, f'stat "{name}"').replace("Type: ", "Type:").split()
    # In reverse: the first of a name counts, a later Size is that of a fragment.
    found = {word.rstrip(":"): words[at + 1] for at, word in reversed([*enumerate(words[:-1])]) if word.endswith(":")}
    return found | {"Type": next(word[5:] for word in words if word.startswith("Type:"))}


def test_a_template_is_what_the_layers_say(
    person: Person, store: Layout, layer: Callable[..., str], scratch: Path
) -> None:
    lower = (
        member("./", kind=b"5", mode=0o711, uid=3, gid=4) + directory("./etc/") + member("./etc/gone", b"old")
        + directory("./opt/") + member("./opt/hidden", b"old") + member("./plain", b"plain\n", mode=0o640, uid=7, gid=8)
        + hardlink("./linked", "./plain") + symlink("./link", "/etc/passwd") + hardlink("./link2", "./link")
        + member("./setuid", b"x", mode=0o6755, uid=0, gid=0)
        + member("./ping", b"y" * 5000, mode=0o755, uid=0, gid=0, pax={XATTR: CAPABILITY})
        + member("./closed", b"secret", mode=0, uid=60000, gid=60001)
        + member("./shut/", kind=b"5", mode=0, uid=60000, gid=60000) + member("./shut/in", b"inside")
        + member("./pipe", kind=b"6") + member("./null", kind=b"3", device=(1, 3))
        + directory("./lost+found/") + member("./with space", b"1") + member("./größe", b"2")
    )  # fmt: skip
    upper = member("./etc/.wh.gone") + member("./opt/.wh..wh..opq") + member("./opt/new", b"new")
    sparse = scratch / "sparse"
    with sparse.open("wb") as file:
        file.truncate(300 * GIB)
        file.seek(200 * GIB)
        file.write(b"far out")
    tar = ["tar", "--create", "--file=-", "--sparse", "--format=posix", f"--directory={scratch}", "sparse"]
    holes = proc.run(tar).stdout[:-1024]
    person.script(f"{SCRIPT}\nmake({digest_of(1)!r}, {layer(lower, upper, holes)})")
    (found,) = list_templates(store)
    assert (found.digest, found.size, found.usage < 40 * MIB) == (digest_of(1), 64 * GIB, True)
    assert (found.path.stat().st_uid, found.path.stat().st_mode & 0o777) == (person.uid, 0o644)
    assert store.disks.stat().st_mode & 0o777 == 0o700
    path = found.path
    check(path)
    names = set(debug(path, "ls -p /").replace("/", " ").split())
    assert {"plain", "linked", "link", "setuid", "ping", "closed", "shut", "pipe", "größe", "sparse"} <= names
    assert "null" not in names
    root = inode(path, "/")
    assert (root["Mode"], root["User"], root["Group"]) == ("0711", "3", "4")
    plain = inode(path, "plain")
    assert (plain["Mode"], plain["User"], plain["Group"], plain["Links"]) == ("0640", "7", "8", "2")
    assert plain["Inode"] == inode(path, "linked")["Inode"]
    assert plain["mtime"].startswith(f"0x{1_000_000_000:x}")
    assert inode(path, "link2")["Type"] == "symlink"
    assert (inode(path, "setuid")["Mode"], inode(path, "pipe")["Type"]) == ("06755", "FIFO")
    closed = inode(path, "closed")
    assert (closed["Mode"], closed["User"], closed["Group"]) == ("0000", "60000", "60001")
    assert debug(path, "cat closed") == "secret"
    assert debug(path, "cat shut/in") == "inside"
    assert debug(path, 'cat "with space"') == "1"
    assert "new" in debug(path, "ls -p opt")
    assert "hidden" not in debug(path, "ls -p opt")
    assert "gone" not in debug(path, "ls -p etc")
    kept = debug(path, "ea_get -x ping security.capability")
    assert bytes.fromhex("".join(kept.partition("=")[2].split())) == CAPABILITY, "seen from the namespace: revision 2"
    far = inode(path, "sparse")
    assert (int(far["Size"]), int(far["Blockcount"]) <= 16) == (300 * GIB, True)


def test_alpine_is_made_in_every_size(person: Person, store: Layout, alpine_tar: Path, scratch: Path) -> None:
    copy = scratch / "alpine.tgz"  # where this user can read it
    copy.write_bytes(alpine_tar.read_bytes())
    text = (
        f"for size in (1, 7, None): make({digest_of(2)!r}, [({str(copy)!r}, {spec.LAYER_GZIP!r})], size and size * GIB)"
    )
    person.script(f"{SCRIPT}\n{text}")
    found = list_templates(store)
    assert [item.size // GIB for item in found] == [1, 4, 64]
    for item in found:
        check(item.path)
        assert debug(item.path, "cat /etc/alpine-release") == "3.20.3\n"
        facts = proc.run(["dumpe2fs", "-h", str(item.path)]).stdout.decode()
        assert "Filesystem volume name:   berth-root" in facts
        assert f"Block count:              {item.size // 4096}\n" in facts
        assert "Reserved GDT blocks:      1024\n" in facts, "it could not grow"
        assert "orphan_file" not in facts
        assert item.usage < 30 * MIB


def test_what_the_container_engine_has_unpacked_is_used_and_kept(
    person: Person, store: Layout, layer: Callable[..., str]
) -> None:
    digest = digest_of(3)
    text = f"""
from berth import files, userns
template = layout.template({digest!r})
files.make_private_directory(layout.templates)
(template / "rootfs").mkdir(parents=True)
idmap = userns.plan_idmap(os.getuid(), os.getgid())
fd = os.open(template / "rootfs", os.O_RDONLY)
if os.getuid() == 0:
    os.fchown(fd, idmap.host_root(), idmap.host_root())
(path, kind), = {layer(member("./only-here", b"x", uid=0, gid=5, mode=0o600))}
blob = os.open(path, os.O_RDONLY)
arguments = {{"target_fd": fd, "layers": [[blob, kind]], "devices": "skip"}}
userns.call("berth.oci.unpack:unpack_inside", arguments, idmap=idmap, pass_fds=[fd, blob])
make({digest!r}, [])  # not whole yet: not used
templates.remove_template(layout, {digest!r})
(template / "template.json").write_text("{{}}")
make({digest!r}, [])
from berth import trees
assert (template / "rootfs/only-here").exists()
trees.delete(template)
"""
    person.script(f"{SCRIPT}\n{text}")
    (found,) = list_templates(store)
    entry = inode(found.path, "only-here")
    assert (entry["User"], entry["Group"], entry["Mode"]) == ("0", "5", "0600")


def test_ids_that_the_namespace_lacks_are_refused_and_the_rest_kept(
    person: Person, store: Layout, layer: Callable[..., str]
) -> None:
    layers = layer(member("./far", b"x", uid=70000, gid=70001))
    digest = digest_of(4)
    text = f"print(json.dumps(refusal(make, {digest!r}, {layers})))"
    refused = json.loads(person.script(f"{SCRIPT}\n{text}"))
    if person.is_root:  # whose range is larger
        (found,) = list_templates(store)
        entry = inode(found.path, "far")
        assert (entry["User"], entry["Group"]) == ("70000", "70001")
    else:
        assert refused[0] == "UnsupportedError"
        assert "far belongs to 70000:70001" in refused[1]
        assert list_templates(store) == []


@pytest.mark.usefixtures("store")
def test_an_image_that_does_not_fit_is_refused_with_the_least_size(person: Person) -> None:
    digest = digest_of(5)
    text = f"""
from berth import files, trees
rootfs = layout.template({digest!r}) / "rootfs"  # as the container engine keeps it: nothing has to be unpacked
files.make_private_directory(layout.templates)
rootfs.mkdir(parents=True)
with open(rootfs / "big", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, 900 << 20)
(rootfs.parent / "template.json").write_text("{{}}")
first = refusal(make, {digest!r}, [], GIB)
trees.delete(rootfs.parent)
again = refusal(templates.has_template, layout, {digest!r}, GIB)  # known now, without any work
print(json.dumps([first, again]))
files_left = [path.name for path in layout.disk({digest!r}).iterdir()]
trees.delete(layout.disk({digest!r}))
assert files_left == ["template.json"], files_left
"""
    first, again = json.loads(person.script(f"{SCRIPT}\n{text}"))
    assert first == again
    assert first[0] == "InvalidArgumentError"
    assert "a disk of 1G is too small for this image, which takes 900M" in first[1]
    assert "disk=4G" in first[2]


def test_what_a_killed_maker_left_is_swept(person: Person, store: Layout, layer: Callable[..., str]) -> None:
    many = b"".join(member(f"./{number}", uid=5, gid=5) for number in range(3000))
    layers = layer(many, member("./last", os.urandom(30 * MIB)))
    script = f"{SCRIPT}\nmake({digest_of(6)!r}, {layers})"
    argv = person.command([*person.python, "-c", script], {}, None)
    maker = subprocess.Popen(argv)
    partial = store.disk(digest_of(6)).with_name(f"{store.disk(digest_of(6)).name}.partial")
    deadline = time.monotonic() + 60
    while not (partial / "rootfs/0").exists():
        assert maker.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    assert partial.exists()
    assert list_templates(store) == []
    person.script(script)
    (found,) = list_templates(store)
    check(found.path)
    assert not partial.exists()


@pytest.fixture
def small_disk(scratch: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = scratch / "small"
    folder.mkdir()
    proc.run(["mount", "-t", "tmpfs", "-o", "size=24m", "berth-test", str(folder)])
    yield folder
    proc.run(["umount", str(folder)])


@pytest.mark.parametrize("size", [30, 14], ids=["unpacking", "making"])
def test_a_full_disk_is_one_error_and_leaves_nothing(small_disk: Path, scratch: Path, size: int) -> None:
    layout = Layout(small_disk / "data", scratch, scratch, scratch)
    blob = scratch / "blob"
    blob.write_bytes(member("./big", os.urandom(size * MIB)) + END)
    with blob.open("rb") as file:
        with pytest.raises(BerthError, match=r"No space left on device|the disk of the host is full"):
            templates.make_template(layout, digest_of(7), [(file.fileno(), spec.LAYER)], None, Silent())
    assert [path.name for path in layout.disks.rglob("*")] == ["disks.lock"]


# A machine's disk

PREPARE = """
bundle = Bundle(layout, parse_machine_name("disk-test"))
bundle.path.mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def bundle(person: Person, store: Layout, layer: Callable[..., str]) -> Generator[Bundle]:
    """A bundle with a new disk on a small template, seen by root."""
    text = f"{SCRIPT}{PREPARE}\nmake({digest_of(8)!r}, {layer(member('./file', b'of the image', uid=0, gid=0))})"
    person.script(f"{text}\nprint(disks.ensure_disk(bundle, {digest_of(8)!r}, None))")
    made = Bundle(store, parse_machine_name("disk-test"))
    yield made
    proc.run(["rm", "-r", str(made.path)])


def info(bundle: Bundle) -> dict[str, object]:
    shown = proc.run(["qemu-img", "info", "--output=json", str(bundle.vm_disk)]).stdout
    return cast("dict[str, object]", json.loads(shown))


def test_a_new_disk_is_small_sound_and_finds_its_template(person: Person, bundle: Bundle) -> None:
    assert disks.disk_usage(bundle) < MIB
    shown = info(bundle)
    (template,) = list_templates(bundle.layout)
    assert shown["virtual-size"] == 64 * GIB
    assert Path(str(shown["full-backing-filename"])).resolve() == template.path
    assert shown["cluster-size"] == 65536
    proc.run(["qemu-img", "check", str(bundle.vm_disk)])
    status = bundle.vm_disk.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (person.uid, 0o600)
    assert sorted(path.name for path in bundle.vm.iterdir()) == ["disk.json", "disk.qcow2"]
    # What a guest would see, put together by QEMU's own tool.
    raw = bundle.vm / "raw"
    proc.run(["qemu-img", "convert", "-O", "raw", str(bundle.vm_disk), str(raw)])
    check(raw)
    assert debug(raw, "cat file") == "of the image"


def test_a_disk_grows_and_an_unclean_one_is_checked(person: Person, bundle: Bundle) -> None:
    text = f"disks.mark_running(bundle)\nprint(disks.ensure_disk(bundle, {digest_of(8)!r}, 5000 * GIB).size // GIB)"
    assert person.script(f"{SCRIPT}{PREPARE}\n{text}") == "5000\n"
    assert info(bundle)["virtual-size"] == 5000 * GIB
    proc.run(["qemu-img", "check", str(bundle.vm_disk)])
    assert not disks.was_clean(bundle), "the guest has to look at its file system as well"
    assert disks.disk_usage(bundle) < MIB


def test_leaked_clusters_come_back_and_damage_is_told(bundle: Bundle) -> None:
    disks.mark_running(bundle)
    with bundle.vm_disk.open("r+b") as file:
        # Sources: qcow2.txt. Cluster 2 is the first block of 16-bit reference counts; here cluster 40 gets one.
        file.seek(2 * 65536 + 2 * 40)
        file.write(b"\0\1")
        file.truncate(41 * 65536)
    disks.ensure_disk(bundle, digest_of(8), None)
    with bundle.vm_disk.open("r+b") as file:
        file.seek(2 * 65536 + 2 * 40)
        assert file.read(2) == b"\0\0"
        file.seek(3 * 65536)
        file.write((1 << 63 | 0x7777_0000).to_bytes(8, "big"))  # the first table is said to lie beyond the end
    damaged = bundle.vm_disk.read_bytes()
    with pytest.raises(StateFormatError, match="is damaged") as caught:
        disks.ensure_disk(bundle, digest_of(8), None)
    assert str(bundle.vm_disk) in (caught.value.hint or "")
    assert bundle.vm_disk.read_bytes() == damaged


def test_a_disk_that_names_other_files_is_not_followed(bundle: Bundle, scratch: Path) -> None:
    """A guest that has taken its QEMU over may write the head; the host must open nothing by it."""
    pipe = scratch / "pipe"
    os.mkfifo(pipe)  # whoever opens it hangs, and the deadline says so
    proc.run(["qemu-img", "rebase", "-u", "-F", "raw", "-b", str(pipe), str(bundle.vm_disk)])
    disks.mark_running(bundle)
    assert disks.ensure_disk(bundle, digest_of(8), 65 * GIB).size == 65 * GIB
    with disks.opened_disk(bundle) as opened:
        (template,) = list_templates(bundle.layout)
        assert os.path.samestat(os.fstat(opened.template), template.path.stat())
    other = bundle.vm_disk.with_name("other")
    proc.run(
        [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            f"data_file={scratch}/data,data_file_raw=on",
            str(other),
            "1G",
        ]
    )
    other.replace(bundle.vm_disk)
    with pytest.raises(StateFormatError, match="it asks for what berth never makes"):
        disks.ensure_disk(bundle, digest_of(8), None)


def test_qemu_gets_descriptors_and_discards_reach_the_host(bundle: Bundle) -> None:
    """The graph of the engine in small: no name of a file, and `discard` on both nodes."""
    if proc.find_program("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86_64")
    ours, theirs = socket.socketpair()
    with ours, theirs, disks.opened_disk(bundle) as opened:
        nodes = [
            {"driver": "file", "node-name": "below", "filename": "/dev/fdset/2", "read-only": True},
            {"driver": "raw", "node-name": "template", "file": "below", "read-only": True},
            {"driver": "file", "node-name": "file", "filename": "/dev/fdset/1", "discard": "unmap"},
            {"driver": "qcow2", "node-name": "disk", "file": "file", "backing": "template", "discard": "unmap"},
        ]
        argv = [
            "qemu-system-x86_64", "-nodefaults", "-S", "-display", "none", "-m", "64", "-machine", "q35,accel=tcg",
            "-add-fd", f"fd={opened.disk},set=1", "-add-fd", f"fd={opened.template},set=2",
            *(word for node in nodes for word in ("-blockdev", json.dumps(node))),
            "-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control",
        ]  # fmt: skip
        passed = (opened.disk, opened.template, theirs.fileno())
        with (
            subprocess.Popen(argv, pass_fds=passed, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu,
            ours.makefile("rw") as talk,
        ):
            theirs.close()

            def command(name: str, **arguments: object) -> None:
                talk.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                talk.flush()
                while "return" not in (answer := json.loads(talk.readline())):
                    assert "error" not in answer, answer

            def io(text: str) -> int:
                command("human-monitor-command", **{"command-line": f'qemu-io disk "{text}"'})
                return disks.disk_usage(bundle)

            try:
                talk.readline()  # the greeting
                command("qmp_capabilities")
                io("write -P 5 1G 32M")
                assert io("flush") >= 32 * MIB
                io("discard 1G 32M")
                assert io("flush") < MIB
                io("read -P 0 1G 32M")
                command("quit")
                said = qemu.communicate(timeout=30)[0].decode()
            finally:
                qemu.kill()
            assert said.count("ops;") == 3, said
            assert "failed" not in said


def test_a_clone_is_a_disk_of_its_own(person: Person, bundle: Bundle) -> None:
    text = """
target = Bundle(layout, parse_machine_name("disk-copy"))
target.path.mkdir()
disks.clone_disk(bundle, target)
print(disks.find_disk(target) == disks.find_disk(bundle))
"""
    assert person.script(f"{SCRIPT}{PREPARE}\n{text}") == "True\n"
    target = Bundle(bundle.layout, parse_machine_name("disk-copy"))
    try:
        proc.run(["qemu-img", "check", str(target.vm_disk)])
        assert target.vm_disk.read_bytes() == bundle.vm_disk.read_bytes()
        assert target.vm_disk.stat().st_uid == person.uid
    finally:
        proc.run(["rm", "-r", str(target.path)])
