"""Numbers about a map: its grid, its statistics, and the weights of one position at the size of an image.

There is one orientation. `grid[h, w]` is an array (H', W') with the weights of output position (h, w) over the keys, which
sum to 1. `attention_grid` of every adapter returns such a grid (with a batch axis in front), and `unflatten` makes it from a
map (…, N, M).

There are two systems of coordinates. Points are pixels (y, x) of the image, with y downwards, and every pixel belongs to
one position of the feature map. Distances are in positions of the feature map. With pooling, p = `kv_pool`, one key
covers p×p positions, and the last H − p·H' rows of positions belong to no key.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfattn_core.arrays import Array

__all__ = [
    "SMALL_GAMMA",
    "MapStatistics",
    "checked_grid",
    "checked_rows",
    "effect_warning",
    "map_statistics",
    "position_of",
    "row_statistics",
    "unflatten",
    "upsample",
]


SMALL_GAMMA = 1e-3
"""With a smaller |gamma| the output is practically the input, and the map is untrained noise."""

_ROUNDING = 0.02
"""How far from 1 the sum of a row may be. Each bfloat16 weight is off by up to 0.004 of its value."""


@dataclass(frozen=True)
class MapStatistics:
    """Statistics of the map for each output position. All arrays are (…, H, W).

    Args:
        entropy: entropy in nats, from 0 (one key) to log M (equal weights).
        effective_size: exp(entropy), the effective number of keys that share the attention.
        mean_distance: mean distance of the keys from the output position, weighted, in positions of the feature map.
        peak: the largest weight.
    """

    entropy: Array
    effective_size: Array
    mean_distance: Array
    peak: Array


def unflatten(attention: Array, height: int, width: int, *, kv_pool: int = 1) -> Array:
    """A map (…, N, M) as (…, H, W, H', W').

    Args:
        attention: map from a layer or from `spec.attention_map`, with row h·W + w and column h'·W' + w'.
        height: H of the feature map.
        width: W of the feature map.
        kv_pool: `kv_pool` of the layer's config.

    Raises:
        ValueError: if N or M do not belong to these sizes.

    Example:
        >>> unflatten(np.full((2, 15, 2), 0.5), 3, 5, kv_pool=2).shape
        (2, 3, 5, 1, 2)
    """
    attention = np.asarray(attention)
    keys = (height // kv_pool, width // kv_pool)
    expected = (height * width, math.prod(keys))
    if attention.shape[-2:] != expected:
        raise ValueError(
            f"unflatten: got a map of shape {attention.shape}; expected (…, {expected[0]}, {expected[1]}) for a feature "
            f"map of {height}×{width} positions and kv_pool={kv_pool}."
        )
    return attention.reshape(*attention.shape[:-2], height, width, *keys)


def map_statistics(grid: Array, *, kv_pool: int = 1) -> MapStatistics:
    """Entropy, effective size, mean distance and peak for every output position.

    Args:
        grid: (…, H, W, H', W').
        kv_pool: `kv_pool` of the layer's config.

    Raises:
        ValueError: if the shape does not fit such a map.

    Example:
        >>> statistics = map_statistics(np.full((1, 3, 1, 3), 1 / 3))  # all alike, in one row
        >>> statistics.effective_size.round(3)
        array([[3., 3., 3.]])
        >>> statistics.mean_distance.round(3)
        array([[1.   , 0.667, 1.   ]])
    """
    grid = checked_grid(grid, kv_pool, leading=True)
    height, width = grid.shape[-4:-2]
    return _statistics(grid, np.arange(height)[:, None], np.arange(width), kv_pool)


def row_statistics(
    rows: Array, positions: Sequence[tuple[int, int]], grid_size: tuple[int, int], *, kv_pool: int = 1
) -> MapStatistics:
    """The statistics of `map_statistics` for some output positions, from only their rows.

    Args:
        rows: (positions, H', W'), the row of the map for each position.
        positions: (h, w) of each position.
        grid_size: (H, W) of the feature map.
        kv_pool: `kv_pool` of the layer's config.

    Returns:
        The statistics. All arrays are (positions,).

    Raises:
        ValueError: if the shape does not fit such rows.

    Example:
        >>> statistics = row_statistics(np.full((2, 1, 3), 1 / 3), [(0, 2), (0, 1)], (1, 3))
        >>> statistics.mean_distance.round(3)
        array([1.   , 0.667])
    """
    rows = checked_rows(rows, len(positions), grid_size, kv_pool)
    down, across = np.transpose(positions)
    return _statistics(rows, down, across, kv_pool)


def _statistics(weights: Array, down: Array, across: Array, kv_pool: int) -> MapStatistics:
    """The statistics of weights (…, H', W'). The coordinates of the positions broadcast to the axes before the last two."""
    weights = weights.astype(np.float64)
    logarithms = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    entropy = -(weights * logarithms).sum(axis=(-2, -1))
    rows, columns = weights.shape[-2:]
    distances = np.hypot(
        (down[..., None] - _centres(rows, kv_pool))[..., :, None],
        (across[..., None] - _centres(columns, kv_pool))[..., None, :],
    )
    return MapStatistics(
        entropy=entropy,
        effective_size=np.exp(entropy),
        mean_distance=(weights * distances).sum(axis=(-2, -1)),
        peak=weights.max(axis=(-2, -1)),
    )


def effect_warning(gamma: float) -> str:
    """A warning about a map that has no effect on the output. Empty if it has an effect.

    Args:
        gamma: the layer's residual gain.

    Example:
        >>> effect_warning(0.0)
        'gamma = 0: the map has no effect on the output yet, y = x. Train until gamma has moved.'
        >>> effect_warning(0.25)
        ''
    """
    if gamma == 0:
        return "gamma = 0: the map has no effect on the output yet, y = x. Train until gamma has moved."
    if abs(gamma) < SMALL_GAMMA:
        return f"gamma = {gamma:.1e}: the map has next to no effect on the output yet. Train until gamma has moved."
    return ""


def position_of(
    point: tuple[int, int], image_size: tuple[int, int], grid_size: tuple[int, int]
) -> tuple[int, int]:
    """The position (h, w) of the feature map that a pixel (y, x) of the image belongs to.

    Args:
        point: (y, x) in pixels.
        image_size: height and width of the image.
        grid_size: (H, W).

    Example:
        >>> position_of((63, 10), (64, 96), (8, 12))
        (7, 1)
    """
    (y, x), (image_height, image_width), (height, width) = point, image_size, grid_size
    return y * height // image_height, x * width // image_width


def upsample(weights: Array, size: tuple[int, int], grid_size: tuple[int, int], *, kv_pool: int = 1) -> Array:
    """Weights (H', W') over the keys, interpolated linearly to the pixels of an image.

    Args:
        weights: one `grid[h, w]`.
        size: height and width of the image.
        grid_size: (H, W) of the feature map.
        kv_pool: `kv_pool` of the layer's config.

    Returns:
        An array of that size, with NaN for pixels that belong to no key.

    Example:
        >>> upsample(np.array([[0.25, 0.75]]), (1, 4), (1, 2))
        array([[0.25 , 0.375, 0.625, 0.75 ]])
        >>> upsample(np.array([[1.0]]), (1, 3), (2, 3), kv_pool=2)
        array([[ 1.,  1., nan]])
    """
    rows = _interpolation(size[0], grid_size[0], weights.shape[0], kv_pool)
    columns = _interpolation(size[1], grid_size[1], weights.shape[1], kv_pool)
    return rows @ np.asarray(weights, np.float64) @ columns.T


def checked_grid(grid: Array, kv_pool: int, *, leading: bool = False) -> Array:
    """Check the shape and values of a map, and return it as an array.

    Args:
        grid: (H, W, H', W').
        kv_pool: `kv_pool` of the layer's config.
        leading: whether further leading axes are allowed.

    Raises:
        ValueError: if `grid` is not such a map.

    Example:
        >>> checked_grid(np.full((3, 5, 1, 2), 0.5), kv_pool=2).shape
        (3, 5, 1, 2)
    """
    grid = np.asarray(grid)
    axes = "(…, H, W, H', W')" if leading else "(H, W, H', W') of one image"
    if grid.ndim < 4 or (grid.ndim > 4 and not leading) or 0 in grid.shape:
        raise ValueError(
            f"got a map of shape {grid.shape}; expected {axes}: see attention_grid and unflatten"
        )
    height, width, *keys = grid.shape[-4:]
    expected = [height // kv_pool, width // kv_pool]
    if keys != expected:
        raise ValueError(
            f"got a map from {height}×{width} positions to {keys[0]}×{keys[1]} keys with kv_pool={kv_pool}; expected "
            f"{expected[0]}×{expected[1]} keys: pass the layer's kv_pool"
        )
    _check_weights(grid)
    return grid


def checked_rows(rows: Array, count: int, grid_size: tuple[int, int], kv_pool: int) -> Array:
    """Check the shape and values of rows of a map, and return them as an array.

    Args:
        rows: (positions, H', W').
        count: number of positions.
        grid_size: (H, W) of the feature map.
        kv_pool: `kv_pool` of the layer's config.

    Raises:
        ValueError: if `rows` are not such rows.

    Example:
        >>> checked_rows(np.full((4, 1, 2), 0.5), 4, (3, 5), kv_pool=2).shape
        (4, 1, 2)
    """
    rows = np.asarray(rows)
    expected = (count, grid_size[0] // kv_pool, grid_size[1] // kv_pool)
    if rows.shape != expected or 0 in expected:
        raise ValueError(
            f"got rows of shape {rows.shape}; expected {expected} for {count} positions of a feature map of "
            f"{grid_size[0]}×{grid_size[1]} with kv_pool={kv_pool}"
        )
    _check_weights(rows)
    return rows


def _check_weights(weights: Array) -> None:
    if not np.isfinite(weights).all():
        raise ValueError("got a map that holds NaN or infinity; expected weights that sum to 1")
    sums = weights.sum(axis=(-2, -1), dtype=np.float64)
    if not np.allclose(sums, 1, rtol=0, atol=_ROUNDING):
        raise ValueError(
            f"got a map whose rows sum to {sums.min():.3g} to {sums.max():.3g}; expected 1: is it transposed, or is it not a "
            "softmax over the keys?"
        )


def _centres(keys: int, kv_pool: int) -> Array:
    """The places of the keys along one axis, in positions."""
    return np.arange(keys) * kv_pool + (kv_pool - 1) / 2


def _interpolation(pixels: int, positions: int, keys: int, kv_pool: int) -> Array:
    """Interpolation weights (pixels, keys): linear between the centres of the keys, constant outside. Rows sum to 1."""
    places = (np.arange(pixels) + 0.5) * positions / pixels - 0.5  # centres of the pixels, in positions
    nearest = np.stack([np.interp(places, _centres(keys, kv_pool), row) for row in np.eye(keys)], axis=1)
    nearest[places + 0.5 > keys * kv_pool] = np.nan
    return nearest
