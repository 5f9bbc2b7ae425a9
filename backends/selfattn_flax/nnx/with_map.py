"""The NNX layer for code that expects (y, A)."""

import jax
from flax import nnx

from selfattn_flax.nnx.layer import SelfAttention2D

__all__ = ["SelfAttention2DWithMap"]


class SelfAttention2DWithMap(SelfAttention2D):
    """`SelfAttention2D` that returns (y, A), as many published layers do.

    `selfattn_flax.convert` replaces such layers by this one, so that code that unpacks the pair still works. Every call
    computes the whole map, N·M numbers for each sample. If memory matters, change the callers to use y alone, and use
    `SelfAttention2D`. The weights are the same.

    Example:
        >>> layer = SelfAttention2DWithMap(16, rngs=nnx.Rngs(0))
        >>> y, A = layer(jax.random.normal(jax.random.key(1), (2, 3, 4, 16)))
        >>> A.shape
        (2, 12, 12)
    """

    def __call__(self, x: jax.Array, *, sow_weights: bool = False) -> tuple[jax.Array, jax.Array | None]:
        """The output (…, H, W, C) and the map (…, N, M).

        Args:
            x: (…, H, W, C).
            sow_weights: whether to sow A too, as in `SelfAttention2D`.
        """
        y, attention = self._forward(x, with_map=True)
        if sow_weights:
            self.sow(nnx.Intermediate, "attention_weights", attention)
        return y, attention
