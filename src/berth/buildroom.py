"""The room that a build runs in: namespaces with nothing of the host's rights, and buildah in them. Layer 5.

Runs through `berth.inside` only, started by `build`. A Dockerfile is not trusted: its commands run in a user namespace
also for root (whose ids are shifted, as a machine's are), in mount and process namespaces of their own that end, with
all that runs in them, when berth does. buildah's own isolation is `chroot`: it needs no cgroup and no network of its
own. What the build needs of the host is mounted below /mnt, through the namespace's id map where it is root's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil  # not when it is needed: from inside the room Python's own files can't be seen
from pathlib import Path
from typing import TypedDict

from berth import inside, syscalls
from berth.errors import BerthError
from berth.idmapped import open_userns
from berth.proc import run, spawn

ROOM = "/mnt"  # FHS 3.0: "for mounting temporarily"
STORAGE = f"{ROOM}/storage"
WORK = f"{ROOM}/work"
_RUN = f"{ROOM}/run"
_STEP_S = 3600.0
# Where buildah caches short names and what it knows of blobs; the host's own are not for the namespace to write.
_CACHES = ("/var/cache", "/var/lib/containers")
# The walls: everything ends with berth, no process of the host is seen.
_PREFIX = ("setpriv", "--pdeathsig", "KILL", "--", "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")


class RoomMount(TypedDict):
    """A folder or file of the host in the room. mapped: its owners go through the id map (root's files are root's)."""

    source: str
    target: str
    read_only: bool
    mapped: bool


class RoomBase(TypedDict):
    """An image to build on. id: its config's digest, and buildah's id; layout: where in the room; name: in FROM."""

    id: str
    layout: str
    name: str


class RoomPlan(TypedDict):
    """What a build needs. idmap: for root, the map to enter; None: the caller has entered one already.

    options: of `buildah build`. environment: secrets. clean: remove what an earlier build left behind.
    """

    idmap: list[list[list[int]]] | None
    mounts: list[RoomMount]
    bases: list[RoomBase]
    options: list[str]
    environment: dict[str, str]
    clean: bool


def build(plan: RoomPlan, output: int) -> object:
    """Run the build and leave the image in WORK/out; return ``{"status": …}``, buildah's. output: takes what it says.

    Raises BerthError for all but a failed build.
    """
    _enter(plan)
    buildah = _Buildah(_choose_driver(), output)
    if plan["clean"]:
        buildah.run("rm", "--all")
    _seed(buildah, plan["bases"])
    status = buildah.build(plan["options"], plan["environment"])
    if status == 0:
        image = Path(WORK, "image-id").read_text().strip().removeprefix("sha256:")
        # `oci:` would compress the layers in any case, for every machine to decompress them again.
        buildah.run("push", *_POLICY, "--quiet", "--disable-compression", image, f"dir:{WORK}/out")
    return {"status": status}


def _enter(plan: RoomPlan) -> None:
    """Mount what the build needs, then give up what we are: after this, we are root of the namespace alone."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    userns = None if plan["idmap"] is None else open_userns(plan["idmap"])
    trees = [(_clone(mount, userns), mount) for mount in plan["mounts"]]
    owner = 0 if plan["idmap"] is None else plan["idmap"][0][0][1]
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("tmpfs", ROOM, "tmpfs", flags, f"mode=755,uid={owner},gid={owner}")
    for tree, mount in trees:
        _attach(tree, Path(mount["target"]))
    if userns is not None:
        syscalls.setns(userns, syscalls.CLONE_NEWUSER)
        inside.become_root()
        syscalls.unshare(syscalls.CLONE_NEWNS)
    for path in filter(os.path.isdir, _CACHES):
        syscalls.mount("tmpfs", path, "tmpfs", flags, "mode=755")
    os.mkdir(_RUN)


