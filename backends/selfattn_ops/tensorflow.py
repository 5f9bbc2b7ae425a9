"""Attention without a scale, for TensorFlow: softmax(q kᵀ) v in memory linear in N, through second derivatives.

Scores exist for one block of query rows at a time, against all keys, and are computed anew for each derivative:
only query, key and value are kept. Where one block holds everything, the plain operations are the whole answer.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from selfattn_core.installed import require

require("selfattn_ops.tensorflow", ["tensorflow"], "tensorflow")

import tensorflow as tf  # noqa: E402 - the message above must come first

from selfattn_ops.blocks import (  # noqa: E402
    MINIMUM_ROWS,
    SCORE_BUDGET,
    block_rows,
    check_block_size,
    check_operands,
    score_budget,
)

__all__ = ["attend", "attend_with_map"]


@tf.autograph.experimental.do_not_convert
def attend(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, *, block_size: int | None = None) -> tf.Tensor:
    """Softmax over keys of q kᵀ, times v; no 1/sqrt(d).

    Logits and softmax are computed in at least float32. First and second derivatives never hold more scores than
    one block of query rows. Sizes may be unknown when a `tf.function` is traced, the rank may not.

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
        >>> attend(tf.zeros((1, 6, 2)), tf.zeros((1, 4, 2)), tf.ones((1, 4, 3))).shape
        TensorShape([1, 6, 3])
    """
    query, key, value = _checked(query, key, value, block_size=block_size)
    *leading, rows, _ = _sizes(query)
    batch = math.prod(leading)
    if _single(block_size, batch, rows, _sizes(key)[-2]) is True:
        return _dense(query, key, value)[0]
    operands = [
        tf.reshape(operand, _shape([batch, *_sizes(operand)[-2:]])) for operand in (query, key, value)
    ]
    output = tf.reshape(_attend(block_size, *operands), _shape([*leading, rows, _sizes(value)[-1]]))
    output.set_shape(query.shape[:-1] + value.shape[-1:])
    return output


@tf.autograph.experimental.do_not_convert
def attend_with_map(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, *, block_size: int | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """As `attend`, and the map (…, N, M), whose rows are output positions and sum to 1.

    The map is what it costs: quadratic memory, here and in the derivatives, whatever `block_size` says.

    Example:
        >>> attend_with_map(tf.zeros((1, 6, 2)), tf.zeros((1, 4, 2)), tf.ones((1, 4, 3)))[1].shape
        TensorShape([1, 6, 4])
    """
    return _dense(*_checked(query, key, value, block_size=block_size))


# What a block returns: results by row, and addends of the sums.
_Parts = tuple[list[Any], list[Any]]
_Block = Callable[[Sequence[Any], Sequence[Any]], _Parts]
# A size is an int where it is known, and a scalar int64 tensor where only the running graph knows it.
_Size = Any


def _checked(*operands: tf.Tensor, block_size: int | None) -> list[tf.Tensor]:
    tensors = [tf.convert_to_tensor(operand) for operand in operands]
    if any(tensor.shape.rank is None for tensor in tensors):
        raise ValueError(
            "attend: an operand of unknown rank; give its rank with tf.ensure_shape, sizes may be None."
        )
    check_operands(*(tensor.shape for tensor in tensors), dtypes=[tensor.dtype for tensor in tensors])
    check_block_size(block_size)
    return tensors


def _sizes(tensor: tf.Tensor) -> list[_Size]:
    known = tensor.shape.as_list()
    if None not in known:
        return known
    # Products of sizes pass 32 bits, a size does not: slices count in 32, and tf.shape refuses what is beyond them.
    running = tf.cast(tf.shape(tensor), tf.int64)
    return [running[axis] if size is None else size for axis, size in enumerate(known)]


def _block_rows(
    block_size: int | None, batch: _Size, rows: _Size, keys: _Size, budget: int | None = None
) -> _Size:
    """`block_rows`, also of sizes that only the running graph knows."""
    if all(isinstance(size, int) for size in (batch, rows, keys)):
        return block_rows(block_size, batch, rows, keys, budget)
    wanted = check_block_size(block_size)
    if wanted is None:
        wanted = _largest(MINIMUM_ROWS, SCORE_BUDGET // (4 * _largest(batch, 1) * _largest(keys, 1)))
    return _largest(1, _smallest(rows, wanted))


def _plan(
    block_size: int | None,
    batch: _Size,
    rows: _Size,
    keys: _Size,
    kind: str = "cpu",
    dtype: str = "float32",
) -> tuple[_Size, _Size]:
    """Batch elements and query rows in a block.

    The rows are those of a single element: many rows of few elements read keys and values less often than few rows of
    many. Elements fill what is left of the budget.
    """
    known = all(isinstance(size, int) for size in (batch, rows, keys))
    # Sizes that only the running graph knows have the budget of a CPU.
    budget = score_budget(kind, batch, rows, keys, dtype) if known else SCORE_BUDGET
    block = _block_rows(block_size, 1, rows, keys, budget)
    elements = budget // (4 * block * _largest(keys, 1))
    return _largest(1, _smallest(batch, elements)), block


def _kind(tensor: tf.Tensor) -> str:
    """TensorFlow's word for the device that a tensor is on; in a graph, which does not tell, a card if there is one."""
    if tensor.device:
        return tensor.device.split(":")[-2].lower()
    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"


