"""The `dialects` command."""

import click

from selfattn_core.cli import completion

__all__ = ["dialects"]


@click.command()
@click.argument("name", required=False, shell_complete=completion.dialects)
def dialects(name: str | None) -> None:
    """List known implementations of the layer.

    With NAME, print that dialect as a TOML file, from which you can write your own.
    """
    from selfattn_core.porting.dialects.catalogue import dialect, dialect_names

    if name:
        click.echo(dialect(name).text, nl=False)
        return
    for known in dialect_names():
        found = dialect(known)
        click.echo(f"{known:<21} {'refused: ' if found.refused else ''}{found.title}")
        roles = ", ".join(f"{role} = {path}" for role, path in found.variants[0].roles.items())
        detail = found.reason if found.refused else f"{roles}; {found.source}"
        click.echo(f"{'':<21} {detail}")
