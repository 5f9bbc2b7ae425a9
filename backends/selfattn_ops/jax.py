"""Attention without a scale, for JAX: softmax(q kᵀ) v with logits and softmax in at least float32.

Its products are in full precision, whatever JAX's default is: rounded logits move the whole map. For faster products, give
operands in bfloat16.

Query rows are attended from in blocks, each against all keys, so that no (N, M) array beyond one block exists: not
in the forward pass, nor in first or second derivatives, forward or reverse. Only query, key and value are kept for
the derivatives.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from selfattn_core.installed import require

require("selfattn_ops.jax", ["jax"], "jax")

import jax  # noqa: E402 - the message above must come first
import jax.numpy as jnp  # noqa: E402
from jax.custom_derivatives import SymbolicZero  # noqa: E402

from selfattn_ops.blocks import (  # noqa: E402
    SCORE_BUDGET,
    block_rows,
    check_block_size,
    check_operands,
    score_budget,
)

__all__ = ["attend", "attend_with_map"]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, block_size: int | None = None) -> jax.Array:
    """Softmax over keys of q kᵀ, times v; no 1/sqrt(d).

    Sizes that are symbolic (`jax.export`): with N or M symbolic the rows are one block; a symbolic batch counts as one.

    Args:
        query: (…, N, Dk).
        key: (…, M, Dk).
        value: (…, M, Dv).
        block_size: query rows at a time, at most; None chooses by size, and splits a large batch too.

    Returns:
        (…, N, Dv), in the dtype of the operands.

    Raises:
        ValueError: if the operands do not belong together, or `block_size` is not a positive integer.

    Example:
        >>> attend(jnp.zeros((1, 6, 2)), jnp.zeros((1, 4, 2)), jnp.ones((1, 4, 3))).shape
        (1, 6, 3)
    """
    operands = _checked(query, key, value)
    return _attend(*operands, check_block_size(block_size), _kind(operands[0]))


def attend_with_map(
    query: jax.Array, key: jax.Array, value: jax.Array, *, block_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """As `attend`, and the map (…, N, M), whose rows are output positions and sum to 1.

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


# Compiled as a whole, or every eager call would build its loop anew and compile it again.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, block_size: int | None, kind: str
) -> jax.Array:
    chunks, blocks = _plan(query.shape, key.shape[-2], block_size, kind, str(query.dtype))
    operands = (query, key, value)
    batch = math.prod(query.shape[:-2])
    if chunks > 1:
        split = [_split(x.reshape(batch, *x.shape[-2:]), 0, chunks) for x in operands]
        output = jax.lax.map(lambda chunk: _in_blocks(chunk, blocks), split)
        output = _join(output, 0, batch)
    elif blocks > 1:
        output = _in_blocks(operands, blocks)
    else:
        output = _block(query, _transposed(key), _transposed(value))
    return output.reshape(*query.shape[:-1], value.shape[-1])


