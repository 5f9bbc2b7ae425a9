"""The attention map with its positions as the rows and columns that they are."""

import torch

from selfattn_torch.layer import SelfAttention2d

__all__ = ["attention_grid"]


def attention_grid(layer: SelfAttention2d, x: torch.Tensor) -> torch.Tensor:
    """The layer's map of x, unflattened: `grid[b, h, w]` is where output position (h, w) attends.

    Args:
        layer: in either mode; it is called in evaluation, so that no state of spectral norm moves, and keeps its mode.
        x: (B, C, H, W) or (C, H, W).

    Returns:
        (B, H, W, H', W'), without B where x has none; H' = H // kv_pool and W' = W // kv_pool. The last two axes sum
        to 1. It is the layer's map in N·M numbers of memory, and can be differentiated.

    Raises:
        ValueError: if the input's shape does not fit.
        TypeError: if the input is not floating-point.

    Example:
        >>> layer = SelfAttention2d(16, kv_pool=2)
        >>> grid = attention_grid(layer, torch.randn(3, 16, 5, 8))
        >>> grid.shape
        torch.Size([3, 5, 8, 2, 4])
    """
    # Each by itself, since some may be in evaluation already.
    training = [module for module in layer.modules() if module.training]
    try:
        for module in training:
            module.training = False
        attention = layer(x, need_weights=True)[1]  # (B, N, M)
    finally:
        for module in training:
            module.training = True
    height, width = x.shape[-2:]
    return attention.unflatten(-1, layer.config.key_grid(height, width)).unflatten(-3, (height, width))
