"""The version of this berth, for `--version` and the agent's hello. A test holds it equal to pyproject.toml's."""

VERSION = "0.1.0"
