"""The layer for code that expects (y, A)."""

import torch

from selfattn_torch.layer import SelfAttention2d

__all__ = ["SelfAttention2dWithMap"]


class SelfAttention2dWithMap(SelfAttention2d):
    """`SelfAttention2d` that returns (y, A) by default, as many published layers do.

    `selfattn_torch.convert` replaces such layers by this one, so that code that unpacks the pair still works. Every call
    computes the whole map, N·M numbers for each sample. If memory matters, change the callers to use y alone, and use
    `SelfAttention2d`. The weights are the same.

    Example:
        >>> y, A = SelfAttention2dWithMap(16)(torch.randn(2, 16, 3, 4))
        >>> A.shape
        torch.Size([2, 12, 12])
    """

    def forward(
        self, x: torch.Tensor, need_weights: bool = True
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The output and the map, or the output alone.

        Args:
            x: (B, C, H, W) or (C, H, W).
            need_weights: whether to return (y, A) instead of y.
        """
        return super().forward(x, need_weights=True) if need_weights else super().forward(x)
