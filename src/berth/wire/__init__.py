"""The agent protocol (docs/protocol.md), sans-I/O: frames, messages, connections. Layer 2; no sockets, no asyncio.

Import from the modules: nothing is imported here, because `berth run` pays for each of them.
"""
