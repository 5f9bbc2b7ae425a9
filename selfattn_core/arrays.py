"""The type of numpy arrays in signatures, helpers for bfloat16, which comes from ml_dtypes, and a check of shapes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Array", "contiguous", "declared_shape", "is_floating", "widen"]

Array = NDArray[Any]

# numpy's own limit is 64.
_MOST_AXES = 32


def is_floating(dtype: DTypeLike) -> bool:
    """Whether weights can have this numpy dtype. The kind of ml_dtypes' bfloat16 is not 'f'."""
    resolved = np.dtype(dtype)
    return resolved.kind == "f" or resolved.name == "bfloat16"


def widen(array: Array) -> Array:
    """A bfloat16 array as float32, which is exact. Any other array is returned unchanged.

    Example:
        >>> widen(np.ones(2, np.float16)).dtype
        dtype('float16')
    """
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def contiguous(array: Array) -> Array:
    """An array in the form that writers need: contiguous, and bfloat16 widened to float32.

    Example:
        >>> contiguous(np.ones((2, 3)).T).flags.c_contiguous
        True
    """
    return np.ascontiguousarray(widen(array)).reshape(np.shape(array))


def declared_shape(shape: Sequence[object]) -> tuple[int, ...] | None:
    """The shape that a file declares. None if no array can have it, because an axis is wrong or there are too many numbers.

    Example:
        >>> declared_shape([2, 3]), declared_shape([2, -3]), declared_shape([2**62])
        ((2, 3), None, None)
    """
    axes = tuple(axis for axis in shape if isinstance(axis, int) and not isinstance(axis, bool) and axis >= 0)
    fits = len(axes) == len(shape) <= _MOST_AXES and math.prod(axis or 1 for axis in axes) < 2**62
    return axes if fits else None
