"""The type of numpy arrays in signatures, and helpers for bfloat16, which comes from ml_dtypes."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Array", "contiguous", "is_floating", "widen"]

Array = NDArray[Any]


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
