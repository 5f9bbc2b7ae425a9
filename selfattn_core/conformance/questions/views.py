"""The memory of an argument: equal numbers with other strides."""

import numpy as np

from selfattn_core.arrays import Array

__all__ = ["viewed"]


def viewed(maps: Array, view: str) -> Array:
    """The same numbers in other memory, which is never that of the argument.

    Args:
        maps: (B, H, W, C).
        view: "" (contiguous), "strided" (every other column and channel of a larger array), "transposed" (channels-first
            memory), "reversed" (negative strides), or "still" (strides of 0, for equal numbers).

    Example:
        >>> viewed(np.zeros((1, 2, 3, 4)), "reversed").strides
        (192, -96, -32, -8)
        >>> viewed(np.ones((1, 2, 3, 4)), "still").strides
        (0, 0, 0, 0)
    """
    if view == "transposed":
        return np.moveaxis(_copy(np.moveaxis(maps, 3, 1)), 1, 3)
    if view == "reversed":
        return _copy(maps[:, ::-1, ::-1, ::-1])[:, ::-1, ::-1, ::-1]
    if view == "strided":
        batch, height, width, channels = maps.shape
        between = np.zeros((batch, height, 2 * width, 2 * channels), maps.dtype)
        view_of_it = between[:, :, ::2, ::2]
        view_of_it[...] = maps
        return view_of_it
    if view == "still" and maps.size:
        # A copy of one number, so that whoever writes through the view writes everywhere.
        one = maps[:1, :1, :1, :1].copy()
        return np.lib.stride_tricks.as_strided(one, maps.shape, (0, 0, 0, 0))
    return maps.copy()


def _copy(maps: Array) -> Array:
    """Contiguous memory of its own. `ascontiguousarray` returns its argument where sizes of 1 make any order contiguous."""
    return np.array(maps, order="C", copy=True)
