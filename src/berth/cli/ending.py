"""How a command ends: what went wrong, in words on stderr, and the exit status. `cli` only.

Every command comes by here, also `berth run`, so nothing else is imported at its top.
"""

from __future__ import annotations

import os
import sys

from berth.errors import MAKE_ROOM, BerthError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BERTH_FAILED = 125  # of `run` alone, once its words are understood: its other statuses are the command's
EXIT_NOT_FOUND = 127  # of `run`: the machine has no such command
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


def guarded(work: Callable[[], int], *, debug: bool, failed: int | None = None) -> int:
    """Run `work`; return its exit status, having printed any error. failed: the status of an error, whatever it is."""
    try:
        return work()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as end:  # by argparse when it has shown the help, or by a signal
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError as error:
        # Who read our output has left (`| head -1`): nothing to say, and nobody to say it to.
        if debug:
            show_traceback(error)
        _forget_stdout()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if debug:
            show_traceback(error)
        return show_error(error, failed=failed)


def clean_up_when_terminated() -> None:
    """Let SIGTERM and SIGHUP end us as an exception, so that a create that is killed takes back what it made."""
    import signal

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has it ignored: so it stays
            signal.signal(number, lambda received, _: sys.exit(128 + received))


def show_error(error: Exception, *, failed: int | None = None) -> int:
    """Print `berth: MESSAGE` and `hint: …` on stderr; return the exit status that goes with it, or `failed`."""
    hint: str | None = None
    status = EXIT_FAILED
    if isinstance(error, BerthError):
        message, hint, status = error.message, error.hint, error.exit_status
    elif isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        message, hint = f"{where}{error.strerror[0].lower()}{error.strerror[1:]}", _way_out(error)
    else:
        message = f"internal error: {type(error).__name__}: {error}"
        hint = "this is a bug in berth; the same command after 'berth --debug' shows where"
    say(f"{_paint('berth:')} {_one_line(message)}")
    if hint:
        say(f"hint: {_one_line(hint)}")
    return status if failed is None else failed


def _way_out(error: OSError) -> str | None:
    """Say what helps where the system refuses berth its own folders."""
    import errno

    from berth.layout import Layout

    if not isinstance(error.filename, str | bytes):  # not a file of ours: stdout may be on another disk
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MAKE_ROOM
    if error.errno not in (errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
        return None
    layout, path = Layout.from_environment(), os.fsdecode(error.filename)
    roots = {
        "BERTH_RUNTIME_DIR": layout.runtime, "BERTH_DATA_DIR": layout.data, "BERTH_CACHE_DIR": layout.cache,
        "BERTH_CONFIG_DIR": layout.config,
    }  # fmt: skip
    for name, root in roots.items():
        if path.startswith("/") and os.path.commonpath([path, str(root)]) in (path, str(root)):
            unset = ", or unset XDG_RUNTIME_DIR" if name == "BERTH_RUNTIME_DIR" else ""
            return f"{root} has to be a folder of yours: set {name} to one{unset}"
    return None


def say(line: str) -> None:
    """Print a line for the person, on stderr. What stderr cannot encode is printed as escapes."""
    stream = sys.stderr
    try:
        stream.write(line.encode(stream.encoding or "utf-8", "backslashreplace").decode(stream.encoding or "utf-8"))
        stream.write("\n")
        stream.flush()
    except (OSError, ValueError):
        return  # stderr is closed or full: the exit status must do


def show_traceback(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error)


def colour_wanted(stream: object) -> bool:
    """Say whether `stream` is a terminal that may get colours."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _paint(text: str) -> str:
    return f"\033[1;31m{text}\033[m" if colour_wanted(sys.stderr) else text


def _one_line(text: str) -> str:
    # An error may quote what a guest, an archive or a registry said: no line breaks, no terminal escapes.
    return "".join(letter if letter.isprintable() or "\udc80" <= letter <= "\udcff" else " " for letter in text).strip()


def _forget_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush cannot fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
    finally:
        os.close(null)
