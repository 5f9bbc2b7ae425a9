"""A stored kernel as a matrix. A dialect names the axes, as in "OIHW": O is C_out, I is C_in, and all others have size 1."""

import numpy as np

from selfattn_core.arrays import Array

__all__ = ["from_matrix", "matrix_shape", "to_matrix"]


def matrix_shape(shape: tuple[int, ...], axes: str) -> tuple[int, int] | None:
    """(C_in, C_out) of a stored kernel. None if it is not a 1×1 kernel with these axes.

    Example:
        >>> matrix_shape((8, 64, 1, 1), "OIHW"), matrix_shape((8, 64, 3, 3), "OIHW")
        ((64, 8), None)
    """
    if len(shape) != len(axes) or any(
        size != 1 for size, axis in zip(shape, axes, strict=True) if axis not in "OI"
    ):
        return None
    return shape[axes.index("I")], shape[axes.index("O")]


def to_matrix(kernel: Array, axes: str) -> Array:
    """A stored kernel as a (C_in, C_out) view.

    Example:
        >>> to_matrix(np.zeros((8, 64, 1, 1)), "OIHW").shape
        (64, 8)
    """
    order = [axes.index("I"), axes.index("O"), *(i for i, axis in enumerate(axes) if axis not in "OI")]
    turned = kernel.transpose(order)
    return turned.reshape(turned.shape[:2])


def from_matrix(matrix: Array, axes: str) -> Array:
    """The inverse of `to_matrix`: a new, contiguous array.

    Example:
        >>> from_matrix(np.zeros((64, 8)), "OIHW").shape
        (8, 64, 1, 1)
    """
    turned = matrix if axes.index("I") < axes.index("O") else matrix.T
    shape = iter(turned.shape)
    return np.array(turned, order="C").reshape([next(shape) if axis in "OI" else 1 for axis in axes])
