"""`attention_grid`: the attention map with axes for rows and columns instead of flat positions."""

import torch

from selfattn_torch.layer import SelfAttention2d

__all__ = ["attention_grid"]


def attention_grid(layer: SelfAttention2d, x: torch.Tensor) -> torch.Tensor:
    """The layer's map of x, unflattened. `grid[b, h, w]` holds the weights of output position (h, w).

    Args:
        layer: the layer, in any mode. It is called in evaluation mode, so spectral norm does not move. Its mode is kept.
        x: (B, C, H, W) or (C, H, W).

    Returns:
        (B, H, W, H', W'), without B if x has none, where H' = H // kv_pool and W' = W // kv_pool. The last two axes sum
        to 1. The grid takes N·M numbers of memory for each sample and can be differentiated.

    Raises:
        ValueError: if the input's shape does not fit.
        TypeError: if the input is not floating-point.

    Example:
        >>> layer = SelfAttention2d(16, kv_pool=2)
        >>> grid = attention_grid(layer, torch.randn(3, 16, 5, 8))
        >>> grid.shape
        torch.Size([3, 5, 8, 2, 4])
    """
    # One by one, because some modules may be in evaluation mode already.
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
