"""The size of the terms in gradients of kernels under spectral norm, which lose most of their terms by cancellation.

The gradient of a raw kernel is dK = (dW − ⟨dW, W⟩ v uᵀ) / σ. The second term takes away what would only scale K. Of a kernel
with one column nearly everything goes, and what is left says nothing about the rounding of the two terms.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from selfattn_core import spec
from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.verdicts.tolerance import (
    ALLOWANCES,
    CAPS,
    EPS,
    ORDINARY_LOGITS,
    TERMS_CAP,
    Expectation,
)
from selfattn_core.params import projections
from selfattn_core.spec import Layer

__all__ = ["NormTerms", "terms_of_the_norm", "with_terms_of_the_norm"]


class NormTerms(NamedTuple):
    """How the gradient of one raw kernel magnifies rounding.

    Args:
        own: the largest sum of absolute terms of the gradient.
        lever: the most by which an error in the gradient of the applied kernel grows.
    """

    own: float
    lever: float


def terms_of_the_norm(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    x: Array,
    dy: Array,
    *,
    cotangents: Mapping[str, Array] | None = None,
) -> dict[str, NormTerms]:
    """The sums of the absolute terms of each kernel's gradient, before any subtraction.

    Args:
        config: a configuration with spectral norm.
        params: float64 arrays by canonical name.
        x: feature maps (B, H, W, C), float64.
        dy: ḡ, float64.
        cotangents: those of the first derivatives, to measure the second ones. For `r1` they are {"x": 2 dx}.

    Returns:
        The sums for each name of a kernel.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8, spectral_norm=True)
        >>> params = init_params(config, seed=0, dtype=np.float64) | {"gamma": np.array([0.5])}
        >>> terms_of_the_norm(config, params, np.ones((1, 2, 3, 8)), np.ones((1, 2, 3, 8)))["value.kernel"].own > 0
        True
    """
    applied = Layer(config, params, x).kernels
    plain = replace(config, spectral_norm=False)
    folded = {
        name: applied[name.partition(".")[0]].applied if name.endswith("kernel") else array
        for name, array in params.items()
        if not name.endswith((".u", ".v"))
    }
    dW = spec.vjp(plain, folded, x, dy)
    raw = cotangents or {}
    dot = {
        name: applied[name].along(raw.get(f"{name}.kernel", np.zeros_like(folded[f"{name}.kernel"])))
        for name in projections(config)
    }
    ddW: Mapping[str, Array] = {}
    if cotangents is not None:
        moved = {name: array for name, array in cotangents.items() if not name.endswith("kernel")}
        ddW = spec.vjp_of_vjp(
            plain, folded, x, dy, moved | {f"{name}.kernel": array for name, array in dot.items()}
        )
    found = {}
    for name in projections(config):
        key = f"{name}.kernel"
        kernel, u, v = params[key], params[f"{name}.u"], params[f"{name}.v"]
        sigma = abs(float(v @ kernel @ u)) or 1.0
        direction = np.abs(np.outer(v, u))
        W, first = np.abs(folded[key]), np.abs(dW[key])
        once = (first + np.sum(first * W) * direction) / sigma
        terms = once
        if cotangents is not None:
            second, raw_dot = np.abs(ddW[key]), np.abs(raw.get(key, np.zeros_like(kernel)))
            shrink = np.sum(second * W) + np.sum(np.abs(dot[name]) * first)
            terms = (second + shrink * direction + np.sum(raw_dot * direction) * once) / sigma
        lever = (1 + np.sum(W) * direction.max(initial=0)) / sigma
        found[key] = NormTerms(float(terms.max(initial=0)), float(lever))
    return found


def with_terms_of_the_norm(
    expected: Mapping[str, Expectation],
    terms: Mapping[str, NormTerms],
    through: Mapping[str, float],
    logits: float,
    order: int,
    dtype: str,
) -> dict[str, Expectation]:
    """The expectations, with floor and cap of each kernel for the rounding of its terms.

    Args:
        expected: the expectations of derivatives.
        terms: from `terms_of_the_norm`.
        through: from `cancellation.terms_through_the_map`, which measures the gradients of applied kernels.
        logits: the largest score.
        order: the order of the derivatives, 1 or 2.
        dtype: one of `EPS`.
    """
    kind = "r1" if order == 2 else "vjp"
    ulp = EPS[dtype] * max(1.0, logits / ORDINARY_LOGITS)
    found = dict(expected)
    for name, (own, lever) in terms.items():
        given = found[name]
        cap = max(CAPS[kind] * own, TERMS_CAP * lever * through.get(name, 0.0)) * ulp
        found[name] = Expectation(given.want, given.floor + ALLOWANCES[kind] * own * ulp, max(given.cap, cap))
    return found
