"""The size of blocks of batch elements and query rows, and the loop over them."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from selfattn_ops.blocks import SCORE_BUDGET, block_rows, score_budget
from selfattn_ops.jax.dense import dense_attention, transposed

__all__ = ["device_kind", "in_blocks", "join", "plan", "split"]


def device_kind(array: jax.Array) -> str:
    """JAX's word for the kind of device of an array. For a traced array it is that of the default device."""
    if not isinstance(array, jax.core.Tracer):
        return next(iter(array.devices())).platform
    default = jax.config.jax_default_device or jax.devices()[0]
    return default if isinstance(default, str) else default.platform


def plan(
    query: tuple[Any, ...], keys: Any, block_size: int | None, kind: str = "cpu", dtype: str = "float32"
) -> tuple[int, int]:
    """The number of parts of the batch and of the rows. With 1 and 1 there is no loop."""
    *leading, rows, _ = query
    if not (isinstance(rows, int) and isinstance(keys, int)) or 0 in query:
        return 1, 1
    batch = math.prod(leading) if all(isinstance(size, int) for size in leading) else 1
    chunks, budget = 1, score_budget(kind, batch, rows, keys, dtype)
    if block_size is None:
        # The bytes of one element's block with the fewest rows.
        smallest = 4 * keys * block_rows(None, SCORE_BUDGET, rows, keys)
        # A batch may be sharded without a sign of it in its type. A loop over less than what all devices hold would
        # gather it. Inside `shard_map` the batch is the share of one device.
        local = bool(jax.sharding.get_abstract_mesh().manual_axes)
        unit = 1 if local else math.gcd(batch, jax.device_count())
        chunks = _parts(batch // unit, max(1, budget // (smallest * unit)))
    return chunks, _parts(rows, block_rows(block_size, -(-batch // chunks), rows, keys, budget))


def _parts(size: int, largest: int) -> int:
    """How many parts of at most `largest` a size needs, or up to twice as many if these are equal and need no padding."""
    least = -(-size // largest)
    return next((count for count in range(least, 2 * least) if size % count == 0), least)


def in_blocks(operands: Sequence[jax.Array], blocks: int, factors: DTypeLike) -> jax.Array:
    """The output, computed in a loop over blocks of query rows."""
    query, key, value = operands
    leading = query.shape[:-2]
    if math.prod(leading) == 1:
        # XLA does not transpose the products below if they have a batch axis, even one of size 1.
        query, key, value = (x.reshape(x.shape[-2:]) for x in operands)
    # Transposed outside the loop, so that the gradients are summed over blocks as (D, M): XLA's CPU library is up to 10
    # times slower at products that contract the rows and give (M, D).
    key, value = transposed(key), transposed(value)
    body = functools.partial(dense_attention, factors=factors)
    # One checkpoint keeps only the inputs for the first derivative. Without a second checkpoint, the intermediates of the
    # first derivative are kept for the second derivative, and together they are an (N, M) array.
    for _ in range(2):
        body = jax.checkpoint(body, prevent_cse=False)
    output = jax.lax.map(lambda rows: body(rows, key, value), split(query, -2, blocks))
    output = join(output, -2, query.shape[-2])
    return output.reshape(*leading, *output.shape[-2:])


def split(array: jax.Array, axis: int, parts: int) -> jax.Array:
    """Move interleaved parts of an axis to the front. A part takes every `parts`-th entry.

    The parts are interleaved so that the loop runs over an axis that is not sharded where `axis` is.
    """
    axis %= array.ndim
    size = -(-array.shape[axis] // parts)
    missing = size * parts - array.shape[axis]
    if missing:
        # Copies of the last entry have the cotangent 0. Unlike zeros, they cannot turn an infinite key into a new NaN.
        padding = [(0, missing if at == axis else 0) for at in range(array.ndim)]
        array = jnp.pad(array, padding, mode="edge")
    shape = array.shape
    return jnp.moveaxis(array.reshape(*shape[:axis], size, parts, *shape[axis + 1 :]), axis + 1, 0)


def join(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Undo `split`, down to the first `size` entries."""
    parts, *shape = array.shape
    axis %= len(shape)
    shape[axis] *= parts
    whole = jnp.moveaxis(array, 0, axis + 1).reshape(shape)
    return jax.lax.slice_in_dim(whole, 0, size, axis=axis)
