"""`attention_grid` of the Linen layer: the attention map with axes for rows and columns instead of flat positions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from selfattn_flax.functions import unflatten
from selfattn_flax.linen.layer import SelfAttention2D

__all__ = ["attention_grid"]


def attention_grid(module: SelfAttention2D, variables: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """The layer's map of x, unflattened. `grid[b, h, w]` holds the weights of output position (h, w).

    Args:
        module: the layer, not bound. It is called in evaluation.
        variables: variables of the layer.
        x: (…, H, W, C).

    Returns:
        (…, H, W, H', W'), where H' = H // kv_pool and W' = W // kv_pool. The last two axes sum to 1. The grid takes N·M
        numbers of memory for each sample and can be differentiated.

    Raises:
        ValueError: if the input's shape does not fit.
        TypeError: if the input is not floating-point.

    Example:
        >>> module = SelfAttention2D(kv_pool=2)
        >>> x = jax.random.normal(jax.random.key(1), (3, 5, 8, 16))
        >>> attention_grid(module, module.init(jax.random.key(0), x), x).shape
        (3, 5, 8, 2, 4)
    """
    module = module.clone(use_running_average=True)
    _, sown = module.apply(variables, x, sow_weights=True, mutable=["intermediates"])
    attention = sown["intermediates"]["attention_weights"][0]
    return unflatten(module.bind(variables).config, attention, jnp.shape(x))
