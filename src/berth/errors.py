"""The whole error tree of berth.

Owns: every exception that berth raises on purpose. Anyone may raise and catch them; only `cli` renders them.

    BerthError                  code "internal"      exit 1
    ├── NotFoundError           code "not_found"     a machine, image, file that was named is not there
    ├── ExistsError             code "exists"        the name is taken
    ├── InvalidArgumentError    code "invalid_argument"  what was given breaks a rule (CLI: exit 2)
    ├── InvalidStateError       code "invalid_state" right thing, wrong moment (running, stopped, broken)
    ├── BusyError               code "busy"          somebody else holds it
    ├── DeadlineError           code "timeout"       it did not happen in time
    ├── BootError               code "boot"          a machine was started and did not come up
    ├── UnsupportedError        code "unsupported"   this host cannot; names what is missing and how to get it
    ├── FormatError             code "format"        a document or archive breaks its specification
    │   ├── ImageFormatError    an OCI document, layer or archive
    │   └── StateFormatError    one of berth's own files (damaged, or written by a newer berth)
    ├── RegistryError           code "registry"      a registry refused or can't be reached
    ├── ProtocolError           code "protocol"      the other side of a connection broke docs/protocol.md
    ├── AgentError              code from the agent  the guest agent refused a request
    └── CommandError            code "command"       a program that berth ran failed

Messages are lower case, name what and which (``machine 'dev' is running``) and have no full stop;
a hint is what to do, a command where there is one.
"""

from __future__ import annotations

TYPE_CHECKING = False  # the real one would make the fast path import typing, 4 ms
if TYPE_CHECKING:
    from typing import ClassVar

MAKE_ROOM = "make room there: berth system prune, or BERTH_DATA_DIR on a larger disk"  # the hint for a full disk


class BerthError(Exception):
    """Base of every error that berth raises on purpose."""

    code: ClassVar[str] = "internal"
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class NotFoundError(BerthError):
    code = "not_found"


class ExistsError(BerthError):
    code = "exists"


class InvalidArgumentError(BerthError):
    code = "invalid_argument"
    exit_status = 2


class InvalidStateError(BerthError):
    code = "invalid_state"


class BusyError(BerthError):
    code = "busy"


class DeadlineError(BerthError):
    code = "timeout"


class BootError(BerthError):
    code = "boot"


class UnsupportedError(BerthError):
    code = "unsupported"


class FormatError(BerthError):
    code = "format"


class ImageFormatError(FormatError):
    """An OCI document, layer or archive breaks the image-spec."""


class StateFormatError(FormatError):
    """One of berth's own files is damaged, or was written by a newer berth."""


class RegistryError(BerthError):
    code = "registry"


class ProtocolError(BerthError):
    code = "protocol"


class AgentError(BerthError):
    """The guest agent refused a request; `agent_code` is its word for why (docs/protocol.md)."""

    code = "agent"

    def __init__(self, agent_code: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.agent_code = agent_code


class CommandError(BerthError):
    """A program that berth ran failed. `stderr` is the tail of what it said; `status` is negative for a signal."""

    code = "command"

    def __init__(self, argv: tuple[str, ...], status: int, stderr: str = "", *, hint: str | None = None) -> None:
        said = stderr.strip().splitlines()
        tail = f": {said[-1]}" if said else ""
        how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
        super().__init__(f"{argv[0]} {how}{tail}", hint=hint)
        self.argv = argv
        self.status = status
        self.stderr = stderr