def _single(block_size: int | None, batch: _Size, rows: _Size, keys: _Size) -> bool | tf.Tensor:
    """Whether one block is everything: True, False or, of sizes not known yet, a tensor."""
    elements, block = _plan(block_size, batch, rows, keys)
    covered = [elements >= batch, block >= rows]
    # Of nothing there is no first block whose result could be joined to others.
    empty = [batch == 0, rows == 0]
    if all(one is True for one in covered) or any(one is True for one in empty):
        return True
    if any(one is False for one in covered) and all(one is False for one in empty):
        return False
    return tf.logical_or(tf.reduce_all(covered), tf.reduce_any(empty))


def _shape(sizes: Sequence[_Size], dtype: tf.DType = tf.int64) -> tf.Tensor:
    return tf.stack([tf.cast(size, dtype) for size in sizes])


def _largest(one: _Size, other: _Size) -> _Size:
    known = isinstance(one, int) and isinstance(other, int)
    return max(one, other) if known else tf.maximum(tf.cast(one, tf.int64), tf.cast(other, tf.int64))


def _smallest(one: _Size, other: _Size) -> _Size:
    known = isinstance(one, int) and isinstance(other, int)
    return min(one, other) if known else tf.minimum(tf.cast(one, tf.int64), tf.cast(other, tf.int64))


def _arithmetic(dtype: tf.DType) -> tf.DType:
    return dtype if dtype.size > 2 else tf.float32


