"""The figure of one image: the attention from some of its points."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from selfattn_core.arrays import Array
from selfattn_core.installed import require
from selfattn_core.viz.drawing import draw, empty_figure
from selfattn_core.viz.panels import largest_weights, panels_of_grid, panels_of_rows, warn_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

__all__ = ["attention_figure", "draw_attention", "rows_figure"]


_DPI = 150


def attention_figure(
    image: Array,
    grid: Array,
    points: Sequence[tuple[int, int]],
    *,
    kv_pool: int = 1,
    gamma: float | None = None,
    title: str = "",
) -> "Figure":
    """The image with coloured query points and, beside it, the attention from each point in the same colour.

    Args:
        image: (height, width), or with a last axis of 1, 3 or 4 channels. uint8, or floating point from 0 to 1.
        grid: the map of this one image, (H, W, H', W').
        points: one to six pixels (y, x) of the image.
        kv_pool: `kv_pool` of the layer's config.
        gamma: gamma of the layer. With it, the figure shows a note if the map has no effect yet.
        title: title above the picture.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if shapes do not fit, or points are outside the image. The message lists every problem.

    Warns:
        UserWarning: if |gamma| is below `SMALL_GAMMA`, or if H and W seem to be exchanged between image and map.

    Example:
        >>> import numpy as np
        >>> image = np.random.default_rng(0).uniform(size=(16, 24))
        >>> grid = np.full((4, 6, 4, 6), 1 / 24)
        >>> figure = attention_figure(image, grid, [(2, 20), (13, 5)], gamma=0.5)
        >>> len(figure.axes)  # the image and two maps, and below each map its scale
        6
    """
    require("selfattn_core.viz", ["matplotlib"], "viz")
    panels = panels_of_grid(image, grid, points, kv_pool)
    warn_of(panels, gamma)
    figure = empty_figure(panels, _DPI)
    draw(figure, panels, gamma, title, largest_weights([panels]))
    return figure


def rows_figure(
    image: Array,
    rows: Array,
    points: Sequence[tuple[int, int]],
    *,
    grid_size: tuple[int, int],
    kv_pool: int = 1,
    gamma: float | None = None,
    title: str = "",
) -> "Figure":
    """The figure of `attention_figure`, made from only the rows of the points.

    Args:
        image: see `attention_figure`.
        rows: the rows of the map for the points, (points, H', W'), each `grid[position_of(point, …)]`.
        points: see `attention_figure`.
        grid_size: (H, W) of the feature map.
        kv_pool: see `attention_figure`.
        gamma: see `attention_figure`.
        title: see `attention_figure`.

    Raises:
        ModuleNotFoundError: see `attention_figure`.
        ValueError: see `attention_figure`.

    Warns:
        UserWarning: see `attention_figure`.

    Example:
        >>> import numpy as np
        >>> image = np.random.default_rng(0).uniform(size=(16, 24))
        >>> rows = np.full((2, 4, 6), 1 / 24)
        >>> len(rows_figure(image, rows, [(2, 20), (13, 5)], grid_size=(4, 6)).axes)
        6
    """
    require("selfattn_core.viz", ["matplotlib"], "viz")
    panels = panels_of_rows(image, rows, points, grid_size, kv_pool)
    warn_of(panels, gamma)
    figure = empty_figure(panels, _DPI)
    draw(figure, panels, gamma, title, largest_weights([panels]))
    return figure


def draw_attention(
    figure: "FigureBase",
    image: Array,
    grid: Array,
    points: Sequence[tuple[int, int]],
    *,
    kv_pool: int = 1,
    gamma: float | None = None,
    title: str = "",
) -> None:
    """Draw the picture of `attention_figure` into a figure, or into a subfigure of a larger figure.

    Args:
        figure: an empty `Figure` or `SubFigure`.
        image: see `attention_figure`.
        grid: see `attention_figure`.
        points: see `attention_figure`.
        kv_pool: see `attention_figure`.
        gamma: see `attention_figure`.
        title: see `attention_figure`.

    Raises:
        ValueError: see `attention_figure`.

    Warns:
        UserWarning: see `attention_figure`.
    """
    panels = panels_of_grid(image, grid, points, kv_pool)
    warn_of(panels, gamma)
    draw(figure, panels, gamma, title, largest_weights([panels]))
