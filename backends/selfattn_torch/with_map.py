"""The layer for code that expects a pair."""

import torch

from selfattn_torch.layer import SelfAttention2d

__all__ = ["SelfAttention2dWithMap"]


class SelfAttention2dWithMap(SelfAttention2d):
    """`SelfAttention2d` that returns (y, A) unless told otherwise, as many published layers do.

    `selfattn_torch.convert` puts it where such a layer was, so that what unpacks the pair goes on working. Every call makes
    the whole map, N·M numbers for each sample: change the callers to use y alone, and a `SelfAttention2d`, where memory
    matters. The weights are the same.

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
