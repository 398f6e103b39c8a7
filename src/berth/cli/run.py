"""`berth run`: the way of a command into a machine. The fast path: nothing heavy is imported while the machine runs.

The words are read by hand, because argparse costs 4 ms and reads options behind the command's first word. The agent's
socket is tried at once; only when nobody answers there does `lifecycle` come in and boot or repair the machine.
"""

from __future__ import annotations

import os
import sys

from berth import fastpath
from berth.errors import AgentError, BerthError, InvalidArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from berth.session import StartError
    from berth.wire.messages import ExecRequest, TerminalSize

HINT = "berth run --help"
_CONNECT_S = 10.0

# flags, member of `Options`, does it take a value. cli/runhelp.py has the words for people.
OPTIONS: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("-n", "--name"), "name", True),
    (("-i", "--interactive"), "interactive", False),
    (("-t", "--tty"), "tty", False),
    (("-d", "--detach"), "detach", False),
    (("--root",), "root", False),
    (("-u", "--user"), "user", True),
    (("--uid",), "uid", True),
    (("--gid",), "gid", True),
    (("-w", "--workdir", "--cwd"), "workdir", True),
    (("-e", "--env"), "env", True),
    (("--env-file",), "env_file", True),
    (("-s", "--shell"), "shell", False),
    (("--progress",), "progress", True),
    (("--debug",), "debug", False),
    (("-h", "--help"), "help", False),
)
_BY_FLAG = {flag: (dest, valued) for flags, dest, valued in OPTIONS for flag in flags}
_SHELL_LETTERS = frozenset(" \t\n\r\v\f|&;<>()$`\\\"'*?[]{}#~!")


class Options:
    """What the words after `berth run` say."""

    def __init__(self) -> None:
        self.flags: set[str] = set()
        self.values: dict[str, str] = {}
        self.env: dict[bytes, bytes] = {}  # of -e and --env-file, in the order given
        self.argv: list[str] = []


def parse(words: list[str]) -> Options:
    """Read `words` up to the command, whose own words are kept as they are. Raises InvalidArgumentError."""
    options = Options()
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word == "--":
            options.argv = words[index:]
            break
        if not word.startswith("-") or word == "-":
            options.argv = words[index - 1 :]
            break
        for flag, attached in _split(word):
            dest, valued = _find(flag)
            if not valued:
                if attached is not None:
                    raise InvalidArgumentError(f"option {flag} takes no value", hint=HINT)
                options.flags.add(dest)
                continue
            if attached is None:
                if index >= len(words):
                    raise InvalidArgumentError(f"option {flag} needs a value", hint=HINT)
                attached = words[index]
                index += 1
            _store(options, dest, attached)
    _check(options)
    return options


def _split(word: str) -> list[tuple[str, str | None]]:
    """Take one word apart: ``--name=x``, or a cluster of letters (``-itu x``, ``-nx``), as flags with their values."""
    if word.startswith("--"):
        flag, equals, value = word.partition("=")
        return [(flag, value if equals else None)]
    found: list[tuple[str, str | None]] = []
    for place, letter in enumerate(word[1:], 2):
        flag = f"-{letter}"
        if _find(flag)[1]:
            found.append((flag, word[place:] or None))
            break
        found.append((flag, None))
    return found


def _find(flag: str) -> tuple[str, bool]:
    if flag not in _BY_FLAG:
        raise InvalidArgumentError(f"unknown option {flag}", hint=f"{HINT}; options of the command go behind its name")
    return _BY_FLAG[flag]


