"""SAGAN-style 2-D self-attention for Flax: NNX here, Linen in `selfattn_flax.linen`."""

from selfattn_core import __version__
from selfattn_core.installed import require

require("selfattn_flax", ["jax", "flax"], "flax")

from selfattn_flax.converting.conversion import convert  # noqa: E402 - the message above must come first
from selfattn_flax.nnx import (  # noqa: E402
    SelfAttention2D,
    SelfAttention2DWithMap,
    attention_grid,
    from_canonical,
    load,
    refresh_spectral_norm,
    save,
    to_canonical,
)

__all__ = [
    "SelfAttention2D",
    "SelfAttention2DWithMap",
    "__version__",
    "attention_grid",
    "convert",
    "from_canonical",
    "load",
    "refresh_spectral_norm",
    "save",
    "to_canonical",
]
