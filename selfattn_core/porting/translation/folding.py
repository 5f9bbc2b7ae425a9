"""Folds spectral norm, batch norm and scale into kernels and biases, in float64.

W is a kernel in the orientation (C_out, C_in) here. In evaluation an original divides by σ:

    "stored"     σ = uᵀ W v of the stored vectors as they are. Averaged vectors do not have unit length, there or here
    "iterate"    v = n(Wᵀ u), u = n(W v), repeated, then σ = uᵀ W v. If u belongs to C_in, the same with Wᵀ for W

and n is one of

    "max"        t / max(‖t‖, eps)              "add"        t / (‖t‖ + eps)
    "root-max"   t / √max(Σt², eps)             "root-add"   t / √(Σt² + eps)

None of these is the largest singular value until u has converged. A σ that was logged in training belongs to an earlier W.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from selfattn_core.arrays import Array
from selfattn_core.porting.dialects.dialect import SpectralNorm

__all__ = ["batch_norm_factor", "cast", "spectral_state"]

_ROWS = 1 << 17
"""The number of elements that are widened to float64 at a time, so that memory never holds a large kernel twice."""


def spectral_state(
    rule: SpectralNorm, matrix: Array, u: Array, v: Array | None
) -> tuple[Array, Array, float]:
    """The vectors and the norm by which the original divides its kernel in evaluation.

    Args:
        rule: the original's rule.
        matrix: the kernel (C_in, C_out), of any dtype.
        u: the stored u.
        v: the stored v, if the rule uses it.

    Returns:
        u (C_out,), v (C_in,) and sigma = vᵀ·matrix·u, in float64.

    Raises:
        ValueError: if the length of a vector differs from its axis of the kernel.

    Example:
        >>> rule = SpectralNorm("u", "", "iterate", "out", "max", 0.0, 1)
        >>> spectral_state(rule, np.diag([2.0, 2.0]), np.array([[0.6, 0.8]]), None)
        (array([0.6, 0.8]), array([0.6, 0.8]), 2.0)
    """
    across, out = matrix.shape
    side = rule.side
    if side == "shape":
        if u.shape not in ((1, out), (across, 1)):
            raise ValueError(f"its vector has shape {u.shape}, expected (1, {out}) or ({across}, 1)")
        side = "out" if u.shape == (1, out) else "in"
    length = out if side == "out" else across
    first = np.asarray(u, np.float64).reshape(-1)
    if first.size != length or sorted(u.shape)[:-1] != [1] * (u.ndim - 1):
        raise ValueError(
            f"its vector {rule.u} has shape {u.shape}, expected {length} elements along one axis"
        )
    if rule.sigma == "stored":
        second = np.asarray(v, np.float64).reshape(-1)
        if second.size != across:
            raise ValueError(f"its vector {rule.v} has {second.size} elements, expected {across}")
        return first, second, float(_left(matrix, second) @ first)
    # `forth` maps from the side of u to the other side, and `back` returns.
    forth, back = (_right, _left) if side == "out" else (_left, _right)
    unit = _NORMALIZE[rule.normalize]
    for _ in range(rule.iterations):
        second = unit(forth(matrix, first), rule.eps)
        first = unit(back(matrix, second), rule.eps)
    vectors = (first, second) if side == "out" else (second, first)
    return *vectors, float(_left(matrix, vectors[1]) @ vectors[0])


def batch_norm_factor(weight: Array | None, var: Array, eps: float) -> Array:
    """The factor of each channel in a batch norm in evaluation mode.

    Example:
        >>> batch_norm_factor(None, np.array([0.25]), 0.0)
        array([2.])
    """
    factor: Array = 1.0 / np.sqrt(np.asarray(var, np.float64) + eps)
    return factor if weight is None else factor * np.asarray(weight, np.float64)


def cast(matrix: Array, dtype: DTypeLike, *, divisor: float = 1.0, factor: Array | float = 1.0) -> Array:
    """A kernel or bias divided by its divisor and multiplied by its factor, computed in float64 and rounded once.

    Args:
        matrix: (C_in, C_out), or (C_out,).
        dtype: the dtype of the result.
        divisor: a number.
        factor: a number, or (C_out,).

    Returns:
        A new, contiguous array. Without divisor and factor it is a plain copy.

    Example:
        >>> cast(np.array([1.0, 3.0], np.float32), np.float32, divisor=2.0)
        array([0.5, 1.5], dtype=float32)
    """
    plain = divisor == 1.0 and isinstance(factor, float) and factor == 1.0
    if plain:
        return np.array(matrix, dtype, order="C")
    result = np.empty(matrix.shape, dtype)
    step = max(1, _ROWS // max(1, matrix[:1].size))
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        here = factor[rows] if matrix.ndim == 1 and isinstance(factor, np.ndarray) else factor
        result[rows] = matrix[rows].astype(np.float64) / divisor * here
    return result


def _right(matrix: Array, vector: Array) -> Array:
    """(C_in, C_out) times (C_out,), in float64, some rows at a time."""
    step = max(1, _ROWS // matrix.shape[1])
    parts = [
        matrix[start : start + step].astype(np.float64) @ vector for start in range(0, len(matrix), step)
    ]
    return np.concatenate(parts)


def _left(matrix: Array, vector: Array) -> Array:
    """(C_in,) times (C_in, C_out), in float64, some rows at a time."""
    step = max(1, _ROWS // matrix.shape[1])
    total = np.zeros(matrix.shape[1])
    for start in range(0, len(matrix), step):
        total += vector[start : start + step] @ matrix[start : start + step].astype(np.float64)
    return total


_NORMALIZE: dict[str, Callable[[Array, float], Array]] = {
    "max": lambda t, eps: t / max(float(np.linalg.norm(t)), eps),
    "add": lambda t, eps: t / (float(np.linalg.norm(t)) + eps),
    "root-max": lambda t, eps: t / np.sqrt(max(float(t @ t), eps)),
    "root-add": lambda t, eps: t / np.sqrt(float(t @ t) + eps),
}