def _store(options: Options, dest: str, value: str) -> None:
    if dest in ("env", "env_file"):
        for item in [os.fsencode(value)] if dest == "env" else read_env_file(value):
            _set_variable(options.env, item)
        return
    if dest == "name" and not fastpath.is_machine_name(value):
        from berth.names import parse_machine_name

        parse_machine_name(value)  # raises, in its own words
    if dest in ("uid", "gid") and not (value.isascii() and value.isdigit() and int(value) < 2**32 - 1):
        raise InvalidArgumentError(f"invalid {dest} '{value}'", hint="give a number")
    if dest == "progress" and value not in ("auto", "plain", "none"):
        raise InvalidArgumentError(f"invalid progress '{value}'", hint="give auto, plain or none")
    if dest in ("user", "workdir") and not value:
        raise InvalidArgumentError(f"invalid {dest} '': it is empty", hint=HINT)
    options.values[dest] = value


def _set_variable(env: dict[bytes, bytes], item: bytes) -> None:
    key, equals, value = item.partition(b"=")
    if not key:
        raise InvalidArgumentError(f"invalid environment variable '{os.fsdecode(item)}'", hint="give KEY=VALUE or KEY")
    if equals:
        env[key] = value
    elif key in os.environb:  # `-e KEY` copies; one that isn't set here is left out, as docker does
        env[key] = os.environb[key]


def _check(options: Options) -> None:
    who = [word for word, given in (("--root", "root" in options.flags), ("--user", "user" in options.values),
                                    ("--uid", "uid" in options.values)) if given]  # fmt: skip
    if len(who) > 1:
        raise InvalidArgumentError(f"{' and '.join(who)} can't be used together", hint="say once who runs the command")
    if "gid" in options.values and ":" in options.values.get("user", ""):
        raise InvalidArgumentError("the group is given twice, by --user and by --gid", hint=HINT)
    if {"detach", "tty"} <= options.flags:
        raise InvalidArgumentError(
            "--detach and --tty can't be used together", hint="a detached command has no terminal"
        )


def main(words: list[str], *, debug: bool) -> int:
    """Run the command that `words` (after `berth run`) name; return its exit status."""
    options = parse(words)
    if "help" in options.flags:
        from berth.cli import commands

        return commands.show_help("run")
    debug = debug or "debug" in options.flags
    if debug:
        from berth import log

        log.configure(debug=True)
    from berth.cli.ending import EXIT_BERTH_FAILED, guarded

    return guarded(lambda: _run(options), debug=debug, failed=EXIT_BERTH_FAILED)


def _run(options: Options) -> int:
    wanted = options.values.get("name")
    name = wanted or fastpath.find_default_machine()
    connection = _connect_fast(name) if name else None
    if connection is None or name is None:
        name, connection = _connect_slow(wanted, options)
    try:
        return _execute(options, name, connection)
    except AgentError as error:
        # A machine that was just ending took the connection and greeted nobody, so nothing has been run.
        if error.agent_code != "unheard":
            raise
    return _execute(options, *_connect_slow(wanted, options))


def _execute(options: Options, name: str, connection: _socket.socket) -> int:
    """Do what is asked for over `connection`, and close it."""
    try:
        return _talk(options, name, connection)
    finally:
        connection.close()


def _talk(options: Options, name: str, connection: _socket.socket) -> int:
    detach = "detach" in options.flags
    if detach and not options.argv:
        return _print_name(name)  # the machine runs: that is all there was to do
    share_ssh_agent(name)
    request = make_request(options, name)
    from berth import session

    try:
        status = session.run_session(
            connection, request, stdin_fd=0, stdout_fd=1, stderr_fd=2, tty=request.tty is not None
        )  # fmt: skip
    except session.StartError as error:
        return _not_started(error, name)
    return _print_name(name) if detach and status == 0 else status


def _not_started(error: StartError, name: str) -> int:
    from berth.cli.ending import EXIT_NOT_FOUND, show_error

    if error.status == EXIT_NOT_FOUND:
        from berth.cli.missing import install_hint

        error.hint = install_hint(name)
    show_error(error)
    return error.status


def _print_name(name: str) -> int:
    from berth.cli.output import emit

    emit(name)
    return 0


