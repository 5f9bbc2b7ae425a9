"""The kit's questions to a Flax layer, as functions of its parameters. Most of them are compiled."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from selfattn_flax.conformance.model import Kind

__all__ = [
    "apply",
    "attention_map",
    "compiled_apply",
    "compiled_attention_map",
    "compiled_vjp",
    "per_sample_vjp",
    "r1",
    "training_pass",
    "training_vjp",
    "vjp",
    "vjp_of_vjp",
]


# Layers of one config have equal static parts, so each function is compiled once for each size. Gradients by parameters are
# returned as leaves. Their names are then not part of the program, and the programs of both layers are the same.
_static = partial(jax.jit, static_argnums=(0, 1))


def apply(kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """The output, and the state after it."""
    return kind.apply(static, tree, state, x)


compiled_apply = _static(apply)


def attention_map(kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array) -> jax.Array:
    """The map."""
    return kind.attention(static, tree, state, x)


compiled_attention_map = _static(attention_map)


def vjp(
    kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, dy: jax.Array
) -> tuple[tuple[list[jax.Array], jax.Array], Any]:
    """The gradients by the parameters, as leaves, the gradient by x, and the state."""
    _, pull, state = jax.vjp(lambda tree, x: kind.apply(static, tree, state, x), tree, x, has_aux=True)
    by_tree, by_x = pull(dy)
    return (jax.tree.leaves(by_tree), by_x), state


compiled_vjp = _static(vjp)


def _vjp_alone(
    kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, dy: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    return vjp(kind, static, tree, state, x, dy)[0]


@_static
def training_pass(kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """The output in training mode, and the state after it."""
    return kind.train(static, tree, state, x)


@_static
def training_vjp(
    kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, dy: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """The gradients in training mode."""
    _, pull, _ = jax.vjp(lambda tree, x: kind.train(static, tree, state, x), tree, x, has_aux=True)
    by_tree, by_x = pull(dy)
    return jax.tree.leaves(by_tree), by_x


@_static
def r1(kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, w: jax.Array) -> Any:
    """The penalty and its gradients."""

    def penalty(tree: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.grad(lambda x: jnp.sum(w * kind.apply(static, tree, state, x)[0]))(x) ** 2)

    value, (by_tree, by_x) = jax.value_and_grad(penalty, (0, 1))(tree, x)
    return value, (jax.tree.leaves(by_tree), by_x)


@_static
def vjp_of_vjp(
    kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, dy: jax.Array, cotangents: Any
) -> Any:
    """The gradients of the gradients."""
    _, pull = jax.vjp(lambda tree, x, dy: _vjp_alone(kind, static, tree, state, x, dy), tree, x, dy)
    by_tree, by_x, by_dy = pull(cotangents)
    return jax.tree.leaves(by_tree), by_x, by_dy


@_static
def per_sample_vjp(
    kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, dy: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """The gradients for each sample."""
    return jax.vmap(partial(_vjp_alone, kind, static), (None, None, 0, 0))(tree, state, x, dy)
