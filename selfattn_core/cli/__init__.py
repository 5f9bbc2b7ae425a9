"""The `selfattn` command: one file for each subcommand, and the code that they share."""

from selfattn_core.cli.command import main

__all__ = ["main"]
