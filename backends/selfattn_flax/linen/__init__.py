"""The layer for Flax Linen, its weights and its map."""

from selfattn_flax.linen.layer import SelfAttention2D
from selfattn_flax.linen.maps import attention_grid
from selfattn_flax.linen.weights import from_canonical, load, refresh_spectral_norm, save, to_canonical

__all__ = [
    "SelfAttention2D",
    "attention_grid",
    "from_canonical",
    "load",
    "refresh_spectral_norm",
    "save",
    "to_canonical",
]
