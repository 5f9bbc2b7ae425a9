"""The size of the terms of derivatives that pass through the map, before any of them cancel.

The softmax subtracts in each derivative: dA − D, U − u, X − rowsum(A∘X). Where one weight of a row is nearly 1, both sides
are nearly equal. The difference is then far smaller than its terms, and with one key it is zero. Whether the rounding errors
of the terms cancel too depends on the way of computing:

- The definition divides first and then subtracts D = rowsum(A∘dA). A weight of 1 multiplies dA by 1, so both sides have the
  same error, and it cancels.
- An implementation that computes D as rowsum(G∘o), that divides after the average, (e v) / Σe, or that rescales its sums in
  blocks rounds both sides differently. Their errors remain. They are proportional to the terms, not to the difference.

All of these are correct. The error of a term is one draw in each implementation, so no list of forms has all of them. It is
known from the terms. The error of a sum of terms t, each with an independent relative error of eps, has the standard
deviation eps·√Σt², which is the norm of order 2. It is at most eps·Σ|t|, the norm of order 1.
"""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.spec import Layer

__all__ = ["terms_through_the_map"]


def terms_through_the_map(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    x: Array,
    dy: Array,
    *,
    cotangents: Mapping[str, Array] | None = None,
    order: Literal[1, 2] = 1,
) -> dict[str, float]:
    """Norms of the terms through which derivatives depend on query and key, before any subtraction.

    Args:
        config: as for `spec.forward`.
        params: as for `spec.forward`.
        x: feature maps (B, H, W, C).
        dy: ḡ, the gradient of y.
        cotangents: as for `spec.magnitudes`.
        order: the order of the norm. 1 gives Σ|t|, which bounds the error. 2 gives √Σt², its standard deviation.

    Returns:
        The largest norm for each of "x" and the kernels and biases of query and key. With `cotangents` also for all other
        quantities of `spec.vjp_of_vjp` that depend on the map.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8)
        >>> one_position = np.ones((2, 1, 1, 8))
        >>> params = init_params(config, seed=0, dtype=np.float64) | {"gamma": np.array([0.5])}
        >>> bound, deviation = (
        ...     terms_through_the_map(config, params, one_position, one_position, order=order)["key.kernel"] for order in (1, 2)
        ... )
        >>> bound > deviation > 0
        True
    """
    layer = Layer(config, params, x)

    def powers(array: Array) -> Array:
        return np.abs(array) if order == 1 else array * array

    rows, A = powers(layer.x), powers(layer.A)
    q, k, v = powers(layer.q), powers(layer.k), powers(layer.v)
    W = {name: powers(layer.kernel(name)) for name in layer.kernels}
    g = powers(layer.flatten(dy))
    gamma = powers(layer.gamma)
    back = powers(layer.back_through_out(layer.flatten(dy)))
    G = gamma * back

    def centred(terms: Array) -> Array:
        return np.asarray(terms + (A * terms).sum(axis=-1, keepdims=True))

    def outer(left: Array, right: Array) -> Array:
        return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])

    def through(dS: Array, q: Array, k: Array) -> dict[str, Array]:
        return {"query": dS @ k, "key": layer.pool.scatter(dS.mT @ q, layer.key_winners)}

    dA = centred(G @ v.mT)
    first = through(A * dA, q, k)
    kernels = {name: outer(rows, d) for name, d in first.items()}
    projected = first
    sums = {"x": np.asarray(sum(d @ W[name].mT for name, d in first.items()))}
    if cotangents is not None:
        dot_x = layer.flatten(cotangents["x"])
        raw = {name: cotangents.get(f"{name}.kernel", np.zeros_like(W[name])) for name in W}
        along = {name: layer.kernels[name].along(dot) for name, dot in raw.items()}
        dot_W = {name: powers(dot) for name, dot in along.items()}

        def moved(name: str) -> Array:
            values = dot_x @ layer.kernel(name) + layer.x @ along[name] + cotangents.get(f"{name}.bias", 0)
            return np.asarray(values)

        dot_q = powers(moved("query"))
        dot_k = powers(layer.pool.gather(moved("key"), layer.key_winners))
        dot_v = powers(layer.pool.gather(moved("value"), layer.value_winners))
        dot_G = powers(np.asarray(cotangents.get("gamma", 0))) * back
        if config.out_projection:
            dot_G = dot_G + gamma * g @ dot_W["out"].mT
        U = centred(dot_q @ k.mT + q @ dot_k.mT)
        R = G @ dot_v.mT + dot_G @ v.mT
        second, also = through(A * centred(U * dA + R), q, k), through(A * dA, dot_q, dot_k)
        projected = {name: second[name] + also[name] for name in second}
        kernels = {name: outer(powers(dot_x), first[name]) + outer(rows, d) for name, d in projected.items()}
        to_values = (A * U).mT @ G + A.mT @ dot_G
        projected["value"] = layer.pool.scatter(to_values, layer.value_winners)
        kernels["value"] = outer(rows, projected["value"])
        to_x = np.asarray(sum(d @ W[name].mT for name, d in projected.items()))
        dot_o = (A * U) @ v + A @ dot_v
        dot_z = dot_o @ W["out"] if config.out_projection else dot_o
        sums = {"x": to_x + sum(d @ dot_W[name].mT for name, d in first.items()), "dy": gamma * dot_z}
        sums["gamma"] = np.asarray((g * dot_z).sum())
        if config.out_projection:
            kernels["out"] = gamma * outer(dot_o, g)
    sums |= {f"{name}.kernel": terms for name, terms in kernels.items()}
    sums |= {f"{name}.bias": d.sum(axis=(0, 1)) for name, d in projected.items()}
    return {name: _root(float(np.max(terms, initial=0)), order) for name, terms in sums.items()}


def _root(total: float, order: Literal[1, 2]) -> float:
    # Not a power, because only the square root is the same on every machine.
    return math.sqrt(total) if order == 2 else total
