"""The `verify` command."""

import json
import sys
import warnings
from pathlib import Path
from typing import Literal

import click

from selfattn_core.cli import completion
from selfattn_core.cli.exit_codes import CHECK_FAILED
from selfattn_core.cli.guard import in_words_of_the_command
from selfattn_core.cli.parameters import given_settings, report_option
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
    help="Dialect of WEIGHTS; `selfattn dialects` lists them. Not needed for a canonical file.",
)
@click.option("--prefix", metavar="PREFIX", help="Which block, if WEIGHTS is a whole network.")
@click.option(
    "--block", metavar="NAME", help="Which layer, if WEIGHTS is a canonical file with several layers."
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="A setting that WEIGHTS does not store, as for `selfattn port`. Can be repeated.",
)
@click.option(
    "--allow-unused", is_flag=True, help="Continue even if some tensors under the prefix are unused."
)
@click.option(
    "--container", metavar="NAME", help="Format of ARTIFACT. Needed only if the suffix does not determine it."
)
@click.option("--runtime", metavar="NAME", help="Runtime for ARTIFACT. Needed only if there are several.")
@click.option(
    "--input", "input_name", metavar="NAME", help="Name of the input, or where part of a network starts."
)
@click.option("--output", "output_name", metavar="NAME", help="Name of the output y, or where the part ends.")
@click.option("--map", "map_name", metavar="NAME", help="Name of the output that is the attention map.")
@click.option(
    "--layout",
    type=click.Choice(["channels_last", "channels_first"]),
    help="Axis order of ARTIFACT. Needed only if its shapes do not determine it.",
)
@click.option(
    "--size",
    type=_Size(),
    help="Height and width of the input in positions, if ARTIFACT accepts any. Default: several sizes.",
)
@click.option(
    "--precision",
    type=click.Choice(["float64", "float32", "float16", "bfloat16", "int8"]),
    help="Precision that sets the tolerance. Default: the precision that ARTIFACT stores.",
)
@click.option(
    "--features",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Use your own feature map as the input, from an .npy or .npz file.",
)
@click.option("--array", metavar="NAME", help="Which array, if the file of --features has several.")
@click.option(
    "--sample",
    metavar="N",
    type=click.IntRange(min=0),
    help="Which sample, if the file of --features has several.",
)
@report_option("json", "Write the report as JSON; - means standard output.")
@report_option("html", "Write the report as an HTML page.")
def verify(
    artifact: str,
    weights: Path,
    dialect: str | None,
    prefix: str | None,
    block: str | None,
    settings: tuple[str, ...],
    allow_unused: bool,
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
    """Check an exported file against its weights.

    ARTIFACT is an exported file of the layer, or module:function. It runs in its own runtime and in a separate process.
    Its answers are compared with the numpy definition at WEIGHTS. Some formats contain code, and that code runs: verify
    only files that you would run anyway.

    Exit code 1: the file computes another function. 2: it cannot be checked. 3: its runtime is not installed.
    """
    from selfattn_core.verifying import verify as run

    given = given_settings(settings)
    files = {"json": json_file, "html": html_file}
    targets = {form: report_target(target) for form, target in files.items() if target is not None}
    read = {"ARTIFACT": artifact, "WEIGHTS": str(weights), "the file of --features": str(features or "")}
    keep = {name: path for name, path in read.items() if path and Path(path).exists()}
    problems = target_problems(targets, keep=keep) + shared_targets(targets)
    if dialect is None and (prefix or given or allow_unused):
        problems.append(
            "--prefix, --set and --allow-unused are for a file that is not canonical: name its dialect with --from"
        )
    if dialect is not None and block is not None:
        problems.append(
            "--block is for a canonical file: with --from, pass --prefix, the beginning of the block's keys"
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
                strict=not allow_unused,
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
