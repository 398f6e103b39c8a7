"""Linux machines that feel like an extension of your own computer: the Python API.

    import berth

    machine = berth.Machine.create("debian:12", name="dev")
    result = machine.run(["uname", "-a"], capture=True)
    print(result.stdout.decode())

The same code as the commands. Synchronous; errors are `BerthError` and its kinds (`berth.errors` draws the tree).
Names are loaded when they are first used, so that importing berth costs the command line nothing.
"""

from __future__ import annotations

from berth import version as _version

__version__ = _version.VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from berth.api import Client, Completed, Image, Machine
    from berth.errors import (
        AgentError,
        BerthError,
        BootError,
        BusyError,
        CommandError,
        DeadlineError,
        ExistsError,
        FormatError,
        ImageFormatError,
        InvalidArgumentError,
        InvalidStateError,
        NotFoundError,
        ProtocolError,
        RegistryError,
        StateFormatError,
        UnsupportedError,
    )

__all__ = [
    "AgentError", "BerthError", "BootError", "BusyError", "Client", "CommandError", "Completed", "DeadlineError",
    "ExistsError", "FormatError", "Image", "ImageFormatError", "InvalidArgumentError", "InvalidStateError", "Machine",
    "NotFoundError", "ProtocolError", "RegistryError", "StateFormatError", "UnsupportedError", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Load a public name on its first use. Source: PEP 562."""
    if name not in __all__:
        raise AttributeError(f"module 'berth' has no attribute '{name}'")
    import importlib

    module = "berth.api" if name in ("Client", "Completed", "Image", "Machine") else "berth.errors"
    return getattr(importlib.import_module(module), name)
