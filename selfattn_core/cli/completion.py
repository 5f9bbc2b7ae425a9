"""Shell completion of backends, cases, dialects and files."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["backends", "cases", "dialects", "files", "portable_dialects"]


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Files, which the shell lists itself. For options that accept files and other values.

    Args:
        context: context of the command line so far.
        parameter: the parameter to complete.
        incomplete: the typed part of its value.

    Example:
        >>> [item.type for item in files(click.Context(click.Command("port")), click.Option(["--json"]), "re")]
        ['file']
    """
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def backends(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """The built-in backends that the command line does not name yet.

    Args:
        context: context of the command line so far.
        parameter: the parameter to complete.
        incomplete: the typed part of its value.

    Example:
        >>> command = click.Command("conform", params=[click.Argument(["names"], nargs=-1)])
        >>> context = command.make_context("conform", ["keras-jax"])
        >>> [item.value for item in backends(context, command.params[0], "keras")]
        ['keras-tensorflow', 'keras-torch']
    """
    from click.shell_completion import CompletionItem

    from selfattn_core.conformance.backends import KNOWN

    named = context.params.get(parameter.name or "") or ()
    return [CompletionItem(name) for name in KNOWN if name.startswith(incomplete) and name not in named]


def cases(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Cases and, after a slash, their dtypes and layouts.

    Args:
        context: context of the command line so far.
        parameter: the parameter to complete.
        incomplete: the typed part of its value.

    Example:
        >>> context = click.Context(click.Command("conform"))
        >>> [item.value for item in cases(context, click.Option(["--case"]), "SA-FWD-001/")]
        ['SA-FWD-001/float32', 'SA-FWD-001/float64']
    """
    from click.shell_completion import CompletionItem

    from selfattn_core.conformance.reproduce import case_names

    return [CompletionItem(name) for name in case_names(incomplete)]


def dialects(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Every known dialect, and files, because a dialect can be the user's own TOML file.

    Args:
        context: context of the command line so far.
        parameter: the parameter to complete.
        incomplete: the typed part of its value.

    Example:
        >>> context = click.Context(click.Command("dialects"))
        >>> [(item.type, item.value) for item in dialects(context, click.Argument(["name"]), "torch")]
        [('file', 'torch'), ('plain', 'torch'), ('plain', 'torchgan')]
    """
    from selfattn_core.porting.dialects.catalogue import dialect_names

    return _names_and_files(dialect_names(), incomplete)


def portable_dialects(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> "list[CompletionItem]":
    """The result of `dialects`, without the dialects that are refused.

    Args:
        context: context of the command line so far.
        parameter: the parameter to complete.
        incomplete: the typed part of its value.

    Example:
        >>> context = click.Context(click.Command("port"))
        >>> [(item.type, item.value) for item in portable_dialects(context, click.Option(["--to"]), "torch")]
        [('file', 'torch'), ('plain', 'torch')]
    """
    from selfattn_core.porting.dialects.catalogue import dialect, dialect_names

    known = [name for name in dialect_names() if name.startswith(incomplete)]
    return _names_and_files([name for name in known if not dialect(name).refused], incomplete)


def _names_and_files(names: list[str], incomplete: str) -> "list[CompletionItem]":
    from click.shell_completion import CompletionItem

    # Files come first, because at that word bash drops all names before it. It then offers files only if no name fits.
    return [
        CompletionItem(incomplete, type="file"),
        *(CompletionItem(name) for name in names if name.startswith(incomplete)),
    ]
