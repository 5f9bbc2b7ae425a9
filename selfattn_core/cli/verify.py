"""The `verify` command; not in its package, which takes a while to import and which `selfattn --help` does not need."""

import json
import sys
import warnings
from pathlib import Path
from typing import Literal

import click

from selfattn_core.cli import completion
from selfattn_core.cli.exit_codes import CHECK_FAILED
from selfattn_core.cli.guard import in_words_of_the_command
from selfattn_core.cli.port import given_settings
from selfattn_core.files.targets import (
    STANDARD_OUTPUT,
    report_target,
    shared_targets,
    target_problems,
    write_reports,
)

__all__ = ["verify"]


class _Size(click.ParamType[tuple[int, int]]):
    """`HxW`, two whole numbers."""

    name = "HxW"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        height, _, width = str(value).lower().replace("×", "x").partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            self.fail(f"got {value!r}; expected HxW in positions, for example 16x24.", param, ctx)
        return int(height), int(width)


@click.command()
@click.argument("artifact", shell_complete=completion.files)
@click.argument("weights", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "dialect",
    metavar="DIALECT|FILE.toml",
    shell_complete=completion.portable_dialects,
    help="What WEIGHTS is, unless canonical; `selfattn dialects` lists them.",
)
@click.option("--prefix", help="Which block of WEIGHTS, a whole network.")
@click.option("--block", help="Which layer of WEIGHTS, a canonical file with several.")
@click.option(
    "--set", "settings", metavar="NAME=VALUE", multiple=True, help="What WEIGHTS does not say, as for port."
)
@click.option("--container", metavar="NAME", help="Format of ARTIFACT, where its suffix does not say so.")
@click.option("--runtime", metavar="NAME", help="What runs it, where there are several.")
@click.option("--input", "input_name", metavar="NAME", help="The input, or where a part of a network begins.")
@click.option("--output", "output_name", metavar="NAME", help="The output y, or where it ends.")
@click.option("--map", "map_name", metavar="NAME", help="The attention map among the outputs.")
@click.option(
    "--layout",
    type=click.Choice(["channels_last", "channels_first"]),
    help="Of ARTIFACT, where its shapes do not say so.",
)
@click.option("--size", type=_Size(), help="Positions of the map, where sizes are open; by default several.")
@click.option(
    "--precision",
    type=click.Choice(["float64", "float32", "float16", "bfloat16", "int8"]),
    help="What the answers are held to; by default what ARTIFACT stores.",
)
@click.option(
    "--features",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=".npy or .npz with a map of your own, asked instead of the designed inputs.",
)
@click.option("--array", help="Which array of the file of --features, where there are several.")
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    help="Which sample of the file of --features, where there are several.",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    shell_complete=completion.files,
    help="Write the report as JSON; - is standard output.",
)
@click.option(
    "--html", "html_file", metavar="FILE", shell_complete=completion.files, help="Write a page to read."
)
def verify(
    artifact: str,
    weights: Path,
    dialect: str | None,
    prefix: str | None,
    block: str | None,
    settings: tuple[str, ...],
    container: str | None,
    runtime: str | None,
    input_name: str | None,
    output_name: str | None,
    map_name: str | None,
    layout: Literal["channels_last", "channels_first"] | None,
    size: tuple[int, int] | None,
    precision: str | None,
    features: Path | None,
    array: str | None,
    sample: int | None,
    json_file: str | None,
    html_file: str | None,
) -> None:
    """Does an exported file still compute the function of its weights?

    ARTIFACT is a file of the layer, or module:function. It is run in its own runtime, in a process of its own, and compared
    with the numpy definition at WEIGHTS. Some formats hold code, which runs: verify what you would run anyway.

    Exit code 1 means that it computes something else, 2 that it cannot be asked, 3 that its runtime is not installed.
    """
    from selfattn_core.verifying import verify as run

    given = given_settings(settings)
    files = {"json": json_file, "html": html_file}
    targets = {form: report_target(target) for form, target in files.items() if target is not None}
    read = {"ARTIFACT": artifact, "WEIGHTS": str(weights), "the file of --features": str(features or "")}
    keep = {name: path for name, path in read.items() if path and Path(path).exists()}
    problems = target_problems(targets, keep=keep) + shared_targets(targets)
    if dialect is None and (prefix or given):
        problems.append(
            "--prefix and --set say something of a file that is not canonical: name its dialect with --from"
        )
    if dialect is not None and block is not None:
        problems.append(
            "--block names a layer of a canonical file: with --from pass --prefix, the beginning of its keys"
        )
    if problems:
        raise click.UsageError(f"{'; '.join(problems)}.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            report = run(
                artifact,
                weights,
                container=container,
                runtime=runtime,
                input_name=input_name,
                output_name=output_name,
                map_name=map_name,
                layout=layout,
                size=size,
                precision=precision,
                features=features,
                array=array,
                sample=sample,
                block=block,
                dialect=dialect,
                prefix=prefix,
                settings=given or None,
            )
        except ValueError as error:
            raise click.UsageError(in_words_of_the_command(error)) from error
    for warning in caught:
        click.echo(f"warning: {warning.message}", err=True)
    click.echo(report.to_text(), err=STANDARD_OUTPUT in targets.values())
    texts = {
        "json": lambda: f"{json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)}\n",
        "html": report.to_html,
    }
    write_reports(targets, lambda form: texts[form]())
    if not report.passed:
        sys.exit(CHECK_FAILED)
