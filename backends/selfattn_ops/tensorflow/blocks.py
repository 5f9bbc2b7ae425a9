"""The size of blocks of batch elements and query rows, and the loop over them."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from selfattn_ops.blocks import MINIMUM_ROWS, SCORE_BUDGET, block_rows, check_block_size, score_budget
from selfattn_ops.tensorflow.sizes import Size, largest, shape_of, sizes_of, smallest

__all__ = ["Block", "Parts", "device_kind", "in_blocks", "is_single", "plan", "rows_of_block"]

# A block returns results by row, and addends of the sums.
Parts = tuple[list[Any], list[Any]]
Block = Callable[[Sequence[Any], Sequence[Any]], Parts]


def rows_of_block(
    block_size: int | None, batch: Size, rows: Size, keys: Size, budget: int | None = None
) -> Size:
    """`block_rows`, also for sizes that only the running graph knows."""
    if all(isinstance(size, int) for size in (batch, rows, keys)):
        return block_rows(block_size, batch, rows, keys, budget)
    wanted = check_block_size(block_size)
    if wanted is None:
        wanted = largest(MINIMUM_ROWS, SCORE_BUDGET // (4 * largest(batch, 1) * largest(keys, 1)))
    return largest(1, smallest(rows, wanted))


def plan(
    block_size: int | None,
    batch: Size,
    rows: Size,
    keys: Size,
    kind: str = "cpu",
    dtype: str = "float32",
) -> tuple[Size, Size]:
    """Batch elements and query rows in a block.

    One element gets as many rows as fit, because many rows of few elements read keys and values less often than few rows
    of many elements. Further elements fill the rest of the budget.
    """
    known = all(isinstance(size, int) for size in (batch, rows, keys))
    # If only the running graph knows the sizes, the budget is that of a CPU.
    budget = score_budget(kind, batch, rows, keys, dtype) if known else SCORE_BUDGET
    block = rows_of_block(block_size, 1, rows, keys, budget)
    elements = budget // (4 * block * largest(keys, 1))
    return largest(1, smallest(batch, elements)), block


def device_kind(tensor: tf.Tensor) -> str:
    """TensorFlow's word for the kind of device of a tensor. A graph does not know it: there it is a card if one exists."""
    if tensor.device:
        return tensor.device.split(":")[-2].lower()
    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"


def is_single(block_size: int | None, batch: Size, rows: Size, keys: Size) -> bool | tf.Tensor:
    """Whether one block holds everything: True, False or, for sizes that are not known yet, a tensor."""
    elements, block = plan(block_size, batch, rows, keys)
    covered = [elements >= batch, block >= rows]
    # With no elements or no rows there is no first block whose result could be joined to others.
    empty = [batch == 0, rows == 0]
    if all(one is True for one in covered) or any(one is True for one in empty):
        return True
    if any(one is False for one in covered) and all(one is False for one in empty):
        return False
    return tf.logical_or(tf.reduce_all(covered), tf.reduce_any(empty))


def in_blocks(
    block_size: int | None,
    block: Block,
    by_row: Sequence[tf.Tensor],
    by_element: Sequence[tf.Tensor],
    dtypes: Sequence[tf.DType],
    sums: Sequence[Sequence[Size]] = (),
    wide: tf.DType = tf.float32,
) -> list[tf.Tensor]:
    """Call `block` on batch elements and query rows in turn. Join its results by row and add up its addends.

    Args:
        block_size: see `attend`.
        block: maps parts of `by_row` (b, n, …) and of `by_element` (b, M, …) to parts of the results and addends.
        by_row: operands (B, N, …).
        by_element: operands (B, M, …).
        dtypes: dtypes of the results by row, (B, N, …).
        sums: shapes of the sums without their batch axis.
        wide: dtype of the sums.
    """
    batch, rows = sizes_of(by_row[0])[:2]
    keys = sizes_of(by_element[0])[1]
    elements, step = plan(block_size, batch, rows, keys, device_kind(by_row[0]), by_row[0].dtype.name)

    def chunk(start: Size, count: Size) -> Parts:
        mine = [_part(operand, 0, start, count) for operand in by_row]
        shared = [_part(operand, 0, start, count) for operand in by_element]
        zeros = [tf.zeros(shape_of([count, *shape]), wide) for shape in sums]
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

    single = is_single(block_size, batch, rows, keys)
    # The tf.cond is inside the derivatives, because TensorFlow fails on the second derivative of a tf.cond around them.
    return in_turn() if single is False else tf.cond(single, everything, in_turn)


def _sweep(
    total: Size,
    step: Size,
    axis: int,
    body: Callable[[Size, Size], Parts],
    dtypes: Sequence[tf.DType],
    sums: list[tf.Tensor],
) -> Parts:
    """Join the results of body(start, count) over [0, total) along `axis`, and add its addends to `sums`.

    XLA needs steps of equal length, so the rest comes after the loop. The loop is one operation of the graph, however many
    steps it takes. One step without a rest needs no loop.
    """
    steps, rest = total // step, total % step
    # At most `total`, because XLA also compiles a loop that takes no step.
    size = smallest(step, total)
    parts: list[list[tf.Tensor]] = []

    def once(start: Size, count: Size) -> None:
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
            # Blocks that run in parallel would be in memory at the same time.
            parallel_iterations=1,
            # XLA needs it to differentiate the loop. Only a third derivative does that.
            maximum_iterations=steps if isinstance(steps, int) else None,
        )
        parts.append([_joined(array.stack(), axis) for array in arrays])
    if not isinstance(rest, int) or rest > 0:
        once(total - rest, rest)
    return [
        tf.concat(pieces, axis) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)
    ], sums


def _joined(stacked: tf.Tensor, axis: int) -> tf.Tensor:
    """(steps, …, count, …) -> (…, steps·count, …). The steps move in front of `axis`."""
    order = [*range(1, axis + 1), 0, *range(axis + 1, stacked.shape.rank)]
    turned = tf.transpose(stacked, order)
    sizes = sizes_of(turned)
    return tf.reshape(turned, shape_of([*sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2 :]]))


def _part(tensor: tf.Tensor, axis: int, start: Size, count: Size) -> tf.Tensor:
    sizes = sizes_of(tensor)
    if isinstance(count, int) and count == sizes[axis]:
        return tensor
    begin: list[Size] = [0] * len(sizes)
    begin[axis], sizes[axis] = start, count
    # The converter to LiteRT narrows a constant size to 32 bits and leaves the loop's begin at 64. Its runtime then
    # misreads one of the two or refuses the file.
    return tf.slice(tensor, shape_of(begin, tf.int32), shape_of(sizes, tf.int32))
