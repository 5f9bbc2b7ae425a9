"""A layer of Flax as pure functions of a tree of parameters, and arrays to and from such trees."""

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
        build: (config, canonical arrays, dtype, precision) to (what is static, parameters, state).
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
        config: which layer.
        dtype: of its parameters.
        static: what is not an array.
        tree: its parameters.
        state: what else it holds; a pass that moves what it should leave alone moves this.
        compiled: whether `forward`, `attention_map` and `vjp` are compiled; everything else always is.
    """

    config: SelfAttentionConfig
    dtype: DTypeLike
    static: Any
    tree: Any
    state: Any
    compiled: bool = True

    def given(self, x: Array) -> jax.Array:
        """(B, H, W, C) as the layer takes it."""
        return jnp.asarray(x, self.dtype)


def to_array(array: jax.Array) -> Array:
    """A new array; bfloat16 is widened."""
    return np.array(widen(np.asarray(array)))


def in_leaf_order(names: Iterable[str]) -> list[str]:
    """Canonical names in the order of the leaves of a tree."""
    return sorted(names, key=lambda name: name.split("."))


def filled(tree: Any, names: Iterable[str], arrays: Mapping[str, Array], dtype: DTypeLike) -> Any:
    """The tree with these arrays, of canonical names and shapes, for its leaves."""
    leaves = [
        jnp.asarray(arrays[name][None, None] if name.endswith("kernel") else arrays[name], dtype)
        for name in in_leaf_order(names)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def like(model: Model, arrays: Mapping[str, Array]) -> Any:
    """Arrays of canonical names and shapes as a tree like the model's."""
    return filled(model.tree, parameter_table(model.config), arrays, model.dtype)
