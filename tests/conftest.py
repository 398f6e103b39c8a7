"""Fixtures of all tests. What a test may need is in support.py, what it must not leave in leaks.py."""

from __future__ import annotations

import itertools
import os
import signal
import tomllib
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer  # pyright: ignore[reportMissingTypeStubs]

import hatch_build
import leaks
import workers
from berth import host
from berth.layout import Layout
from images import bootstrap
from ordinary import Ordinary
from ordinary import ordinary_user as make_ordinary_user
from support import FEATURES, ROOT, is_alone, need, required

_ROOTS = {
    "BERTH_DATA_DIR": "data",
    "BERTH_RUNTIME_DIR": "run",
    "BERTH_CONFIG_DIR": "config",
    "BERTH_CACHE_DIR": "cache",
}
_numbers = itertools.count(1)
_BEFORE = pytest.StashKey[leaks.Snapshot]()
_LEFT = pytest.StashKey[list[str]]()

# The machines of CI pause at will: an example that took long is no finding.
settings.register_profile("berth", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("berth")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run look for more faults than the suite has time for (tests/integration/test_kills.py)."""
    group = parser.getgroup("faults", "faults on purpose")
    group.addoption("--faults", type=int, default=0, metavar="ROUNDS", help="how many points to draw")
    group.addoption("--faults-seed", type=int, default=1, metavar="N", help="which points are drawn")
    group.addoption("--faults-of", default="", metavar="SCENARIO,…", help="draw them from these scenarios only")
    group.addoption("--faults-at", default="", metavar="POINT,…", help="these points: SCENARIO:VICTIM:NUMBER")


def pytest_configure() -> None:
    """Stop early where BERTH_REQUIRE is misspelt; take signals as a person's shell gives them.

    Whoever starts us in the background may have them ignored, and what is ignored is inherited by every program.
    """
    required()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Look around before the workers of pytest-xdist begin, whose own looks can't tell each other's things apart."""
    if _controls_workers(session.config) and is_alone():
        session.config.stash[_BEFORE] = leaks.Snapshot.take(Path("/tmp/bt-"), alone=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail when the workers, which have ended, left something behind."""
    before = session.config.stash.get(_BEFORE, None)
    left = leaks.settle(before, Path("/tmp/bt-"), alone=True) if before else []
    if left:
        session.config.stash[_LEFT] = left
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> workers.Rows:
    """Keep what shares machines on one worker."""
    return workers.Rows(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: workers.turn(item.nodeid))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was left behind."""
    for line in terminalreporter.config.stash.get(_LEFT, []):
        terminalreporter.write_line(f"FAILED: the tests left behind: {line}", red=True)


def _controls_workers(config: pytest.Config) -> bool:
    return not hasattr(config, "workerinput") and bool(config.getoption("numprocesses", default=None))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, a test whose markers name what is missing here."""
    for marker in item.iter_markers():
        if marker.name in FEATURES:
            need(marker.name)


@pytest.fixture(scope="session", autouse=True)
def session() -> Generator[Path]:
    """The session's own folder, with a short path (sockets) that everybody may enter; berth's roots point into it.

    At the end of the session it fails if anything that the session made is left. Beside another worker it looks at
    what bears its mark only; pytest_sessionfinish looks at the whole machine.
    """
    alone = is_alone() and "PYTEST_XDIST_WORKER" not in os.environ
    folder = Path(f"/tmp/bt-{os.getpid()}")
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    before = leaks.Snapshot.take(folder, alone=alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BERTH_TEST_SESSION", str(folder))
        for variable, name in _ROOTS.items():
            patch.setenv(variable, str(folder / "stray" / name))  # a test that forgets `layout` harms nobody
        yield folder
    left = leaks.settle(before, folder, alone=alone)
    leaks.remove_tree(folder)
    assert not left, "the tests left behind:\n" + "\n".join(left)


@pytest.fixture
def scratch(session: Path) -> Generator[Path]:
    """A folder of the test's own, with a short path, on a real disk; removed afterwards."""
    folder = session / f"t{next(_numbers)}"
    folder.mkdir(mode=0o755)
    yield folder
    leaks.remove_tree(folder)


@pytest.fixture
def layout(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Berth's roots, empty, below `scratch`; the environment says so too."""
    for variable, name in _ROOTS.items():
        monkeypatch.setenv(variable, str(scratch / name))
    return Layout.from_environment()


@pytest.fixture(scope="session")
def agents() -> dict[str, Path]:
    """The guest agents of these sources by architecture, built by the package's own build."""
    need("go")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    target = ROOT / "src/berth/_agent"
    return hatch_build.build_agents(ROOT / "guest", target, version=version, work=ROOT / "build")


@pytest.fixture(scope="session")
def agent_binary(agents: dict[str, Path]) -> Path:
    """The guest agent that this host can execute."""
    return agents[host.architecture()]


@pytest.fixture(scope="session")
def ordinary_user(session: Path, agent_binary: Path) -> Generator[Ordinary]:
    """An ordinary user to run berth as (tests/ordinary.py)."""
    del agent_binary  # built before the sources are copied
    need("root")
    need("user")
    with make_ordinary_user(session) as user:
        yield user


@pytest.fixture(scope="session")
def debian_tar() -> Path:
    """A Debian 12 root file system with systemd, as a tar archive."""
    for feature in ("root", "mmdebstrap", "mirror"):
        need(feature)
    return bootstrap("bookworm")
