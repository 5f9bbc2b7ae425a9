"""Attention that computes the whole map at once: softmax, the products around it, and their derivative rules."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from selfattn_ops.jax.products import contract, product

__all__ = ["dense_attention", "mixed", "scores_of", "softmax", "transposed"]


def dense_attention(query: jax.Array, key: jax.Array, value: jax.Array, factors: DTypeLike) -> jax.Array:
    """Attention from all rows at once, in at least float32. Here and below, key (…, Dk, M) and value (…, Dv, M) are transposed.

    The factors of every product are rounded to `factors`.
    """
    exponentials, scale = _weights(scores_of(query, key, factors), factors)
    # Normalised after the product, to save one pass over the scores.
    return mixed(exponentials, value, factors) * scale


def transposed(array: jax.Array) -> jax.Array:
    """Exchange the last two axes."""
    return jnp.swapaxes(array, -1, -2)


def scores_of(query: jax.Array, key: jax.Array, factors: DTypeLike) -> jax.Array:
    """Q kᵀ."""
    return product(query, key, factors)


def mixed(attention: jax.Array, value: jax.Array, factors: DTypeLike) -> jax.Array:
    """A v."""
    return product(attention, value, factors, flip=True)


def softmax(scores: jax.Array) -> jax.Array:
    """The map of the scores."""
    exponentials, scale = _weights(scores, scores.dtype)
    return exponentials * scale


def _weights(scores: jax.Array, factors: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """The map before it is normalised, and one over the sums of its rows, which counts as a constant."""
    exponentials, scale = _exponentials(scores, factors)
    return exponentials, jax.lax.stop_gradient(scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _exponentials(scores: jax.Array, factors: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Exponentials, scaled so that the largest in each row is 1, and one over their sums."""
    exponentials = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    if jnp.dtype(factors) == jnp.bfloat16:
        # The products round them anyway. Rounded before their sum is taken, the map has rows that sum to 1, derivatives
        # that belong to it, and half the bytes.
        exponentials = exponentials.astype(factors).astype(scores.dtype)
    return exponentials, 1 / exponentials.sum(axis=-1, keepdims=True)


@_exponentials.defjvp
def _exponentials_jvp(
    factors: DTypeLike, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    exponentials, scale = _weights(*primals, factors)
    (tangent,) = tangents
    # The map determines its exponentials only up to a factor for each row. This derivative keeps the sums of the rows, so
    # the scale has none, and products do not round large numbers that cancel afterwards.
    #
    # Contractions instead of `(e * t).sum(-1)`, because XLA's CPU library runs the fused product and sum of a batch of
    # one 100 times slower. The second product is a contraction because its transpose in reverse mode is the same sum.
    mean = contract("...m,...m->...", exponentials, tangent) * scale[..., 0]
    moved = exponentials * tangent - contract("...,...m->...m", mean, exponentials)
    return (exponentials, scale), (moved, jnp.zeros_like(scale))
