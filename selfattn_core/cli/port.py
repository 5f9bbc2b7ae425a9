"""The `port`, `inspect` and `dialects` commands."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from selfattn_core.cli import completion
from selfattn_core.cli.exit_codes import CHECK_FAILED
from selfattn_core.files.targets import STANDARD_OUTPUT, report_target, target_problems, write_report

__all__ = ["dialects", "given_settings", "inspect", "port"]


class _NamedPath(click.Path):
    """A path; an empty one, as of a shell variable that is not set, would be the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty; name a file.", param, ctx)
        return super().convert(value, param, ctx)


@click.command()
@click.argument("file", type=_NamedPath())
@click.option(
    "--from",
    "own",
    metavar="FILE.toml",
    shell_complete=completion.files,
    multiple=True,
    help="A dialect of your own, to be considered too; may be repeated.",
)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    shell_complete=completion.files,
    help="Write all of it as JSON; - is standard output.",
)
def inspect(file: Path, own: tuple[str, ...], tensors: bool, json_file: str | None) -> None:
    """The attention blocks in a checkpoint, the dialects that fit them, and why others do not.

    FILE is a checkpoint of a layer or of a whole network, in any format that can be read. Of the values only
    u and v of spectral norm are read.
    """
    from selfattn_core.porting.inspect import inspect as run

    json_file = _json_target(json_file, {"FILE": file} | {f"--from {path}": Path(path) for path in own})
    report = run(file, dialects=own)
    text = report.to_text()
    if tensors:
        rows = "\n".join(f"  {key} {shape} {dtype}" for key, (shape, dtype) in report.tensors.items())
        text = f"{text}\ntensors\n{rows}"
    click.echo(text, err=json_file == STANDARD_OUTPUT)
    if json_file:
        write_report(json_file, _as_json(report.to_dict()))


@click.command()
@click.argument("source", metavar="SRC", type=_NamedPath())
@click.argument("target", metavar="DST", type=_NamedPath())
@click.option(
    "--from",
    "dialect",
    metavar="DIALECT|FILE.toml",
    shell_complete=completion.portable_dialects,
    help="What SRC is; `selfattn dialects` lists them. Needed unless SRC is canonical.",
)
@click.option(
    "--prefix", multiple=True, help="Which block of a whole network, with * for any text; may be repeated."
)
@click.option(
    "--to",
    default="canonical",
    show_default=True,
    metavar="DIALECT",
    shell_complete=completion.portable_dialects,
    help="What DST becomes.",
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="What SRC does not say, for example use_scale=false.",
)
@click.option(
    "--check",
    metavar="IO.npz",
    type=_NamedPath(),
    help="x and y of the source's layer, to be compared.",
)
@click.option(
    "--dtype", type=click.Choice(["float16", "float32", "float64"]), help="By default the source's."
)
@click.option("--keep-spectral-norm", is_flag=True, help="Keep raw kernels with u and v instead of dividing.")
@click.option(
    "--allow-unused", is_flag=True, help="Go on although tensors under the prefix are read by nothing."
)
@click.option(
    "--whole",
    is_flag=True,
    help="DST is all of SRC, a file of torch or .safetensors, with every attention block in the form of --to.",
)
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@click.option("--force", is_flag=True, help="Replace DST if it exists.")
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    shell_complete=completion.files,
    help="Write the report as JSON; - is standard output.",
)
def port(
    source: Path,
    target: Path,
    dialect: str | None,
    prefix: tuple[str, ...],
    to: str,
    settings: tuple[str, ...],
    check: Path | None,
    dtype: str | None,
    keep_spectral_norm: bool,
    allow_unused: bool,
    whole: bool,
    dry_run: bool,
    force: bool,
    json_file: str | None,
) -> None:
    """Bring attention weights from SRC, anybody's checkpoint, into DST, whose suffix chooses the format.

    What was done to every tensor is reported. Exit code 1 means that a check failed, 2 a refusal; nothing is written then.
    """
    from selfattn_core.porting.errors import VerificationError
    from selfattn_core.porting.port import port as run

    given = given_settings(settings)
    kept = {"SRC": source, "DST": target, "the file of --check": check, "the dialect of --from": dialect}
    json_file = _json_target(json_file, {name: Path(path) for name, path in kept.items() if path})
    try:
        report = run(
            source,
            target,
            dialect=dialect,
            prefix=prefix or None,
            to=to,
            settings=given,
            check=check,
            dtype=dtype,
            keep_spectral_norm=keep_spectral_norm,
            strict=not allow_unused,
            dry_run=dry_run,
            overwrite=force,
            whole=whole,
        )
    except VerificationError as error:
        report = error.report
    click.echo(report.to_text(), err=json_file == STANDARD_OUTPUT)
    if json_file:
        write_report(json_file, _as_json(report.to_dict()))
    if not report.passed:
        sys.exit(CHECK_FAILED)


@click.command()
@click.argument("name", required=False, shell_complete=completion.dialects)
def dialects(name: str | None) -> None:
    """The known implementations; with NAME, one as a TOML file to start your own from."""
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


def given_settings(options: Sequence[str]) -> dict[str, str]:
    """What `--set` says, by name.

    Args:
        options: NAME=VALUE, as often as it was given.

    Raises:
        click.UsageError: if one is spelled otherwise.

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


def _json_target(target: str | None, keep: Mapping[str, Path]) -> str | None:
    """Where the report goes; refused, before anything is done, if it could not be written or would replace something else."""
    found = None if target is None else report_target(target)
    problems = target_problems({} if found is None else {"json": found}, keep=keep)
    if problems:
        raise click.UsageError(f"{'; '.join(problems)}.")
    return found


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
