"""The NNX layer as pure functions."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from selfattn_core import SelfAttentionConfig
from selfattn_core.arrays import Array
from selfattn_flax.conformance.model import Kind
from selfattn_flax.nnx import SelfAttention2D, from_canonical, to_canonical

__all__ = ["NNX"]


def _build(
    config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, precision: str | None
) -> tuple[Any, Any, Any]:
    return _split(from_canonical(config, params, param_dtype=dtype, precision=precision))


def _new(config: SelfAttentionConfig, seed: int) -> tuple[Any, Any, Any]:
    return _split(SelfAttention2D.from_config(config, rngs=nnx.Rngs(seed)))


def _split(layer: SelfAttention2D) -> tuple[Any, Any, Any]:
    # The definition is the function in evaluation mode.
    layer.eval()
    return nnx.split(layer, nnx.Param, ...)


def _apply(static: Any, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    # A variable can only be changed in the trace that made it, so inside a derivative the layer is made there.
    layer = nnx.merge(static, tree, state, copy=True)
    y = layer(x)
    return y, nnx.split(layer, nnx.Param, ...)[2]


def _attention(static: Any, tree: Any, state: Any, x: jax.Array) -> jax.Array:
    _, sown = nnx.capture(nnx.merge(static, tree, state), nnx.Intermediate)(x, sow_weights=True)
    return sown["attention_weights"][0]


def _train(static: Any, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    layer = nnx.merge(static, tree, state, copy=True)
    layer.train()
    y = layer(x)
    return y, _split(layer)[2]


def _export(static: Any, tree: Any, state: Any) -> dict[str, Array]:
    return to_canonical(nnx.merge(static, tree, state))


NNX = Kind(_build, _new, _apply, _attention, _train, _export)
