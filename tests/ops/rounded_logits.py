"""What the rounding of the logits alone can do to the output, whatever the processor.

A logit l_j = Σ_d q_d k_jd is a sum of Dk products. Computed with unit roundoff u, in any order and with or without
fused multiply-adds, it errs by at most

    ε_j = γ Σ_d |q_d k_jd|,    γ = Dk u / (1 - Dk u)

(N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). Nothing of this is in proportion
to l_j itself or to what the logits differ by: at logits of 1e4 in float32 it is 1.8e-3. With logits l_j + δ_j, |δ_j| ≤ ε_j,
a row of the map becomes a_j exp(δ_j) / Z with Z = Σ_m a_m exp(δ_m), and since Σ_j a_j (v_j - o) = 0 the output moves by

    o' - o = Σ_j a_j (exp(δ_j) - 1) (v_j - o) / Z
    |o' - o| ≤ Σ_j a_j expm1(ε_j) |v_j - o| / Σ_m a_m exp(-ε_m)

This is large where keys of different values are tied, and nothing where one key has the whole row.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["rounding_of_sum", "shift_of_output"]

Array = NDArray[np.float64]


def rounding_of_sum(terms: int, eps: float) -> float:
    """γ: how far a sum of so many products can be off, in any order, as a part of the sum of their sizes.

    Args:
        terms: products of the sum.
        eps: of the dtype in which they are summed.
    """
    roundings = terms * eps / 2
    return roundings / (1 - roundings)


def shift_of_output(query: Array, key: Array, value: Array, eps: float) -> Array:
    """How far the rounding of the logits can move each number of the output; the formula is above.

    Args:
        query: (…, N, Dk), in float64.
        key: (…, M, Dk), in float64.
        value: (…, M, Dv), in float64.
        eps: of the dtype in which the logits are summed, which for operands of 16 bits is float32; not float64, in which
            the logits are computed here.

    Returns:
        (…, N, Dv). Zero where the operands are whole numbers whose products sum to less than 2 / eps: then no order
        rounds anything.
    """
    transposed = np.swapaxes(key, -1, -2)
    sizes = np.abs(query) @ np.abs(transposed)
    if sizes.max() <= 2 / eps and (query % 1 == 0).all() and (key % 1 == 0).all():
        return np.zeros((*query.shape[:-1], value.shape[-1]))
    errors = rounding_of_sum(query.shape[-1], eps) * sizes
    logits = query @ transposed
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    output = weights @ value
    distances = np.abs(value[..., None, :, :] - output[..., :, None, :])
    moved = np.einsum("...nm,...nmd->...nd", weights * np.expm1(errors), distances)
    return moved / (weights * np.exp(-errors)).sum(-1, keepdims=True)
