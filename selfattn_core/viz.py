"""Attention maps as pictures: the figure of the SAGAN paper, and an animation of it over training steps.

Maps, statistics and coordinates are those of `selfattn_core.maps`, whose names can be imported from here as well.

Drawing needs matplotlib (`pip install 'selfattn[viz]'`), which is imported inside the calls. No window is opened and
matplotlib's global state (pyplot, backend, style) is not touched: figures are `matplotlib.figure.Figure` objects.

Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2018, figures 1 and 5.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core.files.writing import write_atomically
from selfattn_core.installed import require
from selfattn_core.maps import (
    SMALL_GAMMA,
    MapStatistics,
    checked_grid,
    checked_rows,
    effect_warning,
    map_statistics,
    position_of,
    row_statistics,
    unflatten,
    upsample,
)
from selfattn_core.weights import PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

__all__ = [
    "COLOURS",
    "SMALL_GAMMA",
    "MapStatistics",
    "attention_figure",
    "draw_attention",
    "effect_warning",
    "format_of",
    "map_statistics",
    "position_of",
    "rows_figure",
    "save_animation",
    "save_figure",
    "unflatten",
    "upsample",
]

Array = NDArray[Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""One for each point, in this order; they stay apart with every common form of colour blindness.

Source: Okabe and Ito, "Color Universal Design", 2002, without the black and the yellow.
"""

_INCHES = 2.1
_DPI = 150
_SHOWN = 512
"""Pixels along a side of a panel's image, or up to twice as many: more are not seen, and cost memory."""

_NO_TRANSPARENCY = (
    "PostScript has no transparency, which the heat maps are drawn with; .pdf is as good for print"
)
_UNSUITED = {
    "eps": _NO_TRANSPARENCY,
    "ps": _NO_TRANSPARENCY,
    "pgf": "a drawing for LaTeX keeps its images in files of their own; LaTeX takes .pdf",
}
"""What matplotlib has a writer for, and why it is no format of these figures."""


def attention_figure(
    image: Array,
    grid: Array,
    points: Sequence[tuple[int, int]],
    *,
    kv_pool: int = 1,
    gamma: float | None = None,
    title: str = "",
) -> "Figure":
    """The image with coloured query points, and beside it what each point attends to, in the same colour.

    Args:
        image: (height, width), or with an axis of 1, 3 or 4 channels; uint8, or floating point from 0 to 1.
        grid: the map of this one image, (H, W, H', W').
        points: pixels (y, x) of the image, one to six of them.
        kv_pool: of the layer's config.
        gamma: the layer's residual gain; with it, a map that has no effect yet is said to have none.
        title: above the picture.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if shapes do not fit, or points are outside the image; lists every problem.

    Warns:
        UserWarning: if |gamma| is below `SMALL_GAMMA`, or if image and map seem to have H and W exchanged.

    Example:
        >>> image = np.random.default_rng(0).uniform(size=(16, 24))
        >>> grid = np.full((4, 6, 4, 6), 1 / 24)
        >>> figure = attention_figure(image, grid, [(2, 20), (13, 5)], gamma=0.5)
        >>> len(figure.axes)  # the image and two maps, and below each map its scale
        6
    """
    require("selfattn_core.viz", ["matplotlib"], "viz")
    panels = _of_grid(image, grid, points, kv_pool)
    _warn(panels, gamma)
    figure = _figure(panels, _DPI)
    _draw(figure, panels, gamma, title, _largest([panels]))
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
    """The figure of `attention_figure` where only the rows of the points are known.

    Args:
        image: as for `attention_figure`.
        rows: what each point attends to, (points, H', W'): of each, `grid[position_of(point, …)]`.
        points: as for `attention_figure`.
        grid_size: (H, W) of the feature map.
        kv_pool: as for `attention_figure`.
        gamma: as for `attention_figure`.
        title: as for `attention_figure`.

    Raises:
        ModuleNotFoundError: as `attention_figure`.
        ValueError: as `attention_figure`.

    Warns:
        UserWarning: as `attention_figure`.

    Example:
        >>> image = np.random.default_rng(0).uniform(size=(16, 24))
        >>> rows = np.full((2, 4, 6), 1 / 24)
        >>> len(rows_figure(image, rows, [(2, 20), (13, 5)], grid_size=(4, 6)).axes)
        6
    """
    require("selfattn_core.viz", ["matplotlib"], "viz")
    image, rows = _checked(image, points, lambda: checked_rows(rows, len(points), grid_size, kv_pool))
    panels = _Panels(image, rows, points, _positions(points, image, grid_size), grid_size, kv_pool)
    _warn(panels, gamma)
    figure = _figure(panels, _DPI)
    _draw(figure, panels, gamma, title, _largest([panels]))
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
    """Draw what `attention_figure` draws into a figure, or into a subfigure of one with several rows.

    Args:
        figure: an empty `Figure` or `SubFigure`.
        image: as for `attention_figure`.
        grid: as for `attention_figure`.
        points: as for `attention_figure`.
        kv_pool: as for `attention_figure`.
        gamma: as for `attention_figure`.
        title: as for `attention_figure`.

    Raises:
        ValueError: as `attention_figure`.

    Warns:
        UserWarning: as `attention_figure`.
    """
    panels = _of_grid(image, grid, points, kv_pool)
    _warn(panels, gamma)
    _draw(figure, panels, gamma, title, _largest([panels]))


