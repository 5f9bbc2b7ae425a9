"""Drawing panels with matplotlib, which is imported inside the calls."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.maps import effect_warning, row_statistics, upsample
from selfattn_core.viz.panels import COLOURS, Panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

__all__ = ["draw", "empty_figure"]


_INCHES = 2.1
_SHOWN = 512
"""Pixels along a side of a panel's image, or up to twice as many. More would be invisible, and cost memory."""


def empty_figure(panels: Panels, dpi: int) -> "Figure":
    """An empty figure with room for the panels, the scale and the text."""
    from matplotlib.figure import Figure

    aspect = panels.image.shape[0] / panels.image.shape[1]
    size = (1 + len(panels.points)) * _INCHES, min(max(aspect, 0.4), 2.5) * (_INCHES - 0.15) + 1.25
    return Figure(figsize=size, dpi=dpi, layout="constrained")


def draw(
    figure: "FigureBase", panels: Panels, gamma: float | None, title: str, largest: Sequence[float]
) -> None:
    """Fill a figure.

    Args:
        figure: an empty figure or subfigure.
        panels: content of the figure.
        gamma: gamma of the layer, or None if it is unknown.
        title: title above the panels.
        largest: for each point, the weight with the full colour.
    """
    grid_size = panels.grid_size
    size = (panels.image.shape[0], panels.image.shape[1])
    step = max(1, max(size) // _SHOWN)
    image = panels.image[::step, ::step]
    image = image / 255 if image.dtype == np.uint8 else image
    statistics = row_statistics(panels.rows, panels.positions, grid_size, kv_pool=panels.kv_pool)
    if lines := [line for line in (title, "" if gamma is None else _gamma_line(gamma)) if line]:
        figure.suptitle("\n".join(lines), fontsize=9, parse_math=False)
    (first, *maps), (nothing, *bars) = figure.subplots(
        2, 1 + len(panels.points), squeeze=False, gridspec_kw={"height_ratios": (20, 1)}
    )
    nothing.set_axis_off()
    _show(first, image, step, f"image {size[0]}×{size[1]}, map {grid_size[0]}×{grid_size[1]}")
    ghost = _ghost(image)
    drawn = zip(panels.points, panels.rows, largest, maps, bars, strict=True)
    for index, (point, weights, full, axes, bar) in enumerate(drawn):
        colour = COLOURS[index]
        _show(axes, ghost, step, f"{index + 1}: from y={point[0]}, x={point[1]}", colour)
        spread = upsample(weights, size, grid_size, kv_pool=panels.kv_pool)[::step, ::step]
        axes.imshow(_tint(spread / full, colour), extent=_extent(spread, step))
        _scale(bar, full, colour)
        axes.set_xlabel(
            f"{statistics.effective_size[index]:.1f} of {weights.size} keys\n"
            f"mean distance {statistics.mean_distance[index]:.1f}",
            fontsize=7,
        )
        _mark(first, point, size, colour, str(index + 1))
        _mark(axes, point, size, colour, "")


def _gamma_line(gamma: float) -> str:
    return effect_warning(gamma).partition(". ")[0] or f"gamma = {gamma:+.3f}"


def _ghost(image: Array) -> Array:
    """The image in light grey, so that it stays recognisable below the colour."""
    grey = image if image.ndim == 2 else image[..., :3] @ np.array([0.2126, 0.7152, 0.0722])
    return 0.8 + 0.2 * grey


def _tint(strength: Array, colour: str) -> Array:
    """(height, width, 4): the colour, with the strength as opacity. Transparent for pixels without a key."""
    from matplotlib.colors import to_rgb

    alpha = np.nan_to_num(strength).clip(0, 1)
    return np.concatenate([np.broadcast_to(to_rgb(colour), (*alpha.shape, 3)), alpha[..., None]], axis=-1)


def _extent(image: Array, step: int) -> tuple[float, float, float, float]:
    """The coordinates of every step-th pixel of an image."""
    return -0.5, image.shape[1] * step - 0.5, image.shape[0] * step - 0.5, -0.5


def _show(axes: "Axes", image: Array, step: int, title: str, colour: str = "#444444") -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=_extent(image, step))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)


def _scale(axes: "Axes", full: float, colour: str) -> None:
    """A bar with the colours of the weights from 0 to the largest."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("tint", ["white", colour])
    bar = axes.figure.colorbar(
        ScalarMappable(Normalize(0, full), colours), cax=axes, orientation="horizontal"
    )
    bar.set_ticks([0, full], labels=["0", f"{full:.2g}"], fontsize=7)
    # Inwards, so that they do not overlap with those of the next bar.
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def _mark(axes: "Axes", point: tuple[int, int], size: tuple[int, int], colour: str, label: str) -> None:
    """A dot with a white rim at the centre of the pixel, with its number beside it, towards the middle."""
    from matplotlib.patheffects import withStroke

    y, x = point
    axes.plot(
        [x], [y], "o", color=colour, markeredgecolor="white", markeredgewidth=1.2, markersize=7, clip_on=False
    )
    if label:
        to_left = x > size[1] / 2
        axes.annotate(
            label,
            (x, y),
            xytext=(-6 if to_left else 6, 0),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=colour,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