# Finding the machine ----------------------------------------------------------------------------------------------


def _connect_fast(name: str) -> _socket.socket | None:
    """Connect to the agent of a machine that runs well; None when nobody answers, or its keeper must be replaced."""
    if not _is_kept(name):
        return None
    from berth import agent

    try:
        return agent.connect(fastpath.agent_socket(name), _CONNECT_S)
    except AgentError:
        return None


def _is_kept(name: str) -> bool:
    """Say whether the machine has been started to its end (it has a record) and its keeper lives (it holds its lock).

    A shared lock is tried, so that many `berth run` may ask at once.
    """
    import fcntl

    if not any(map(os.path.exists, fastpath.records(name))):
        return False
    try:
        fd = os.open(fastpath.keeper_lock(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _connect_slow(wanted: str | None, options: Options) -> tuple[str, _socket.socket]:
    """Have the machine booted or repaired, saying what happens only to a terminal: stderr is the command's."""
    from berth.cli import progress
    from berth.cli.ending import clean_up_when_terminated
    from berth.layout import Layout
    from berth.lifecycle import Machines

    clean_up_when_terminated()  # while it boots; `session` has its own ways
    machines = Machines(Layout.from_environment())
    name = machines.resolve(wanted)
    mode = options.values.get("progress", "auto" if sys.stderr.isatty() else "none")
    with progress.display(mode) as shown:
        return name, machines.connect(name, progress=shown)


def share_ssh_agent(name: str) -> None:
    """Tell the machine's keeper which SSH agent is ours now: it may be another than when the machine booted."""
    path = os.environ.get("SSH_AUTH_SOCK", "")
    target = os.path.join(fastpath.live(name), "ssh-agent")
    if not path.startswith("/"):
        return
    try:
        with open(target, "rb") as file:
            if file.read() == os.fsencode(path):
                return
    except OSError:
        pass
    partial = f"{target}.{os.getpid()}.partial"
    try:
        with open(partial, "xb") as file:
            file.write(os.fsencode(path))
        os.replace(partial, target)
    except OSError:
        return  # the command matters more than the forwarding


# The request ------------------------------------------------------------------------------------------------------


def make_request(options: Options, name: str) -> ExecRequest:
    """Say what the agent is to run, as whom, where and with which environment."""
    from berth.wire.messages import ExecRequest

    boot = load_boot_config(name)
    workdir, cwd = options.values.get("workdir"), find_cwd(boot)
    if workdir is not None:
        here = os.fsdecode(cwd) if cwd else ""
        cwd = os.fsencode(workdir if workdir.startswith("/") else os.path.join(here or "/", workdir))
    argv = options.argv
    # One argument that only a shell could have meant: `berth run 'ls | wc -l'`.
    shell = "shell" in options.flags or (len(argv) == 1 and not _SHELL_LETTERS.isdisjoint(argv[0]))
    tty = None if "detach" in options.flags else terminal_size(force="tty" in options.flags)
    return ExecRequest(
        argv=tuple(os.fsencode(word) for word in argv),
        shell=shell and bool(argv),
        env=tuple(make_environment(options, boot, tty=tty is not None)),
        cwd=cwd,
        cwd_optional=workdir is None,
        user=find_user(options),
        tty=tty,
        detach="detach" in options.flags,
    )


def terminal_size(*, force: bool = False) -> TerminalSize | None:
    """Return the window's size when the command is to have a terminal: stdin and stdout are one, or `force`."""
    if not force and not (os.isatty(0) and os.isatty(1)):
        return None
    from berth import terminal

    return terminal.window_size(next((fd for fd in (1, 0, 2) if os.isatty(fd)), 1))


def find_user(options: Options) -> str | None:
    """Return the protocol's ``USER[:GROUP]``; None is the host user's twin."""
    user = "root" if "root" in options.flags else options.values.get("uid", options.values.get("user"))
    gid = options.values.get("gid")
    if gid is None:
        return user
    return f"{user if user is not None else os.getuid()}:{gid}"


def make_environment(options: Options, boot: dict[str, object], *, tty: bool) -> list[bytes]:
    """Return the ``K=V`` of -e and --env-file over what every session gets: TERM and COLORTERM with a terminal, LANG.

    LANG is C.UTF-8, for the host's own locale is seldom installed in a machine and programs complain loudly then;
    a machine whose configuration sets LANG or LC_ALL keeps its own.
    """
    env: dict[bytes, bytes] = {}
    own = [str(item).partition("=")[0] for item in _list_of(boot, "env")]
    if "LANG" not in own and "LC_ALL" not in own:
        env[b"LANG"] = b"C.UTF-8"
    if tty:
        from berth import terminal

        env |= {key: value for key, _, value in (item.partition(b"=") for item in terminal.environment())}
    env |= options.env
    return [key + b"=" + value for key, value in env.items()]


def read_env_file(path: str) -> list[bytes]:
    """Read ``K=V`` or ``K`` a line; empty lines and lines that start with # are skipped, quotes mean nothing."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise InvalidArgumentError(f"environment file {path} can't be read: {error.strerror}") from error
    if b"\0" in data:
        raise InvalidArgumentError(f"invalid environment file {path}: it has a NUL byte")
    lines = [line.lstrip() for line in data.removeprefix(b"\xef\xbb\xbf").splitlines()]
    return [line for line in lines if line and not line.startswith(b"#")]


# The working directory --------------------------------------------------------------------------------------------


def load_boot_config(name: str) -> dict[str, object]:
    """Read the machine's boot configuration unchecked; empty when it can't be read (the session works without)."""
    from berth.wire import jsontext  # its JSON costs nothing more here; `import json` would cost 8 ms

    try:
        with open(fastpath.boot_config(name), "rb") as file:
            return jsontext.decode_object(file.read())
    except (OSError, BerthError):
        return {}


def _list_of(boot: dict[str, object], member: str) -> list[object]:
    from berth.wire.jsontext import is_list

    value = boot.get(member)
    return value if is_list(value) else []


def find_cwd(boot: dict[str, object]) -> bytes | None:
    """Return our working directory as the machine sees it; None when it isn't mounted there (then: the home)."""
    shares = list_shares(boot)
    for here in _working_directories():
        for source, destination in shares:
            if here == source or here.startswith(source.rstrip("/") + "/"):
                inside = here[len(source.rstrip("/")) :].lstrip("/")
                return os.fsencode(os.path.join(destination, inside) if inside else destination)
    return None


def _working_directories() -> list[str]:
    """Return the name the shell uses (it may lead through symbolic links), then the kernel's."""
    found: list[str] = []
    logical = os.environ.get("PWD", "")
    try:
        if logical.startswith("/") and ".." not in logical.split("/") and os.path.samefile(logical, "."):
            found.append(logical)
    except OSError:
        pass
    try:
        found.append(os.getcwd())
    except OSError:
        return []  # it was deleted
    return found


def list_shares(boot: dict[str, object]) -> list[tuple[str, str]]:
    """Return (path on the host, path in the machine) of what is mounted, the longest path first.

    Each is listed under its real path too, for a home that is reached through a symbolic link.
    """
    shares: list[tuple[str, str]] = []
    if boot.get("homeMount", "rw") != "none":
        home = _home()
        shares += [(home, home), (os.path.realpath(home), home)]
    for mount in _list_of(boot, "mounts"):
        match mount:
            case {"source": str(source), "destination": str(destination)}:
                shares += [(source, destination), (os.path.realpath(source), destination)]
            case _:
                pass
    return sorted(set(shares), key=lambda share: -len(share[0]))


def _home() -> str:
    import pwd

    try:
        return os.path.normpath(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return os.path.normpath(os.environ.get("HOME", "/nonexistent"))