def format_of(path: PathLike) -> str:
    """The format that the suffix of a picture's name asks for, in matplotlib's words.

    Args:
        path: .png, .pdf, .svg, .jpg or another suffix that matplotlib writes here.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if these figures cannot be written in such a format.

    Example:
        >>> format_of("Map.PNG")
        'png'
        >>> format_of("map.eps")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: map.eps: got the suffix '.eps'; PostScript has no transparency, ... expected one of ...
    """
    require("selfattn_core.viz", ["matplotlib"], "viz")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import features

    known = set(FigureCanvasAgg.get_supported_filetypes()) - set(_UNSUITED)
    # What a build of Pillow may lack.
    known -= {name for name in ("webp", "avif") if not features.check(name)}
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in known:
        reason = f" {_UNSUITED[suffix]};" if suffix in _UNSUITED else ""
        raise ValueError(
            f"{path}: got the suffix {path.suffix!r};{reason} expected one of "
            f"{', '.join(f'.{name}' for name in sorted(known))}."
        )
    return suffix


def save_figure(figure: "Figure", path: PathLike, *, overwrite: bool = False) -> None:
    """Write a figure; the suffix says the format.

    Args:
        figure: what to write.
        path: with a suffix as for `format_of`; the folder must exist.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False; it is left as it was.
        OSError: if it cannot be written.
        ValueError: as `format_of`; PostScript would lose the heat maps' transparency, and with it the weights.

    Example:
        >>> import tempfile
        >>> figure = attention_figure(np.eye(4), np.full((2, 2, 2, 2), 0.25), [(0, 3)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_figure(figure, f"{folder}/map.png")
        ...     Path(f"{folder}/map.png").read_bytes()[1:4]
        b'PNG'
    """
    content = io.BytesIO()
    figure.savefig(content, format=format_of(path))
    write_atomically(Path(path), content.getvalue(), overwrite=overwrite)


def save_animation(
    path: PathLike,
    images: Sequence[Array],
    grids: Sequence[Array],
    points: Sequence[tuple[int, int]],
    *,
    titles: Sequence[str],
    gammas: Sequence[float] | None = None,
    kv_pool: int = 1,
    milliseconds: int = 400,
    overwrite: bool = False,
) -> None:
    """Write an animated GIF of a map over training steps, one figure a frame.

    Each point's colour scale is the same in all frames, so that a map that sharpens is seen to.

    Args:
        path: the .gif file; its folder must exist.
        images: one for each frame, or one for all, as for `attention_figure`.
        grids: the map at each step, each (H, W, H', W').
        points: as for `attention_figure`.
        titles: of each frame, for example "step 400".
        gammas: the layer's gain at each step. A frame whose gamma is about 0 says so; there is no warning, as a
            training starts there.
        kv_pool: of the layer's config.
        milliseconds: each frame is shown; the last one stays four times as long.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False; it is left as it was.
        ModuleNotFoundError: if matplotlib is not installed.
        OSError: if it cannot be written.
        ValueError: if there is no frame, numbers of frames differ, or a frame cannot be drawn.

    Example:
        >>> import tempfile
        >>> grids = [np.full((2, 2, 2, 2), 0.25), np.eye(4).reshape(2, 2, 2, 2)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_animation(f"{folder}/maps.gif", [np.eye(4)], grids, [(0, 3)], titles=["step 0", "step 10"])
        ...     Path(f"{folder}/maps.gif").read_bytes()[:4]
        b'GIF8'
    """
    require("selfattn_core.viz", ["matplotlib"], "viz")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    path = Path(path)
    images = list(images) * len(grids) if len(images) == 1 else list(images)
    gains: Sequence[float | None] = [None] * len(grids) if gammas is None else gammas
    counts = {"grids": len(grids), "images": len(images), "titles": len(titles), "gammas": len(gains)}
    if not grids or len(set(counts.values())) > 1:
        raise ValueError(
            f"save_animation: got {', '.join(f'{count} {name}' for name, count in counts.items())}; expected one of each "
            "for every frame, and at least one frame."
        )
    drawn = [_of_grid(image, grid, points, kv_pool) for image, grid in zip(images, grids, strict=True)]
    largest = _largest(drawn)
    frames = []
    for panels, label, gain in zip(drawn, titles, gains, strict=True):
        figure = _figure(panels, 100)
        _draw(figure, panels, gain, label, largest)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    content = io.BytesIO()
    frames[0].save(
        content,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[milliseconds] * (len(frames) - 1) + [4 * milliseconds],
        loop=0,
    )
    write_atomically(path, content.getvalue(), overwrite=overwrite)