def _scores(query: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    return tf.nn.softmax(tf.matmul(query, key, transpose_b=True))


def _dense(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    wide = _arithmetic(query.dtype)
    attention = tf.cast(_scores(tf.cast(query, wide), tf.cast(key, wide)), value.dtype)
    return tf.matmul(attention, value), attention


def _attend(block_size: int | None, *operands: tf.Tensor) -> tf.Tensor:
    """(B, N, Dk), (B, M, Dk), (B, M, Dv) -> (B, N, Dv), in blocks, with derivatives in blocks.

    Everything differentiated is an argument: TensorFlow drops the gradient of what such a function closes over.
    identity makes each one a tensor of the graph at hand, which may be that of a derivative or of a branch: the next
    derivative fails on another's. stop_gradient keeps the tapes from recording, and so from keeping, each block.
    """

    @tf.custom_gradient
    def forward(*operands: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        def gradient(cotangent: tf.Tensor) -> Any:
            return _gradients(block_size, *operands, cotangent)

        return _forward(block_size, *map(tf.stop_gradient, operands)), gradient

    return forward(*map(tf.identity, operands))


def _gradients(block_size: int | None, *operands: tf.Tensor) -> Any:
    """The three gradients from (q, k, v, G), with a derivative of their own."""

    @tf.custom_gradient
    def backward(*operands: tf.Tensor) -> tuple[Any, Callable[..., Any]]:
        def gradient(*cotangents: tf.Tensor) -> Any:
            return _second(block_size, *operands, *cotangents)

        return _first(block_size, *map(tf.stop_gradient, operands)), gradient

    return backward(*map(tf.identity, operands))


def _forward(block_size: int | None, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    wide = _arithmetic(query.dtype)

    def block(by_row: Sequence[tf.Tensor], by_element: Sequence[tf.Tensor]) -> _Parts:
        (q,), (k, v) = by_row, by_element
        return [tf.matmul(tf.cast(_scores(q, k), v.dtype), v)], []

    return _in_blocks(block_size, block, [tf.cast(query, wide)], [tf.cast(key, wide), value], [value.dtype])[
        0
    ]


def _first(
    block_size: int | None, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, g: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """The gradients of o = A v: with D = rowsum(A∘dA), dS = A∘(dA − D)."""
    dtype, wide = query.dtype, _arithmetic(query.dtype)

    def block(by_row: Sequence[tf.Tensor], by_element: Sequence[tf.Tensor]) -> _Parts:
        (q, g), (k, v) = by_row, by_element
        a = _scores(q, k)
        da = tf.matmul(g, v, transpose_b=True)
        ds = a * (da - _rowsum(a * da))
        # dk is summed as (Dk, M): as (M, Dk) this product, narrow as Dk is, takes twice the time.
        return [tf.matmul(ds, k)], [tf.matmul(q, ds, transpose_a=True), tf.matmul(a, g, transpose_a=True)]

    query, key, value, g = (tf.cast(operand, wide) for operand in (query, key, value, g))
    sums = [_sizes(key)[:0:-1], _sizes(value)[1:]]
    dq, dk, dv = _in_blocks(block_size, block, [query, g], [key, value], [wide], sums)
    return tuple(tf.cast(gradient, dtype) for gradient in (dq, _turned(dk), dv))


def _second(
    block_size: int | None,
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    g: tf.Tensor,
    q_dot: tf.Tensor,
    k_dot: tf.Tensor,
    v_dot: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    """The gradients of `_first` towards q, k, v and G, for cotangents q̇, k̇, v̇ of dq, dk, dv.

        U = q̇ kᵀ + q k̇ᵀ    Ȧ = A∘(U − rowsum(A∘U))    X = (U − u)∘(dA − D) + G v̇ᵀ    dṠ = A∘(X − rowsum(A∘X))
        dṠ k + dS k̇    dṠᵀ q + dSᵀ q̇    Ȧᵀ G    Ȧ v + A v̇

    In plain operations, so that a third derivative exists; that one does keep every block.
    """
    dtype, wide = query.dtype, _arithmetic(query.dtype)

    def block(by_row: Sequence[tf.Tensor], by_element: Sequence[tf.Tensor]) -> _Parts:
        (q, g, q_dot), (k, v, k_dot, v_dot, both_keys, keys, values) = by_row, by_element
        a = _scores(q, k)
        da = tf.matmul(g, v, transpose_b=True)
        centred = da - _rowsum(a * da)
        ds = a * centred
        both = tf.concat([q_dot, q], -1)
        u = _rowsum(both * tf.matmul(a, both_keys))
        a_dot = a * tf.matmul(tf.concat([both, -u], -1), keys, transpose_b=True)
        o_dot = tf.matmul(a_dot, v) + tf.matmul(a, v_dot)
        x = _rowsum(g * o_dot)
        ds_dot = a_dot * centred + a * tf.matmul(tf.concat([g, -x], -1), values, transpose_b=True)
        return (
            [tf.matmul(ds_dot, k) + tf.matmul(ds, k_dot), o_dot],
            [
                tf.matmul(q, ds_dot, transpose_a=True) + tf.matmul(q_dot, ds, transpose_a=True),
                tf.matmul(a_dot, g, transpose_a=True),
            ],
        )

    query, key, value, g, q_dot, k_dot, v_dot = (
        tf.cast(operand, wide) for operand in (query, key, value, g, q_dot, k_dot, v_dot)
    )
    ones = tf.ones_like(key[..., :1])
    keys = tf.concat([key, k_dot], -1)
    by_element = [key, value, k_dot, v_dot, keys, tf.concat([keys, ones], -1), tf.concat([v_dot, ones], -1)]
    sums = [_sizes(key)[:0:-1], _sizes(value)[1:]]
    to_q, to_g, to_k, to_v = _in_blocks(block_size, block, [query, g, q_dot], by_element, [wide, wide], sums)
    return tuple(tf.cast(gradient, dtype) for gradient in (to_q, _turned(to_k), to_v, to_g))


def _in_blocks(
    block_size: int | None,
    block: _Block,
    by_row: Sequence[tf.Tensor],
    by_element: Sequence[tf.Tensor],
    dtypes: Sequence[tf.DType],
    sums: Sequence[Sequence[_Size]] = (),
) -> list[tf.Tensor]:
    """Call `block` on batch elements and query rows in turn; join what it returns by row, add up the rest.

    Args:
        block_size: as in `attend`.
        block: from parts of `by_row` (b, n, …) and `by_element` (b, M, …) to parts of the results and addends.
        by_row: (B, N, …).
        by_element: (B, M, …).
        dtypes: of the results by row, (B, N, …).
        sums: shapes of the sums without their batch axis, in the dtype of `by_row`.
    """
    batch, rows = _sizes(by_row[0])[:2]
    keys = _sizes(by_element[0])[1]
    elements, step = _plan(block_size, batch, rows, keys, _kind(by_row[0]), by_row[0].dtype.name)
    wide = by_row[0].dtype

    def chunk(start: _Size, count: _Size) -> _Parts:
        mine = [_part(operand, 0, start, count) for operand in by_row]
        shared = [_part(operand, 0, start, count) for operand in by_element]
        zeros = [tf.zeros(_shape([count, *shape]), wide) for shape in sums]
        results, totals = _sweep(
            rows,
            step,
            1,
            lambda start, count: block([_part(x, 1, start, count) for x in mine], shared),
            dtypes,
            zeros,
        )
        return [*results, *totals], []

    def everything() -> list[tf.Tensor]:
        results, addends = block(by_row, by_element)
        return [*results, *addends]

    def in_turn() -> list[tf.Tensor]:
        return _sweep(batch, elements, 0, chunk, [*dtypes, *(wide for _ in sums)], [])[0]

    single = _single(block_size, batch, rows, keys)
    # The choice lies inside the derivatives: TensorFlow fails on the second derivative of a tf.cond around them.
    return in_turn() if single is False else tf.cond(single, everything, in_turn)


def _sweep(
    total: _Size,
    step: _Size,
    axis: int,
    body: Callable[[_Size, _Size], _Parts],
    dtypes: Sequence[tf.DType],
    sums: list[tf.Tensor],
) -> _Parts:
    """Results of body(start, count) over [0, total), joined along `axis`, and its addends added to `sums`.

    The steps are of equal length, as XLA needs, with the rest after the loop: the loop is one operation of the graph
    however many steps it takes, and one step without a rest is no loop.
    """
    steps, rest = total // step, total % step
    # Of nothing as well: XLA compiles the loop also where it takes no step.
    size = _smallest(step, total)
    parts: list[list[tf.Tensor]] = []

    def once(start: _Size, count: _Size) -> None:
        results, addends = body(start, count)
        parts.append(results)
        sums[:] = [one + other for one, other in zip(sums, addends, strict=True)]

    def again(index: tf.Tensor, arrays: list[tf.TensorArray], totals: list[tf.Tensor]) -> Any:
        results, addends = body(index * tf.cast(step, tf.int32), size)
        added = [tf.ensure_shape(one + other, one.shape) for one, other in zip(totals, addends, strict=True)]
        return (
            index + 1,
            [array.write(index, x) for array, x in zip(arrays, results, strict=True)],
            added,
        )

    if isinstance(steps, int) and steps == 1:
        once(0, size)
    else:
        turns = tf.cast(steps, tf.int32)
        arrays = [tf.TensorArray(dtype, size=turns) for dtype in dtypes]
        _, arrays, sums = tf.while_loop(
            lambda index, *_: index < turns,
            again,
            (tf.constant(0), arrays, sums),
            # Blocks that run beside one another also lie in memory beside one another.
            parallel_iterations=1,
            # XLA needs it to differentiate the loop, which only a third derivative does.
            maximum_iterations=steps if isinstance(steps, int) else None,
        )
        parts.append([_joined(array.stack(), axis) for array in arrays])
    if not isinstance(rest, int) or rest > 0:
        once(total - rest, rest)
    return [
        tf.concat(pieces, axis) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)
    ], sums


def _joined(stacked: tf.Tensor, axis: int) -> tf.Tensor:
    """(steps, …, count, …) -> (…, steps·count, …), the steps moved in front of `axis`."""
    order = [*range(1, axis + 1), 0, *range(axis + 1, stacked.shape.rank)]
    turned = tf.transpose(stacked, order)
    sizes = _sizes(turned)
    return tf.reshape(turned, _shape([*sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2 :]]))


def _part(tensor: tf.Tensor, axis: int, start: _Size, count: _Size) -> tf.Tensor:
    sizes = _sizes(tensor)
    if isinstance(count, int) and count == sizes[axis]:
        return tensor
    begin: list[_Size] = [0] * len(sizes)
    begin[axis], sizes[axis] = start, count
    # The converter to LiteRT narrows a constant size to 32 bits and leaves the loop's begin at 64; its runtime then reads
    # either the one as the other, or refuses the file.
    return tf.slice(tensor, _shape(begin, tf.int32), _shape(sizes, tf.int32))


def _rowsum(scores: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(scores, axis=-1, keepdims=True)


def _turned(matrix: tf.Tensor) -> tf.Tensor:
    return tf.linalg.matrix_transpose(matrix)
