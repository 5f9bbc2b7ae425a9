"""Numpy arrays: their type in signatures, and bfloat16, which numpy knows by name only."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Array", "is_floating", "widen"]

Array = NDArray[Any]


def is_floating(dtype: DTypeLike) -> bool:
    """Whether a numpy dtype is one that weights can have; bfloat16 is ml_dtypes', whose kind is not 'f'."""
    resolved = np.dtype(dtype)
    return resolved.kind == "f" or resolved.name == "bfloat16"


def widen(array: Array) -> Array:
    """A bfloat16 array as float32, which is exact; any other array as it is.

    Example:
        >>> widen(np.ones(2, np.float16)).dtype
        dtype('float16')
    """
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
