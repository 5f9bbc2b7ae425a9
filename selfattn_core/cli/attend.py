"""The `attend` command: draw the map of an image from files of weights and features."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.cli.guard import in_words_of_the_command
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.files.safetensors import SafetensorsError, read_header
from selfattn_core.installed import require
from selfattn_core.maps import MapStatistics, position_of, row_statistics
from selfattn_core.query_rows import attention_rows, relative_change
from selfattn_core.weights import FORMAT, load

__all__ = ["LARGEST_IMAGE", "WHOLE", "Attended", "attend", "attend_files", "read_image"]


LARGEST_IMAGE = 2**24
"""The most pixels of a picture that is decoded, 4096×4096."""

WHOLE = 2**24
"""The most weights of a map that are computed for the layer's change: 64×64 positions to as many keys, or a tenth of a
second. From a larger map, only as many rows are computed as have this number of weights."""


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


@click.command()
@click.argument("weights", type=click.Path(path_type=Path))
@click.argument("features", type=click.Path(path_type=Path))
@click.option(
    "--image",
    required=True,
    type=click.Path(path_type=Path),
    help="The picture from which the features were computed.",
)
@click.option(
    "--at",
    "points",
    metavar="Y,X",
    required=True,
    multiple=True,
    type=_Point(),
    help="A pixel of the image to attend from; y counts downwards. Repeat for up to six pixels.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The picture to write, as .png, .pdf, .svg and more.",
)
@click.option("--block", metavar="NAME", help="Which layer, if WEIGHTS has several.")
@click.option("--array", metavar="NAME", help="Which array, if FEATURES has several.")
@click.option(
    "--sample", metavar="N", type=click.IntRange(min=0), help="Which sample, if FEATURES has several."
)
@click.option(
    "--layout",
    default="channels_last",
    show_default=True,
    type=click.Choice(["channels_last", "channels_first"]),
    help="Axis order of FEATURES.",
)
@click.option("--title", metavar="TEXT", default="", help="Title above the picture.")
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

    WEIGHTS is a canonical file. FEATURES is an .npy or .npz file with the input of that layer for the image, with or
    without a batch axis. The numpy definition computes the map.
    """
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


@dataclass(frozen=True)
class Attended:
    """The attention from some points of one image.

    Args:
        image: (height, width) or (height, width, 3), uint8.
        rows: (points, H', W'), the row of the map for each point.
        grid_size: (H, W).
        statistics: statistics of the rows, each (points,).
        positions: (h, w) of the feature map for each point.
        config: options of the layer.
        gamma: gamma of the layer.
        change: the root mean square of y − x relative to that of x, which is the layer's effect on these features.
        changed: the number of output positions that `change` is computed from. It is all of them, or a random choice if all
            would take seconds to minutes.
    """

    image: Array
    rows: Array
    grid_size: tuple[int, int]
    statistics: MapStatistics
    positions: list[tuple[int, int]]
    config: SelfAttentionConfig
    gamma: float
    change: float
    changed: int


