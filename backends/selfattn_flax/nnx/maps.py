"""`attention_grid` of the NNX layer: the attention map with axes for rows and columns instead of flat positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from selfattn_flax.functions import unflatten
from selfattn_flax.nnx.layer import SelfAttention2D

__all__ = ["attention_grid"]


def attention_grid(layer: SelfAttention2D, x: jax.Array) -> jax.Array:
    """The layer's map of x, unflattened. `grid[b, h, w]` holds the weights of output position (h, w).

    Args:
        layer: the layer, in any mode. It is called in evaluation mode, so spectral norm does not move. Its mode is kept.
            Sown values are removed.
        x: (…, H, W, C).

    Returns:
        (…, H, W, H', W'), where H' = H // kv_pool and W' = W // kv_pool. The last two axes sum to 1. The grid takes N·M
        numbers of memory for each sample and can be differentiated.

    Raises:
        ValueError: if the input's shape does not fit.
        TypeError: if the input is not floating-point.

    Example:
        >>> layer = SelfAttention2D(16, kv_pool=2, rngs=nnx.Rngs(0))
        >>> grid = attention_grid(layer, jax.random.normal(jax.random.key(1), (3, 5, 8, 16)))
        >>> grid.shape
        (3, 5, 8, 2, 4)
    """
    # Without spectral norm no part of the layer has a mode.
    view = nnx.view(layer, raise_if_not_found=False, use_running_average=True)
    _, sown = nnx.capture(view, nnx.Intermediate)(x, sow_weights=True)
    return unflatten(layer.config, sown["attention_weights"][0], jnp.shape(x))
