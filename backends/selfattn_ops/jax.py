"""Attention without a scale, for JAX: softmax(q kᵀ) v with logits and softmax in at least float32."""

import jax
import jax.numpy as jnp

from selfattn_ops.blocks import block_rows, check_operands

__all__ = ["attend", "attend_with_map"]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, block_size: int | None = None) -> jax.Array:
    """Softmax over keys of q kᵀ, times v; no 1/sqrt(d).

    Args:
        query: (…, N, Dk).
        key: (…, M, Dk).
        value: (…, M, Dv).
        block_size: query rows at a time; None chooses by size.

    Returns:
        (…, N, Dv), in the dtype of the operands.

    Raises:
        ValueError: if the operands do not belong together, or `block_size` is not a positive integer.

    Example:
        >>> attend(jnp.zeros((1, 6, 2)), jnp.zeros((1, 4, 2)), jnp.ones((1, 4, 3))).shape
        (1, 6, 3)
    """
    return attend_with_map(query, key, value, block_size=block_size)[0]


def attend_with_map(
    query: jax.Array, key: jax.Array, value: jax.Array, *, block_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """As `attend`, and the map (…, N, M), whose rows are output positions and sum to 1.

    Example:
        >>> attend_with_map(jnp.zeros((1, 6, 2)), jnp.zeros((1, 4, 2)), jnp.ones((1, 4, 3)))[1].shape
        (1, 6, 4)
    """
    operands = (query, key, value)
    check_operands(*(operand.shape for operand in operands), dtypes=[operand.dtype for operand in operands])
    block_rows(block_size, 1, query.shape[-2], key.shape[-2])
    arithmetic = jnp.promote_types(query.dtype, jnp.float32)
    scores = query.astype(arithmetic) @ jnp.swapaxes(key.astype(arithmetic), -1, -2)
    attention = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return attention @ value, attention
