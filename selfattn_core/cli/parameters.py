"""Arguments and options that several commands share."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from selfattn_core.cli import completion
from selfattn_core.files.targets import report_target, target_problems

__all__ = ["NamedPath", "Seconds", "checked_target", "given_settings", "report_option"]


class NamedPath(click.Path):
    """A path. An empty path, for example from an unset shell variable, would mean the current folder, so it is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, if the value is not empty."""
        if value == "":
            self.fail("the path is empty; name a file.", param, ctx)
        return super().convert(value, param, ctx)


class Seconds(click.FloatRange):
    """A positive number of seconds, for the option `--explore`, whose value may be left out."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, if it is finite. The name of a backend is not one."""
        try:
            seconds = float(value)
        except ValueError:
            self.fail(
                f"got {value!r}, expected a number of seconds: write BACKEND before --explore, or --explore=60.",
                param,
                ctx,
            )
        if not math.isfinite(seconds):
            self.fail(f"got {value}, expected a positive number of seconds, such as 60.", param, ctx)
        return super().convert(value, param, ctx)


def report_option(form: str, summary: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option `--FORM FILE` for a report. The command receives its value as `FORM_file`.

    Args:
        form: format of the report: json, html, junit or markdown.
        summary: help text of the option.
    """
    return click.option(
        f"--{form}", f"{form}_file", metavar="FILE", shell_complete=completion.files, help=summary
    )


def given_settings(options: Sequence[str]) -> dict[str, str]:
    """The settings of `--set`, by name.

    Args:
        options: one NAME=VALUE for each `--set`.

    Raises:
        click.UsageError: if an option is not NAME=VALUE.

    Example:
        >>> given_settings(["use_scale=false"])
        {'use_scale': 'false'}
    """
    given = {}
    for setting in options:
        name, equals, value = setting.partition("=")
        if not (name and equals and value):
            raise click.UsageError(f"--set {setting}: expected NAME=VALUE, for example use_scale=false.")
        given[name] = value
    return given


def checked_target(target: str | None, keep: Mapping[str, Path]) -> str | None:
    """The target of `--json`, checked before the command does any work.

    Args:
        target: the value of the option.
        keep: files that the report must not replace, by their names in the usage.

    Raises:
        click.UsageError: if the report cannot be written there.
    """
    found = None if target is None else report_target(target)
    problems = target_problems({} if found is None else {"json": found}, keep=keep)
    if problems:
        raise click.UsageError(f"{'; '.join(problems)}.")
    return found
