"""The `selfattn` command group. Each subcommand is a file with its name, imported only when it is needed."""

from importlib import import_module

import click

from selfattn_core import __version__
from selfattn_core.cli.guard import GuardedGroup

__all__ = ["COMMANDS", "main"]

COMMANDS = ("attend", "backends", "conform", "dialects", "inspect", "port", "verify")
"""The subcommands. Each is a module of `selfattn_core.cli` that contains a click command of the same name."""


class _Commands(GuardedGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"selfattn_core.cli.{cmd_name}"), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="selfattn")
def main() -> None:
    """SAGAN-style 2-D self-attention: one function in PyTorch, Keras and Flax, proven equal."""
