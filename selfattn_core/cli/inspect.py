"""The `inspect` command."""

import json
from pathlib import Path

import click

from selfattn_core.cli import completion
from selfattn_core.cli.parameters import NamedPath, checked_target, report_option
from selfattn_core.files.targets import STANDARD_OUTPUT, write_report

__all__ = ["inspect"]


@click.command()
@click.argument("file", type=NamedPath())
@click.option(
    "--from",
    "own",
    metavar="FILE.toml",
    shell_complete=completion.files,
    multiple=True,
    help="Also try this dialect of your own. Can be repeated.",
)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@report_option("json", "Write the whole result as JSON; - means standard output.")
def inspect(file: Path, own: tuple[str, ...], tensors: bool, json_file: str | None) -> None:
    """Find the attention blocks in a checkpoint.

    Shows for each block which dialects fit and why the others do not. FILE contains one layer or a whole network, in any
    readable format. The command reads no values except u and v of spectral norm.
    """
    from selfattn_core.porting.inspect import inspect as run

    json_file = checked_target(json_file, {"FILE": file} | {f"--from {path}": Path(path) for path in own})
    report = run(file, dialects=own)
    text = report.to_text()
    if tensors:
        rows = "\n".join(f"  {key} {shape} {dtype}" for key, (shape, dtype) in report.tensors.items())
        text = f"{text}\ntensors\n{rows}"
    click.echo(text, err=json_file == STANDARD_OUTPUT)
    if json_file:
        write_report(json_file, f"{json.dumps(report.to_dict(), indent=1, ensure_ascii=False)}\n")