def attend_files(
    weights: Path,
    features: Path,
    image: Path,
    points: Sequence[tuple[int, int]],
    *,
    block: str | None = None,
    array: str | None = None,
    sample: int | None = None,
    layout: str = "channels_last",
) -> Attended:
    """The attention of the layer in a canonical file, by the formula of the numpy definition, in float32.

    Memory is linear in the positions. The rows of the map are computed for the points, and in blocks for the change.

    Args:
        weights: canonical file.
        features: file with the layer's input, see `read_features`.
        image: the picture from which the features were computed.
        points: pixels (y, x) of the image.
        block: name of the block, if the file holds several.
        array: see `read_features`.
        sample: see `read_features`.
        layout: see `read_features`.

    Raises:
        ModuleNotFoundError: if Pillow is not installed.
        OSError: if a file cannot be read.
        ValueError: if a file cannot be used, files do not fit each other or memory, or a point is outside the image.
    """
    from selfattn_core.features import read_features

    config, params = _layer(weights, block)
    pixels = read_image(image)
    outside = [(y, x) for y, x in points if not (0 <= y < pixels.shape[0] and 0 <= x < pixels.shape[1])]
    if outside:
        raise ValueError(
            f"{image}: got the point{'s' if len(outside) > 1 else ''} {', '.join(f'{y},{x}' for y, x in outside)} outside "
            f"the image; expected y,x in pixels, y from 0 to {pixels.shape[0] - 1} and x from 0 to {pixels.shape[1] - 1}."
        )
    x = read_features(features, config, array=array, sample=sample, layout=layout).astype(np.float32)
    params = {name: values.astype(np.float32) for name, values in params.items()}
    height, width = x.shape[:2]
    positions = [position_of(point, pixels.shape[:2], (height, width)) for point in points]
    asked = _by_lot(height * width, max(1, WHOLE // math.prod(config.key_grid(height, width))))
    try:
        rows = attention_rows(config, params, x, positions)
        change = relative_change(config, params, x, positions=asked)
    except MemoryError:
        raise ValueError(
            f"{features}: the attention of {height}×{width} positions does not fit into memory; use the features of a "
            "smaller image, or of a crop."
        ) from None
    if not (np.isfinite(rows).all() and np.isfinite(change)):
        raise ValueError(
            f"{features}: with the weights of {weights} the map or the output is NaN or infinite; are they the input of "
            "this layer?"
        )
    return Attended(
        image=pixels,
        rows=rows,
        grid_size=(height, width),
        statistics=row_statistics(rows, positions, (height, width), kv_pool=config.kv_pool),
        positions=positions,
        config=config,
        gamma=float(params["gamma"][0]),
        change=change,
        changed=height * width if asked is None else len(asked),
    )


def read_image(path: Path) -> Array:
    """The pixels of a picture as stored, (height, width) or (height, width, 3), uint8.

    Args:
        path: a file in any format that Pillow reads. Transparency is dropped. Orientation tags of cameras are ignored, as
            image loaders of training code ignore them.

    Raises:
        ModuleNotFoundError: if Pillow is not installed.
        OSError: if the file cannot be read.
        ValueError: if it is not a picture, is damaged, or has more than `LARGEST_IMAGE` pixels.
    """
    require("selfattn attend", ["matplotlib", "PIL"], "viz")
    from PIL import Image, UnidentifiedImageError

    from selfattn_core.features import check_is_file

    check_is_file(path)
    refused = f"at most {LARGEST_IMAGE} pixels are decoded: scale it down, the map is no finer for it."
    try:
        with warnings.catch_warnings():
            # Pillow warns about sizes far above our limit, and about dropped transparency.
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                width, height = picture.size
                if width * height <= LARGEST_IMAGE:
                    grey = picture.mode in ("1", "L", "LA")
                    return np.asarray(picture.convert("L" if grey else "RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: is not a picture that can be read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error} Here {refused}") from error
    except MemoryError:
        raise ValueError(f"{path}: does not fit into memory; scale it down.") from None
    except PermissionError:
        raise
    # For a damaged file, Pillow's readers raise exceptions of any kind, and do not name the file.
    except Exception as error:
        raise ValueError(f"{path}: cannot be read, it may be damaged ({error}).") from error
    raise ValueError(f"{path}: has {height}×{width} pixels; {refused}")


def _layer(path: Path, block: str | None) -> tuple[SelfAttentionConfig, dict[str, Array]]:
    """The result of `load`, with errors that name the options of the command."""
    from selfattn_core.features import check_is_file

    check_is_file(path)
    try:
        return load(path, block=block)
    except ValueError as error:
        words = in_words_of_the_command(error)
        if path.is_file() and not _is_canonical(path):
            words += f" If it is a checkpoint, make a canonical file of it: selfattn port {path} FILE.safetensors --from …"
        raise ValueError(words) from error


def _is_canonical(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return read_header(file).metadata.get("format") == FORMAT
    except SafetensorsError:
        return False


def _by_lot(positions: int, rows: int) -> Array | None:
    """This number of positions, chosen at random with a fixed seed, in order. None if all positions are chosen."""
    if positions <= rows:
        return None
    # A random choice, because every k-th position would be in a few columns if k divides the width.
    return np.sort(np.random.default_rng(0).choice(positions, rows, replace=False))
