"""Spectral norm of one kernel: the state u, v that estimates it, and the power iteration of a training step.

The formulas are for canonical kernels K (C_in, C_out), the transpose of W (C_out, C_in) in PyTorch and in the paper:

    u = n(Kᵀ v)       v = n(K u)       σ = vᵀ K u       n(t) = t / max(‖t‖, 1e-12)       n(0) = n(c)

The first two, in this order, are one power iteration, without gradient. They read only v from the old state. σ is the
norm that u and v estimate. After one iteration, the estimate is never above the norm. The applied kernel is K / σ.

With a kernel of zeros, PyTorch's own spectral norm gives NaN for ever. Here two rules avoid this:

- If vᵀ K u is 0, σ is the constant 1. K is applied as it is, and its gradient is that of the applied kernel. So a kernel
  of zeros stays zero, with finite derivatives of every order, and can leave zero.
- n(0) is n(c), where c has the fixed entries 2 (i³ mod 101) − 101 for i = 1, 2, … Every entry differs from 0, and the
  entries have no pattern, so c is not orthogonal to a kernel after training. With n(0) = 0 the state would remain 0
  whatever the kernel became. With n(c), one power iteration on a kernel that has left zero finds its norm again.

Neither rule changes anything if σ is not 0. A negative σ is used as it is, which changes the sign of the kernel. It occurs
only if the state belongs to another kernel, and one iteration ends it. A kernel whose norm is below 1e-12 (such as 1e-30)
is not zero, and is treated as in PyTorch: u and v become shorter than 1, and σ too small.

Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018, algorithm 1, whose ũ is u
and ṽ is v; the order of the two halves, eps and the warm-up are those of
`torch.nn.utils.parametrizations.spectral_norm`.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from selfattn_core.arrays import Array

__all__ = [
    "EPS",
    "WARM_UP",
    "converged",
    "fallback",
    "power_iteration",
    "share",
    "sigma",
    "unlike_unit_vectors",
    "warmed_up",
]


EPS = 1e-12
"""Vectors shorter than this are divided by it instead of by their norm."""

WARM_UP = 15
"""The number of power iterations on the initial kernel for the state of a new layer."""


def fallback(length: int) -> NDArray[np.int64]:
    """The vector c. A vector of the state that would be zero gets its direction.

    Its entries are 2 (i³ mod 101) − 101 for i = 1, 2, …

    Args:
        length: length of the vector.

    Example:
        >>> fallback(5)
        array([-99, -85, -47,  27, -53])
    """
    return 2 * (np.arange(1, length + 1, dtype=np.int64) ** 3 % 101) - 101


def power_iteration(kernel: Array, v: Array) -> tuple[Array, Array]:
    """The state after one more power iteration.

    Args:
        kernel: (C_in, C_out).
        v: (C_in,), from the old state.

    Returns:
        u (C_out,) and v (C_in,), in the dtype of the arguments.

    Example:
        >>> power_iteration(np.diag([2.0, 0.0]), np.array([0.6, 0.8]))
        (array([1., 0.]), array([1., 0.]))
        >>> np.round(power_iteration(np.zeros((1, 2)), np.array([1.0]))[0], 3)  # of a kernel of zeros: n(c)
        array([-0.759, -0.651])
    """
    u = _normalised(v @ kernel)
    return u, _normalised(kernel @ u)


def warmed_up(kernel: Array, v: Array) -> tuple[Array, Array]:
    """The state of a new layer: `WARM_UP` power iterations from a random v.

    Args:
        kernel: (C_in, C_out), as initialised.
        v: (C_in,), standard normal; its length does not matter.

    Returns:
        u (C_out,) and v (C_in,).

    Example:
        >>> u, v = warmed_up(np.diag([2.0, 1.0]), np.array([0.6, 0.8]))
        >>> round(sigma(np.diag([2.0, 1.0]), u, v).item(), 6)
        2.0
    """
    for _ in range(WARM_UP):
        u, v = power_iteration(kernel, v)
    return u, v


def converged(kernel: Array) -> tuple[Array, Array]:
    """The limit of the state under power iterations: the singular vectors of the largest singular value.

    Args:
        kernel: (C_in, C_out), finite; of any dtype.

    Returns:
        u (C_out,) and v (C_in,) in float64. For a kernel of zeros they are those of the fallback.

    Example:
        >>> kernel = np.diag([1.0, 3.0])
        >>> sigma(kernel, *converged(kernel)).item()
        3.0
    """
    left, values, right = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    if values[0] == 0:
        into, out_of = (np.zeros(length) for length in kernel.shape)
        return _normalised(out_of), _normalised(into)
    return right[0], left[:, 0]


def share(kernel: Array, u: Array, v: Array) -> float:
    """σ divided by the norm of the kernel, a measure of how good a state is.

    In training it is a little below 1. If it is far from 1, the state belongs to another kernel or is an average of states.

    Args:
        kernel: (C_in, C_out), finite; of any dtype.
        u: (C_out,).
        v: (C_in,).

    Returns:
        The share. It is 1 for a kernel of zeros, because any state fits it.

    Example:
        >>> share(np.diag([2.0, 1.0]), np.array([0.0, 1.0]), np.array([0.0, 1.0]))
        0.5
    """
    kernel, u, v = (array.astype(np.float64) for array in (kernel, u, v))
    norm = np.linalg.norm(kernel, 2)
    return 1.0 if norm == 0 else float(sigma(kernel, u, v) / norm)


def sigma(kernel: Array, u: Array, v: Array) -> Array:
    """vᵀ K u, the spectral norm that the state estimates. If it is 0, kernels are divided by 1 instead.

    Args:
        kernel: (C_in, C_out).
        u: (C_out,).
        v: (C_in,).

    Example:
        >>> sigma(np.diag([2.0, 1.0]), np.array([1.0, 0.0]), np.array([1.0, 0.0])).item()
        2.0
    """
    return np.asarray(v @ kernel @ u)


def unlike_unit_vectors(vectors: Mapping[str, Array]) -> str:
    """A warning about vectors u and v whose lengths differ from 1 by more than rounding.

    The mean of unit vectors is shorter than 1. So the warning detects averaged weights (EMA) whose u and v were averaged
    too. σ is then too small by the product of both lengths.

    Args:
        vectors: u and v of any number of kernels by their names in the warning. Finite, of any shape and dtype.

    Returns:
        A sentence for a person, or "" if every vector has the length 1.

    Example:
        >>> unlike_unit_vectors({"query.u": np.array([0.6, 0.8]), "query.v": np.array([0.6, 0.7])})
        'the vectors of spectral norm should have the length 1 but have other lengths (query.v: 0.922), as averages (EMA) do, so the norm is wrong by that factor'
    """
    lengths = {name: np.linalg.norm(vector.astype(np.float64)) for name, vector in vectors.items()}
    wrong = [
        f"{name}: {length:.4g}"
        for name, length in lengths.items()
        if abs(length - 1) > _rounding(vectors[name])
    ]
    if not wrong:
        return ""
    factor = "that factor" if len(wrong) == 1 else "these factors"
    return (
        f"the vectors of spectral norm should have the length 1 but have other lengths ({', '.join(wrong)}), as averages (EMA) "
        f"do, so the norm is wrong by {factor}"
    )


def _rounding(vector: Array) -> float:
    """How far from 1 the length of a rounded unit vector can be. Its numbers may have been widened afterwards."""
    single = vector.astype(np.float32)
    if not (single.view(np.uint32) & 0xFFFF).any():
        return 2.0**-8  # bfloat16 can represent all of them
    if (single == single.astype(np.float16)).all():
        return 2.0**-11
    return 1e-5


def _normalised(vector: Array) -> Array:
    if not (vector != 0).any():
        vector = vector + fallback(vector.size).astype(vector.dtype)
    return np.asarray(vector / np.maximum(np.sqrt(vector @ vector), EPS))
