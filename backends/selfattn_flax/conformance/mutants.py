"""A mutant with an error that only an NNX layer can have, for the tests of the kit."""

from collections.abc import Mapping
from dataclasses import replace

import jax
from flax import nnx

from selfattn_core import SelfAttentionConfig
from selfattn_core.arrays import Array
from selfattn_flax.conformance.backend import FlaxBackend, nnx_backend
from selfattn_flax.conformance.model import Model
from selfattn_flax.nnx.layer import SelfAttention2D

__all__ = ["MovesInEvaluation"]


class MovesInEvaluation(FlaxBackend):
    """A layer whose spectral norm moves in every pass, like a `nnx.SpectralNorm` that is never set to evaluation mode."""

    def __init__(self) -> None:
        super().__init__("moves in evaluation", nnx_backend.kind)

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """The broken layer with these weights."""
        right = super().build(config, params, dtype, layout)
        layer = _MovingAlways.from_config(config, param_dtype=dtype, precision="highest", rngs=nnx.Rngs(0))
        layer.eval()
        return replace(right, static=nnx.split(layer, nnx.Param, ...)[0])


class _MovingAlways(SelfAttention2D):
    def __call__(self, x: jax.Array, *, sow_weights: bool = False) -> jax.Array:
        y = super().__call__(x, sow_weights=sow_weights)
        self.query.set_view(use_running_average=False)
        self.query.normalised_kernel()
        self.query.set_view(use_running_average=True)
        return y
