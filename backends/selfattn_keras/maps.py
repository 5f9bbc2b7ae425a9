"""`attention_grid`: the attention map with axes for rows and columns instead of flat positions."""

from typing import Any

from keras import ops

from selfattn_keras.layer import SelfAttention2D

__all__ = ["attention_grid"]

# Tensors of the framework, symbolic or not. Keras has no common type for them.
Tensor = Any


def attention_grid(layer: SelfAttention2D, x: Tensor) -> Tensor:
    """The layer's map of x, unflattened. `grid[b, h, w]` holds the weights of output position (h, w).

    Args:
        layer: the layer, which is built if necessary. It is called with `training=False`, so spectral norm does not move.
        x: (B, H, W, C), or (B, C, H, W) with "channels_first".

    Returns:
        (B, H, W, H', W') in both data formats, where H' = H // kv_pool and W' = W // kv_pool. The last two axes sum to 1.
        The grid takes N·M numbers of memory for each sample and can be differentiated.

    Raises:
        ValueError: if the input's shape does not fit.
        TypeError: if the input is not floating-point.

    Example:
        >>> layer = SelfAttention2D(kv_pool=2, data_format="channels_last")
        >>> grid = attention_grid(layer, ops.ones((3, 5, 8, 16)))
        >>> tuple(grid.shape)
        (3, 5, 8, 2, 4)
    """
    y, attention = layer(x, return_attention_scores=True, training=False)  # A is (B, N, M)
    sizes = ops.shape(y)
    height, width = sizes[1:3] if layer.data_format == "channels_last" else sizes[2:]
    return ops.reshape(attention, (-1, height, width, *layer.config.key_grid(height, width)))