@dataclass(frozen=True)
class _Panels:
    """What a figure shows.

    Args:
        image: (height, width) or (height, width, 3 or 4), uint8, or floating point from 0 to 1.
        rows: (points, H', W'), what each point attends to.
        points: pixels (y, x) of the image.
        positions: (h, w) of the feature map for each point.
        grid_size: (H, W).
        kv_pool: of the layer's config.
    """

    image: Array
    rows: Array
    points: Sequence[tuple[int, int]]
    positions: list[tuple[int, int]]
    grid_size: tuple[int, int]
    kv_pool: int


def _of_grid(image: Array, grid: Array, points: Sequence[tuple[int, int]], kv_pool: int) -> _Panels:
    """The panels of a whole map, of which they keep the rows of the points."""
    image, grid = _checked(image, points, lambda: checked_grid(grid, kv_pool))
    grid_size = (grid.shape[0], grid.shape[1])
    positions = _positions(points, image, grid_size)
    rows = np.stack([grid[position] for position in positions])
    return _Panels(image, rows, points, positions, grid_size, kv_pool)


def _positions(
    points: Sequence[tuple[int, int]], image: Array, grid_size: tuple[int, int]
) -> list[tuple[int, int]]:
    return [position_of(point, (image.shape[0], image.shape[1]), grid_size) for point in points]


def _checked(
    image: Array, points: Sequence[tuple[int, int]], checked_map: Callable[[], Array]
) -> tuple[Array, Array]:
    """The image, (height, width[, 3 or 4]), and the map; refused with every problem."""
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


def _warn(panels: _Panels, gamma: float | None) -> None:
    """Warn of a picture that is right and says nothing, or is likely not of this image."""
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


def _largest(drawn: Sequence[_Panels]) -> list[float]:
    """For each point the largest weight in any of the maps: the one that has the full colour."""
    return [float(full) for full in np.max([panels.rows.max(axis=(1, 2)) for panels in drawn], axis=0)]


def _figure(panels: _Panels, dpi: int) -> "Figure":
    """An empty figure, as wide as the panels, as high as the image, the scale and the text need."""
    from matplotlib.figure import Figure

    aspect = panels.image.shape[0] / panels.image.shape[1]
    size = (1 + len(panels.points)) * _INCHES, min(max(aspect, 0.4), 2.5) * (_INCHES - 0.15) + 1.25
    return Figure(figsize=size, dpi=dpi, layout="constrained")


def _draw(
    figure: "FigureBase", panels: _Panels, gamma: float | None, title: str, largest: Sequence[float]
) -> None:
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
    """The image in light grey, so that the colour above it is seen and the image still recognised."""
    grey = image if image.ndim == 2 else image[..., :3] @ np.array([0.2126, 0.7152, 0.0722])
    return 0.8 + 0.2 * grey


def _tint(strength: Array, colour: str) -> Array:
    """(height, width, 4): the colour, as opaque as the strength; nothing where there is no key."""
    from matplotlib.colors import to_rgb

    alpha = np.nan_to_num(strength).clip(0, 1)
    return np.concatenate([np.broadcast_to(to_rgb(colour), (*alpha.shape, 3)), alpha[..., None]], axis=-1)


def _extent(image: Array, step: int) -> tuple[float, float, float, float]:
    """Where every step-th pixel of an image lies in its coordinates."""
    return -0.5, image.shape[1] * step - 0.5, image.shape[0] * step - 0.5, -0.5


def _show(axes: "Axes", image: Array, step: int, title: str, colour: str = "#444444") -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=_extent(image, step))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)


def _scale(axes: "Axes", full: float, colour: str) -> None:
    """A bar with the colours of the weights from 0 to the full one."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("tint", ["white", colour])
    bar = axes.figure.colorbar(
        ScalarMappable(Normalize(0, full), colours), cax=axes, orientation="horizontal"
    )
    bar.set_ticks([0, full], labels=["0", f"{full:.2g}"], fontsize=7)
    # Inwards, so that they do not run into those of the next bar.
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def _mark(axes: "Axes", point: tuple[int, int], size: tuple[int, int], colour: str, label: str) -> None:
    """A dot with a white rim at the centre of the pixel, and its number beside it, towards the middle."""
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