def _clone(mount: RoomMount, userns: int | None) -> int:
    tree = syscalls.open_tree(mount["source"], recursive=True)
    attributes = syscalls.MOUNT_ATTR_NODEV | (syscalls.MOUNT_ATTR_RDONLY if mount["read_only"] else 0)
    syscalls.mount_setattr(tree, set_attr=attributes, recursive=True)
    if userns is not None and mount["mapped"]:
        try:
            syscalls.mount_setattr(tree, userns=userns, recursive=True)
        except OSError as error:
            raise BerthError(
                f"{mount['source']} can't be used in a build: its file system has no idmapped mounts",
                hint="copy it to another file system, or run berth as an ordinary user",
            ) from error
    return tree


def _attach(tree: int, target: Path) -> None:
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        if os.path.isdir(f"/proc/self/fd/{tree}"):
            target.mkdir()
        else:
            target.touch()
    place = os.open(target, os.O_PATH | os.O_CLOEXEC)
    syscalls.move_mount(tree, place)
    os.close(place)
    os.close(tree)


def _choose_driver() -> str:
    """Try whether this kernel lets us mount an overlay; else buildah copies every layer, which any file system can."""
    probe = Path(STORAGE, f".probe-{os.urandom(4).hex()}")
    try:
        for name in ("lower", "upper", "work", "merged"):
            (probe / name).mkdir(parents=True)
        options = f"lowerdir={probe}/lower,upperdir={probe}/upper,workdir={probe}/work,userxattr"
        syscalls.mount("overlay", f"{probe}/merged", "overlay", 0, options)
        syscalls.unmount(f"{probe}/merged")
    except OSError:
        return "vfs"
    else:
        return "overlay"
    finally:
        shutil.rmtree(probe)


_POLICY = ("--signature-policy", f"{WORK}/policy.json")


class _Buildah:
    """Runs buildah on the storage of `build`."""

    def __init__(self, driver: str, output: int) -> None:
        self._global = ["--root", STORAGE, "--runroot", f"{_RUN}/storage", "--storage-driver", driver]
        self._output = output
        self._env = {
            "HOME": _RUN, "XDG_RUNTIME_DIR": _RUN, "TMPDIR": f"{WORK}/temporary",
            # The host's own settings are for the host's own images: all that a build needs comes from berth's store.
            "CONTAINERS_REGISTRIES_CONF": f"{WORK}/registries.conf",
            "CONTAINERS_STORAGE_CONF": f"{WORK}/storage.conf",
        }  # fmt: skip

    def run(self, *words: str) -> bytes:
        return run(self._argv(*words), timeout_s=_STEP_S, env=self._env).stdout

    def build(self, options: list[str], environment: dict[str, str]) -> int:
        argv = self._argv("build", *_POLICY, "--iidfile", f"{WORK}/image-id", *options)
        with spawn(argv, stdout=self._output, stderr=self._output, env={**environment, **self._env}) as process:
            return process.wait()

    def _argv(self, *words: str) -> list[str]:
        return [*_PREFIX, "--", "buildah", *self._global, *words]


def _seed(buildah: _Buildah, bases: list[RoomBase]) -> None:
    """Bring into buildah's storage what it has not, each under the name that the Dockerfile uses."""
    if not bases:
        return
    stored = set(buildah.run("images", "--all", "--quiet", "--no-trunc").decode().split())
    for base in bases:
        if base["id"] not in stored:
            buildah.run("pull", *_POLICY, "--quiet", f"oci:{base['layout']}")
            stored.add(base["id"])
        if base["name"]:
            buildah.run("tag", base["id"].removeprefix("sha256:"), base["name"])


def write_settings(work: Path) -> None:
    """Write buildah's settings, which are the same for every build."""
    (work / "policy.json").write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    (work / "registries.conf").write_text('unqualified-search-registries = ["docker.io"]\n')
    (work / "storage.conf").write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{STORAGE}"\nrunroot = "{_RUN}"\n')
    (work / "temporary").mkdir()
