"""Attention without a scale, for JAX: softmax(q kᵀ) v with logits and softmax in at least float32.

Products are computed in full precision whatever JAX's default is, because rounded logits change the whole map. For faster
products, pass operands in bfloat16.

The computation takes one block of query rows at a time, against all keys. No (N, M) array larger than one block exists in
the forward pass or in first or second derivatives, in forward or reverse mode. The derivatives keep only query, key and
value.
"""

import functools
import math

from selfattn_core.installed import require

require("selfattn_ops.jax", ["jax"], "jax")

import jax  # noqa: E402 - the message above must come first
import jax.numpy as jnp  # noqa: E402

from selfattn_ops.blocks import check_block_size, check_operands  # noqa: E402
from selfattn_ops.jax.blocks import device_kind, in_blocks, join, plan, split  # noqa: E402
from selfattn_ops.jax.dense import dense_attention, mixed, scores_of, softmax, transposed  # noqa: E402

__all__ = ["attend", "attend_with_map"]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, block_size: int | None = None) -> jax.Array:
    """Softmax over keys of q kᵀ, times v; no 1/sqrt(d).

    With a symbolic N or M (`jax.export`), all rows are one block. A symbolic batch counts as one element.

    Args:
        query: (…, N, Dk).
        key: (…, M, Dk).
        value: (…, M, Dv).
        block_size: the most query rows in a block. None chooses by size, and also splits a large batch.

    Returns:
        (…, N, Dv), in the dtype of the operands.

    Raises:
        ValueError: if the operands do not belong together, or `block_size` is not a positive integer.

    Example:
        >>> attend(jnp.zeros((1, 6, 2)), jnp.zeros((1, 4, 2)), jnp.ones((1, 4, 3))).shape
        (1, 6, 3)
    """
    operands = _checked(query, key, value)
    return _attend(*operands, check_block_size(block_size), device_kind(operands[0]))


def attend_with_map(
    query: jax.Array, key: jax.Array, value: jax.Array, *, block_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The output of `attend` and the map (…, N, M). Each row of the map belongs to an output position and sums to 1.

    Example:
        >>> attend_with_map(jnp.zeros((1, 6, 2)), jnp.zeros((1, 4, 2)), jnp.ones((1, 4, 3)))[1].shape
        (1, 6, 4)
    """
    operands = _checked(query, key, value)
    check_block_size(block_size)
    return _attend_with_map(*operands)


def _checked(*operands: jax.Array) -> tuple[jax.Array, ...]:
    arrays = tuple(jnp.asarray(operand) for operand in operands)
    query, key, value = (array.shape for array in arrays)
    check_operands(query, key, value, dtypes=[array.dtype for array in arrays])
    return arrays


# Compiled as a whole, because every eager call would otherwise build its loop and compile it again.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, block_size: int | None, kind: str
) -> jax.Array:
    chunks, blocks = plan(query.shape, key.shape[-2], block_size, kind, str(query.dtype))
    dtype = query.dtype
    # Sums over blocks are rounded once, and XLA's CPU library updates no array of 16 bits in place.
    query, key, value = operands = [
        x.astype(jnp.promote_types(dtype, jnp.float32)) for x in (query, key, value)
    ]
    batch = math.prod(query.shape[:-2])
    if chunks > 1:
        parts = [split(x.reshape(batch, *x.shape[-2:]), 0, chunks) for x in operands]
        output = jax.lax.map(lambda chunk: in_blocks(chunk, blocks, dtype), parts)
        output = join(output, 0, batch)
    elif blocks > 1:
        output = in_blocks(operands, blocks, dtype)
    else:
        output = dense_attention(query, transposed(key), transposed(value), dtype)
    return output.reshape(*query.shape[:-1], value.shape[-1]).astype(dtype)


@jax.jit
def _attend_with_map(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = query.dtype
    attention = softmax(scores_of(query, transposed(key), dtype))
    return mixed(attention, transposed(value), dtype).astype(dtype), attention.astype(dtype)
