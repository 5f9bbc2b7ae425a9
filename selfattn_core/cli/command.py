"""The `selfattn` command. Exit codes: 0 all well, 1 a check failed, 2 wrong usage or bad input, 3 something missing."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Literal

import click

from selfattn_core import __version__
from selfattn_core.cli import completion, port
from selfattn_core.cli.guard import GuardedGroup
from selfattn_core.cli.verify import verify

__all__ = ["main"]


@click.group(cls=GuardedGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="selfattn")
def main() -> None:
    """SAGAN-style 2-D self-attention: one function in PyTorch, Keras and Flax, proven equal."""


main.add_command(port.inspect)
main.add_command(port.port)
main.add_command(port.dialects)
main.add_command(verify)


@main.command()
def backends() -> None:
    """What is installed, in which version, on which devices, and how to get what is missing."""
    from selfattn_core.conformance.execution.visible_devices import devices_of
    from selfattn_core.conformance.protocol import REGISTRY
    from selfattn_core.installed import missing_modules

    installed = [each.framework for each in REGISTRY.values() if not missing_modules(each.requires)]
    seen = devices_of(list(dict.fromkeys(installed)))
    for name, registered in REGISTRY.items():
        missing = missing_modules(registered.requires)
        if missing:
            state = f"missing {', '.join(missing)}: pip install 'selfattn[{registered.extra}]'"
        else:
            versions = ", ".join(f"{module} {_version(module)}" for module in registered.requires)
            state = f"{versions}; {seen[registered.framework]}"
        click.echo(f"{name:<17} {state}")


@main.command()
@click.argument("names", metavar="[BACKEND]...", nargs=-1, shell_complete=completion.backends)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the random inputs."
)
@click.option(
    "--level",
    default="deploy",
    show_default=True,
    type=click.Choice(["core", "training", "gan", "deploy"]),
    help="How far to go; each level holds those before it.",
)
@click.option(
    "--case",
    "cases",
    metavar="ID[/DTYPE[/LAYOUT]]",
    multiple=True,
    shell_complete=completion.cases,
    help="Run only this case, or its runs in one dtype or layout; repeatable.",
)
@click.option(
    "--device",
    "devices",
    metavar="DEVICE",
    multiple=True,
    help="Compute on this device, in the framework's own words: cpu, cuda, cuda:1, mps, xpu, gpu, tpu. By default the CPU.",
)
@click.option(
    "--self-test",
    is_flag=True,
    help="Run the cases on broken implementations too, or on nothing else if no BACKEND is named.",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    shell_complete=completion.files,
    help="Write every verdict as JSON; - is standard output.",
)
@click.option(
    "--html", "html_file", metavar="FILE", shell_complete=completion.files, help="Write a page to read."
)
@click.option(
    "--junit",
    "junit_file",
    metavar="FILE",
    shell_complete=completion.files,
    help="Write JUnit XML, for a CI service.",
)
@click.option(
    "--markdown",
    "markdown_file",
    metavar="FILE",
    shell_complete=completion.files,
    help="Write Markdown, for a pull request.",
)
@click.option(
    "--diff",
    nargs=2,
    metavar="OLD NEW",
    type=click.Path(path_type=Path),
    help="Run nothing; say what changed between two JSON reports, and exit 1 if something is worse.",
)
def conform(
    names: tuple[str, ...],
    seed: int,
    level: Literal["core", "training", "gan", "deploy"],
    cases: tuple[str, ...],
    devices: tuple[str, ...],
    self_test: bool,
    json_file: str | None,
    html_file: str | None,
    junit_file: str | None,
    markdown_file: str | None,
    diff: tuple[Path, Path] | None,
) -> None:
    """Compare backends with the numpy specification, in units of the noise floor.

    BACKEND is a name that `selfattn backends` lists, or module:object for your own. Without one, all are checked.
    """
    from selfattn_core.cli import conform

    files = {"json": json_file, "html": html_file, "junit": junit_file, "markdown": markdown_file}
    targets = {form: target for form, target in files.items() if target is not None}
    if diff:
        if names or targets or self_test or devices or cases:
            raise click.UsageError("--diff runs nothing: give it two files, and no backend or other report.")
        sys.exit(conform.tell_difference(*diff))
    sys.exit(
        conform.conform(
            names,
            seed=seed,
            level=level,
            with_self_test=self_test,
            targets=targets,
            devices=devices,
            cases=cases,
        )
    )


class _Point(click.ParamType[tuple[int, int]]):
    """`y,x`, two whole numbers."""

    name = "y,x"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        try:
            y, x = (int(part) for part in parts)
        except ValueError:
            self.fail(f"got {value!r}; expected y,x in pixels of the image, for example 12,40.", param, ctx)
        return y, x


@main.command()
@click.argument("weights", type=click.Path(path_type=Path))
@click.argument("features", type=click.Path(path_type=Path))
@click.option(
    "--image",
    required=True,
    type=click.Path(path_type=Path),
    help="The picture that the features were computed from.",
)
@click.option(
    "--at",
    "points",
    metavar="Y,X",
    required=True,
    multiple=True,
    type=_Point(),
    help="Pixel of the image to attend from, y downwards; one to six of them.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The picture to write; .png, .pdf, .svg and more.",
)
@click.option("--block", help="Which layer of WEIGHTS, where there are several.")
@click.option("--array", help="Which array of FEATURES, where there are several.")
@click.option(
    "--sample", type=click.IntRange(min=0), help="Which sample of FEATURES, where there are several."
)
@click.option(
    "--layout",
    default="channels_last",
    show_default=True,
    type=click.Choice(["channels_last", "channels_first"]),
    help="Of FEATURES.",
)
@click.option("--title", default="", help="Above the picture.")
@click.option("--force", is_flag=True, help="Replace the picture if it exists.")
def attend(
    weights: Path,
    features: Path,
    image: Path,
    points: tuple[tuple[int, int], ...],
    out: Path,
    block: str | None,
    array: str | None,
    sample: int | None,
    layout: str,
    title: str,
    force: bool,
) -> None:
    """Draw what points of an image attend to.

    WEIGHTS is a canonical file, FEATURES an .npy or .npz file with the input of that layer for the image, with a batch
    axis or without. The map is computed by the numpy definition.
    """
    import warnings

    from selfattn_core.cli.attend import attend_files
    from selfattn_core.files.targets import target_problems
    from selfattn_core.viz import COLOURS, format_of, rows_figure, save_figure

    inputs = {"WEIGHTS": weights, "FEATURES": features, "--image": image}
    if problems := target_problems(
        {"out": str(out)}, keep={role: path for role, path in inputs.items() if path.is_file()}
    ):
        raise click.UsageError(f"{'; '.join(problems)}.")
    if len(points) > len(COLOURS):
        raise click.UsageError(
            f"--at: got {len(points)} points; expected 1 to {len(COLOURS)}, as there are that many colours."
        )
    if out.exists() and not force:
        raise click.UsageError(
            f"--out {out}: exists already and was left as it is; pass --force to replace it."
        )
    try:
        format_of(out)
        found = attend_files(
            weights, features, image, points, block=block, array=array, sample=sample, layout=layout
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            figure = rows_figure(
                found.image,
                found.rows,
                points,
                grid_size=found.grid_size,
                kv_pool=found.config.kv_pool,
                gamma=found.gamma,
                title=title,
            )
            save_figure(figure, out, overwrite=force)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for warning in caught:
        click.echo(f"warning: {warning.message}", err=True)
    height, width = found.grid_size
    about, of = "", ""
    if found.changed < height * width:
        about, of = "about ", f", from {found.changed} of {height * width} positions"
    click.echo(
        f"gamma {found.gamma:+.4g}: the layer changes its input by {about}{found.change:.1%} (root mean square{of})."
    )
    for number, ((y, x), position) in enumerate(zip(points, found.positions, strict=True)):
        click.echo(
            f"{number + 1}: pixel {y},{x} is position {position[0]},{position[1]} of {height}×{width}; it attends to "
            f"{found.statistics.effective_size[number]:.1f} keys, at a mean distance of "
            f"{found.statistics.mean_distance[number]:.1f} positions."
        )
    click.echo(f"written: {out}")


def _version(module: str) -> str:
    """The version of the distribution that a module comes from, without importing it."""
    distributions = importlib.metadata.packages_distributions().get(module, [module])
    return importlib.metadata.version(distributions[0])
