"""Attention that computes the whole map at once: products in full precision, softmax, and their derivative rules."""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

__all__ = ["dense_attention", "product", "scores_of", "softmax", "transposed"]


def dense_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention from all rows at once. Here and below, key (…, Dk, M) and value (…, Dv, M) are transposed."""
    return _mix(scores_of(query, key), value)


def transposed(array: jax.Array) -> jax.Array:
    """Exchange the last two axes."""
    return jnp.swapaxes(array, -1, -2)


def scores_of(query: jax.Array, key: jax.Array) -> jax.Array:
    """Q kᵀ."""
    return _contract("...nd,...dm->...nm", query, key)


def product(attention: jax.Array, value: jax.Array) -> jax.Array:
    """A v."""
    return _contract("...nm,...dm->...nd", attention.astype(value.dtype), value)


def _contract(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product in full precision, summed in at least float32, whatever `jax_default_matmul_precision` is.

    The derivatives have the same precision.
    """
    return jnp.einsum(
        subscripts,
        left,
        right,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(left.dtype, jnp.float32),
    )


def _exponentials(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exponentials, scaled so that the largest in each row is 1, and one over their sums."""
    exponentials = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials, 1 / exponentials.sum(axis=-1, keepdims=True)


@jax.custom_jvp
def softmax(scores: jax.Array) -> jax.Array:
    """The map of the scores."""
    exponentials, scale = _exponentials(scores)
    return exponentials * scale


@softmax.defjvp
def _softmax_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    attention = softmax(*primals)
    return attention, _softmax_tangent(attention, *tangents)


def _softmax_tangent(attention: jax.Array, tangent: jax.Array) -> jax.Array:
    # Contractions instead of `(a * t).sum(-1)`, because XLA's CPU library runs the fused product and sum of a batch of
    # one 100 times slower. The second product is a contraction because its transpose in reverse mode is the same sum.
    mean = _contract("...m,...m->...", attention, tangent)
    return attention * tangent - _contract("...,...m->...m", mean, attention)


@jax.custom_jvp
def _mix(scores: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax of the scores, times v, normalised after the product to save one pass over the scores."""
    exponentials, scale = _exponentials(scores)
    return (product(exponentials, value) * scale).astype(value.dtype)


def _mix_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero]
) -> tuple[jax.Array, jax.Array]:
    scores, value = primals
    attention = softmax(scores)
    # In derivatives towards some operands only, skipping a tangent that is known to be zero saves a matrix product.
    terms = []
    if not isinstance(tangents[0], SymbolicZero):
        terms.append(product(_softmax_tangent(attention, tangents[0]), value))
    if not isinstance(tangents[1], SymbolicZero):
        terms.append(product(attention, tangents[1]))
    return _mix(scores, value), sum(terms[1:], terms[0]).astype(value.dtype)


_mix.defjvp(_mix_jvp, symbolic_zeros=True)
