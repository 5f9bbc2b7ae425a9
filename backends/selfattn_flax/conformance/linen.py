"""The Linen layer as pure functions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from selfattn_core import SelfAttentionConfig
from selfattn_core.arrays import Array
from selfattn_flax.conformance.model import Kind
from selfattn_flax.linen import SelfAttention2D, from_canonical, to_canonical

__all__ = ["LINEN"]


def _build(
    config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, precision: str | None
) -> tuple[Any, Any, Any]:
    return _split(*from_canonical(config, params, param_dtype=dtype, precision=precision))


def _new(config: SelfAttentionConfig, seed: int) -> tuple[Any, Any, Any]:
    module = SelfAttention2D.from_config(config)
    x = jnp.zeros((config.kv_pool, config.kv_pool, config.channels))
    return _split(module, module.init(jax.random.key(seed), x, use_running_average=True))


def _split(module: nn.Module, variables: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    state = {name: collection for name, collection in variables.items() if name != "params"}
    return module, variables["params"], state


def _apply(static: nn.Module, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    # Collections that are not mutable cannot change.
    return static.apply({"params": tree, **state}, x, use_running_average=True), state


def _attention(static: nn.Module, tree: Any, state: Any, x: jax.Array) -> jax.Array:
    _, sown = static.apply(
        {"params": tree, **state}, x, sow_weights=True, use_running_average=True, mutable=["intermediates"]
    )
    return sown["intermediates"]["attention_weights"][0]


def _train(static: nn.Module, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    variables = {"params": tree, **state}
    y, moved = static.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    return y, moved


def _export(static: nn.Module, tree: Any, state: Any) -> dict[str, Array]:
    return to_canonical(static, {"params": tree, **state})


LINEN = Kind(_build, _new, _apply, _attention, _train, _export)
