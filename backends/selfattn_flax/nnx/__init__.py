"""The layer for Flax NNX, its weights and its map."""

from selfattn_flax.nnx.layer import SelfAttention2D
from selfattn_flax.nnx.maps import attention_grid
from selfattn_flax.nnx.weights import from_canonical, load, save, to_canonical
from selfattn_flax.nnx.with_map import SelfAttention2DWithMap
from selfattn_flax.spectral_norm import refresh_spectral_norm

__all__ = [
    "SelfAttention2D",
    "SelfAttention2DWithMap",
    "attention_grid",
    "from_canonical",
    "load",
    "refresh_spectral_norm",
    "save",
    "to_canonical",
]
