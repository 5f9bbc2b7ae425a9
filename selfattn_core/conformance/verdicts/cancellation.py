"""The size of the terms in derivatives that vanish because all their terms cancel.

With one key, or one position, the map does not depend on the logits, so nothing depends on query and key. The terms then
cancel exactly only if an implementation rounds both sides in the same way. An implementation that computes D as
rowsum(G∘o), and not as rowsum(A∘dA), leaves rounding errors in proportion to the terms.
"""

from collections.abc import Mapping

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
) -> dict[str, float]:
    """Sums of the absolute terms through which derivatives depend on query and key, before any subtraction.

    Args:
        config: as for `spec.forward`.
        params: as for `spec.forward`.
        x: feature maps (B, H, W, C).
        dy: ḡ, the gradient of y.
        cotangents: as for `spec.magnitudes`.

    Returns:
        The largest sum for each of "x" and the kernels and biases of query and key. With `cotangents` also for the bias of
        the value.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8)
        >>> one_position = np.ones((2, 1, 1, 8))
        >>> params = init_params(config, seed=0, dtype=np.float64) | {"gamma": np.array([0.5])}
        >>> terms_through_the_map(config, params, one_position, one_position)["key.kernel"] > 0
        True
    """
    layer = Layer(config, params, x)
    rows, A = np.abs(layer.x), layer.A
    q, k, v = np.abs(layer.q), np.abs(layer.k), np.abs(layer.v)
    W = {name: np.abs(layer.kernel(name)) for name in layer.kernels}
    g = np.abs(layer.flatten(dy))
    back = g @ W["out"].mT if config.out_projection else g
    gamma = np.abs(layer.gamma)

    def centred(terms: Array) -> Array:
        return np.asarray(terms + (A * terms).sum(axis=-1, keepdims=True))

    def outer(left: Array, right: Array) -> Array:
        return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])

    def through(dS: Array, q: Array, k: Array) -> dict[str, Array]:
        return {"query": dS @ k, "key": layer.pool.scatter(dS.mT @ q, layer.key_winners)}

    dA = centred(gamma * back @ v.mT)
    first = through(A * dA, q, k)
    kernels = {name: outer(rows, d) for name, d in first.items()}
    projected = first
    to_x = np.asarray(sum(d @ W[name].mT for name, d in first.items()))
    if cotangents is not None:
        dot = {name: np.abs(array) for name, array in cotangents.items()}
        dot_x = layer.flatten(dot["x"])
        dot_W = {
            name: np.abs(layer.kernels[name].along(dot.get(f"{name}.kernel", np.zeros_like(W[name]))))
            for name in W
        }

        def moved(name: str) -> Array:
            return np.asarray(dot_x @ W[name] + rows @ dot_W[name] + dot.get(f"{name}.bias", 0))

        dot_q = moved("query")
        dot_k = layer.pool.gather(moved("key"), layer.key_winners)
        dot_v = layer.pool.gather(moved("value"), layer.value_winners)
        dot_G = dot.get("gamma", 0) * back
        if config.out_projection:
            dot_G = dot_G + gamma * g @ dot_W["out"].mT
        U = centred(dot_q @ k.mT + q @ dot_k.mT)
        R = gamma * back @ dot_v.mT + dot_G @ v.mT
        second, along = through(A * centred(U * dA + R), q, k), through(A * dA, dot_q, dot_k)
        projected = {name: second[name] + along[name] for name in second}
        kernels = {name: outer(dot_x, first[name]) + outer(rows, d) for name, d in projected.items()}
        # The gradient of the values also depends on the map.
        to_values = (A * U).mT @ (gamma * back) + A.mT @ dot_G
        projected["value"] = layer.pool.scatter(to_values, layer.value_winners)
        to_x = np.asarray(sum(d @ W[name].mT for name, d in projected.items()))
        to_x = to_x + sum(d @ dot_W[name].mT for name, d in first.items())
    sums = {"x": to_x}
    sums |= {f"{name}.kernel": terms for name, terms in kernels.items()}
    sums |= {f"{name}.bias": d.sum(axis=(0, 1)) for name, d in projected.items()}
    return {name: float(terms.max(initial=0)) for name, terms in sums.items()}
