"""The `port` command."""

import json
import sys
from pathlib import Path

import click

from selfattn_core.cli import completion
from selfattn_core.cli.exit_codes import CHECK_FAILED
from selfattn_core.cli.parameters import NamedPath, checked_target, given_settings, report_option
from selfattn_core.files.targets import STANDARD_OUTPUT, write_report

__all__ = ["port"]


@click.command()
@click.argument("source", metavar="SRC", type=NamedPath())
@click.argument("target", metavar="DST", type=NamedPath())
@click.option(
    "--from",
    "dialect",
    metavar="DIALECT|FILE.toml",
    shell_complete=completion.portable_dialects,
    help="Dialect of SRC; `selfattn dialects` lists them. Not needed for a canonical file.",
)
@click.option(
    "--prefix",
    metavar="PREFIX",
    multiple=True,
    help="Which block of a whole network; * matches any text. Can be repeated.",
)
@click.option(
    "--to",
    default="canonical",
    show_default=True,
    metavar="DIALECT",
    shell_complete=completion.portable_dialects,
    help="Dialect of DST.",
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="A setting that SRC does not store, for example use_scale=false. Can be repeated.",
)
@click.option(
    "--check",
    metavar="IO.npz",
    type=NamedPath(),
    help="Compare with this x and y, an input and an output of the original layer.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32", "float64"]),
    help="Dtype of DST. Default: that of SRC.",
)
@click.option(
    "--keep-spectral-norm",
    is_flag=True,
    help="Write raw kernels with u and v, instead of kernels divided by their norm.",
)
@click.option(
    "--allow-unused", is_flag=True, help="Continue even if some tensors under the prefix are unused."
)
@click.option(
    "--whole",
    is_flag=True,
    help="Write all of SRC, a torch or .safetensors file, with each attention block in the dialect of --to.",
)
@click.option("--dry-run", is_flag=True, help="Do everything except write.")
@click.option("--force", is_flag=True, help="Replace DST if it exists.")
@report_option("json", "Write the report as JSON; - means standard output.")
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
    """Convert attention weights between dialects.

    SRC is a checkpoint of one layer or of a whole network. The suffix of DST chooses its format. The report shows what
    happened to each tensor.

    Exit code 1: a check failed. 2: refused. In both cases DST is not written.
    """
    from selfattn_core.porting.errors import VerificationError
    from selfattn_core.porting.port import port as run

    given = given_settings(settings)
    kept = {"SRC": source, "DST": target, "the file of --check": check, "the dialect of --from": dialect}
    json_file = checked_target(json_file, {name: Path(path) for name, path in kept.items() if path})
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
        write_report(json_file, f"{json.dumps(report.to_dict(), indent=1, ensure_ascii=False)}\n")
    if not report.passed:
        sys.exit(CHECK_FAILED)