@jax.jit
def _attend_with_map(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    attention = _softmax(_scores(query, _transposed(key))).astype(value.dtype)
    return _product(attention, _transposed(value)).astype(value.dtype), attention


def _kind(array: jax.Array) -> str:
    """JAX's word for the device that an array is on; of one that is traced, the device that is used by default."""
    if not isinstance(array, jax.core.Tracer):
        return next(iter(array.devices())).platform
    default = jax.config.jax_default_device or jax.devices()[0]
    return default if isinstance(default, str) else default.platform


def _plan(
    query: tuple[Any, ...], keys: Any, block_size: int | None, kind: str = "cpu", dtype: str = "float32"
) -> tuple[int, int]:
    """Parts that the batch and the rows are looped over in; 1 and 1 for no loop."""
    *leading, rows, _ = query
    if not (isinstance(rows, int) and isinstance(keys, int)) or 0 in query:
        return 1, 1
    batch = math.prod(leading) if all(isinstance(size, int) for size in leading) else 1
    chunks, budget = 1, score_budget(kind, batch, rows, keys, dtype)
    if block_size is None:
        # So large a batch gets the fewest rows.
        smallest = 4 * keys * block_rows(None, SCORE_BUDGET, rows, keys)
        # A batch may be sharded without its type saying so, and looping over less than all devices hold would gather
        # it; inside `shard_map` it is one device's share.
        local = bool(jax.sharding.get_abstract_mesh().manual_axes)
        unit = 1 if local else math.gcd(batch, jax.device_count())
        chunks = _parts(batch // unit, max(1, budget // (smallest * unit)))
    return chunks, _parts(rows, block_rows(block_size, -(-batch // chunks), rows, keys, budget))


def _parts(size: int, largest: int) -> int:
    """How many parts of at most `largest` a size makes; equal parts, which need no padding, are worth some more."""
    least = -(-size // largest)
    return next((count for count in range(least, 2 * least) if size % count == 0), least)


def _in_blocks(operands: Sequence[jax.Array], blocks: int) -> jax.Array:
    query, key, value = operands
    leading = query.shape[:-2]
    if math.prod(leading) == 1:
        # XLA does not turn the products below around where they have a batch axis, be it of size 1.
        query, key, value = (x.reshape(x.shape[-2:]) for x in operands)
    # Transposed outside the loop, so that the gradients are summed over blocks as (D, M): XLA's CPU library is up to 10
    # times slower at products that contract the rows and give (M, D).
    key, value = _transposed(key), _transposed(value)
    body = _block
    # One checkpoint keeps only the inputs for the first derivative; that derivative's own intermediates are kept for
    # the second, an (N, M) array in all, unless a second one recomputes them as well.
    for _ in range(2):
        body = jax.checkpoint(body, prevent_cse=False)
    output = jax.lax.map(lambda rows: body(rows, key, value), _split(query, -2, blocks))
    output = _join(output, -2, query.shape[-2])
    return output.reshape(*leading, *output.shape[-2:])


def _transposed(array: jax.Array) -> jax.Array:
    return jnp.swapaxes(array, -1, -2)


def _split(array: jax.Array, axis: int, parts: int) -> jax.Array:
    """Move interleaved parts of an axis to the front; a part takes every `parts`-th entry.

    Interleaved, because the loop then runs over an axis that is not sharded where `axis` is.
    """
    axis %= array.ndim
    size = -(-array.shape[axis] // parts)
    missing = size * parts - array.shape[axis]
    if missing:
        # Copies of the last entry have the cotangent 0, and unlike zeros cannot turn an infinite key into a new NaN.
        padding = [(0, missing if at == axis else 0) for at in range(array.ndim)]
        array = jnp.pad(array, padding, mode="edge")
    shape = array.shape
    return jnp.moveaxis(array.reshape(*shape[:axis], size, parts, *shape[axis + 1 :]), axis + 1, 0)


def _join(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Undo `_split`, down to the first `size` entries."""
    parts, *shape = array.shape
    axis %= len(shape)
    shape[axis] *= parts
    whole = jnp.moveaxis(array, 0, axis + 1).reshape(shape)
    return jax.lax.slice_in_dim(whole, 0, size, axis=axis)


def _block(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Dense attention; key (…, Dk, M) and value (…, Dv, M) are transposed, here and below."""
    return _mix(_scores(query, key), value)


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    return _contract("...nd,...dm->...nm", query, key)


def _product(attention: jax.Array, value: jax.Array) -> jax.Array:
    return _contract("...nm,...dm->...nd", attention.astype(value.dtype), value)


def _contract(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product in full, summed in at least float32, whatever `jax_default_matmul_precision` is; so are its derivatives."""
    return jnp.einsum(
        subscripts,
        left,
        right,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(left.dtype, jnp.float32),
    )


def _exponentials(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exponentials whose largest in a row is 1, and one over their sums."""
    exponentials = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials, 1 / exponentials.sum(axis=-1, keepdims=True)


@jax.custom_jvp
def _softmax(scores: jax.Array) -> jax.Array:
    exponentials, scale = _exponentials(scores)
    return exponentials * scale


@_softmax.defjvp
def _softmax_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    attention = _softmax(*primals)
    return attention, _softmax_tangent(attention, *tangents)


def _softmax_tangent(attention: jax.Array, tangent: jax.Array) -> jax.Array:
    # Contractions, not `(a * t).sum(-1)`: XLA's CPU library runs the fused product and sum of a batch of one 100 times
    # slower. The second is written so because its transpose is the same sum, in reverse mode.
    mean = _contract("...m,...m->...", attention, tangent)
    return attention * tangent - _contract("...,...m->...m", mean, attention)


@jax.custom_jvp
def _mix(scores: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax of the scores, times v: normalised after the product, which is one pass over the scores less."""
    exponentials, scale = _exponentials(scores)
    return (_product(exponentials, value) * scale).astype(value.dtype)


def _mix_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero]
) -> tuple[jax.Array, jax.Array]:
    scores, value = primals
    attention = _softmax(scores)
    # Skipping what is known to be zero saves its matrix product, in derivatives towards some operands only.
    terms = []
    if not isinstance(tangents[0], SymbolicZero):
        terms.append(_product(_softmax_tangent(attention, tangents[0]), value))
    if not isinstance(tangents[1], SymbolicZero):
        terms.append(_product(attention, tangents[1]))
    return _mix(scores, value), sum(terms[1:], terms[0]).astype(value.dtype)


_mix.defjvp(_mix_jvp, symbolic_zeros=True)
