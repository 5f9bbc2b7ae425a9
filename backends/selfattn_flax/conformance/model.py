"""A Flax layer as pure functions of a tree of parameters, and conversions between arrays and trees."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.arrays import Array, widen

__all__ = ["Kind", "Model", "filled", "in_leaf_order", "like", "to_array"]


@dataclass(frozen=True)
class Kind:
    """One of Flax's two layers, as pure functions of a tree of parameters.

    Args:
        build: (config, canonical arrays, dtype, precision) to (static part, parameters, state).
        new: (config, seed) to the same, of a new layer.
        apply: (static, parameters, state, x) to y and the state after it, in evaluation.
        attention: (static, parameters, state, x) to A.
        train: (static, parameters, state, x) to y and the state after it, in training.
        export: (static, parameters, state) to canonical arrays.
    """

    build: Callable[[SelfAttentionConfig, Mapping[str, Array], str, str | None], tuple[Any, Any, Any]]
    new: Callable[[SelfAttentionConfig, int], tuple[Any, Any, Any]]
    apply: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]]
    attention: Callable[[Any, Any, Any, jax.Array], jax.Array]
    train: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]]
    export: Callable[[Any, Any, Any], dict[str, Array]]


@dataclass
class Model:
    """A layer.

    Args:
        config: options of the layer.
        dtype: dtype of its parameters.
        static: the parts that are not arrays.
        tree: its parameters.
        state: its other arrays. A pass that wrongly changes something changes these.
        compiled: whether `forward`, `attention_map` and `vjp` are compiled. All other functions always are.
    """

    config: SelfAttentionConfig
    dtype: DTypeLike
    static: Any
    tree: Any
    state: Any
    compiled: bool = True

    def given(self, x: Array) -> jax.Array:
        """Maps (B, H, W, C) as the layer's input."""
        return jnp.asarray(x, self.dtype)


def to_array(array: jax.Array) -> Array:
    """The value as a new array. bfloat16 is widened."""
    return np.array(widen(np.asarray(array)))


def in_leaf_order(names: Iterable[str]) -> list[str]:
    """The canonical names of a tree's leaves, in their order."""
    return sorted(names, key=lambda name: name.split("."))


def filled(tree: Any, names: Iterable[str], arrays: Mapping[str, Array], dtype: DTypeLike) -> Any:
    """The tree with its leaves replaced by these arrays, which have canonical names and shapes."""
    leaves = [
        jnp.asarray(arrays[name][None, None] if name.endswith("kernel") else arrays[name], dtype)
        for name in in_leaf_order(names)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def like(model: Model, arrays: Mapping[str, Array]) -> Any:
    """Arrays with canonical names and shapes, as a tree with the structure of the model's tree."""
    return filled(model.tree, parameter_table(model.config), arrays, model.dtype)
