"""The checked content of a figure: the image, the points, and the attention from each point."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.maps import checked_grid, checked_rows, effect_warning, position_of

__all__ = ["COLOURS", "Panels", "largest_weights", "panels_of_grid", "panels_of_rows", "warn_of"]


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The colours of the points, in this order. They are distinct in every common form of colour blindness.

Source: Okabe and Ito, "Color Universal Design", 2002, without black and yellow.
"""


@dataclass(frozen=True)
class Panels:
    """The content of a figure.

    Args:
        image: (height, width) or (height, width, 3 or 4), uint8, or floating point from 0 to 1.
        rows: (points, H', W'), the row of the map for each point.
        points: pixels (y, x) of the image.
        positions: (h, w) of the feature map for each point.
        grid_size: (H, W).
        kv_pool: `kv_pool` of the layer's config.
    """

    image: Array
    rows: Array
    points: Sequence[tuple[int, int]]
    positions: list[tuple[int, int]]
    grid_size: tuple[int, int]
    kv_pool: int


def panels_of_grid(image: Array, grid: Array, points: Sequence[tuple[int, int]], kv_pool: int) -> Panels:
    """The panels of a whole map. They keep only the rows of the points."""
    image, grid = _checked(image, points, lambda: checked_grid(grid, kv_pool))
    grid_size = (grid.shape[0], grid.shape[1])
    positions = _positions(points, image, grid_size)
    rows = np.stack([grid[position] for position in positions])
    return Panels(image, rows, points, positions, grid_size, kv_pool)


def panels_of_rows(
    image: Array, rows: Array, points: Sequence[tuple[int, int]], grid_size: tuple[int, int], kv_pool: int
) -> Panels:
    """The panels, made from only the rows of the points."""
    image, rows = _checked(image, points, lambda: checked_rows(rows, len(points), grid_size, kv_pool))
    return Panels(image, rows, points, _positions(points, image, grid_size), grid_size, kv_pool)


def _positions(
    points: Sequence[tuple[int, int]], image: Array, grid_size: tuple[int, int]
) -> list[tuple[int, int]]:
    return [position_of(point, (image.shape[0], image.shape[1]), grid_size) for point in points]


def _checked(
    image: Array, points: Sequence[tuple[int, int]], checked_map: Callable[[], Array]
) -> tuple[Array, Array]:
    """The checked image (height, width[, 3 or 4]) and map. The error lists every problem."""
    problems = []
    image = np.asarray(image)
    shape = image.shape
    if len(shape) not in (2, 3) or 0 in shape or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        problems.append(
            f"got an image of shape {shape}; expected (height, width) or (height, width, 1, 3 or 4 channels)"
        )
    elif outside := [point for point in points if not _inside(point, (shape[0], shape[1]))]:
        named = ", ".join(f"y={y}, x={x}" for y, x in outside)
        problems.append(
            f"got the point{'s' if len(outside) > 1 else ''} {named} outside the image; expected y from 0 to "
            f"{shape[0] - 1} and x from 0 to {shape[1] - 1}, in pixels"
        )
    of_floats = image.dtype.kind == "f" and ((image >= 0) & (image <= 1)).all()
    if image.dtype != np.uint8 and not of_floats:
        problems.append(
            f"got an image of dtype {image.dtype} that is not within 0 to 1; expected uint8, or floating point from "
            "0 to 1: rescale it"
        )
    if not 1 <= len(points) <= len(COLOURS):
        problems.append(
            f"got {len(points)} points; expected 1 to {len(COLOURS)}, as there are that many colours"
        )
    try:
        weights = checked_map()
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("attention_figure: " + "; ".join(problems) + ".")
    return (image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image), weights


def _inside(point: tuple[int, int], size: tuple[int, int]) -> bool:
    return all(0 <= coordinate < side for coordinate, side in zip(point, size, strict=True))


def warn_of(panels: Panels, gamma: float | None) -> None:
    """Warn if the map has no effect, or probably does not belong to this image."""
    if gamma is not None and (message := effect_warning(gamma)):
        warnings.warn(message, UserWarning, stacklevel=3)
    size, grid_size = panels.image.shape, panels.grid_size
    aspect, of_map = math.log(size[0] / size[1]), math.log(grid_size[0] / grid_size[1])
    if abs(aspect - of_map) > abs(aspect + of_map) + 1e-9:
        warnings.warn(
            f"the image is {size[0]}×{size[1]} and the map {grid_size[0]}×{grid_size[1]} (height×width): is one of them "
            "transposed?",
            UserWarning,
            stacklevel=3,
        )


def largest_weights(drawn: Sequence[Panels]) -> list[float]:
    """For each point the largest weight in any of the maps, which gets the full colour."""
    return [float(full) for full in np.max([panels.rows.max(axis=(1, 2)) for panels in drawn], axis=0)]
