"""The `selfattn` command: one file a command, and what the commands share."""

from selfattn_core.cli.command import main

__all__ = ["main"]
