"""The loop over blocks of query rows, and the products that write into its buffers.

Every product and every elementwise step writes into a buffer allocated before the loop. Temporaries of changing sizes
would fragment the allocator until it holds many times the memory in use. The buffers also keep autocast out, because
autocast ignores in-place calls and calls with `out=`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from selfattn_ops.blocks import block_rows, score_budget

__all__ = [
    "Block",
    "accumulate",
    "blocks",
    "empty_gradient",
    "factors",
    "multiply",
    "ready",
    "softmax_backward",
    "softmax_scores",
]


class Block(NamedTuple):
    """Query rows of one or several batch elements, and the buffers for their scores."""

    at: int | slice
    rows: slice
    first: bool
    buffers: tuple[torch.Tensor, ...]

    def keys_of(self, operand: torch.Tensor) -> torch.Tensor:
        """This block's part of an operand by key, (…, M, D)."""
        return operand[self.at]

    def rows_of(self, operand: torch.Tensor) -> torch.Tensor:
        """This block's part of an operand by query row, (…, n, D)."""
        return operand[self.at][..., self.rows, :]


def blocks(
    query: torch.Tensor, key: torch.Tensor, block_size: int | None, *dtypes: torch.dtype
) -> Iterator[Block]:
    """Loop over the batch and the query rows, with one buffer of scores for each of `dtypes`."""
    batch, positions, keys = query.shape[0], query.shape[1], key.shape[1]
    # Whole elements are preferred to parts of them, because a product with more rows is faster.
    least = positions if block_size is None else min(block_size, positions)
    dtype = "float64" if query.dtype == torch.float64 else "float32"
    budget = score_budget(query.device.type, batch, positions, keys, dtype)
    together = max(1, min(batch, budget // max(1, 4 * least * keys)))
    step = block_rows(block_size, together, positions, keys, budget)
    whole = [query.new_empty(together * step * keys, dtype=dtype) for dtype in dtypes]
    for start in range(0, batch, together):
        count = min(together, batch - start)
        for row in range(0, positions, step):
            rows = slice(row, min(row + step, positions))
            shape = (count, rows.stop - row, keys)
            buffers = tuple(buffer[: math.prod(shape)].view(shape) for buffer in whole)
            if together > 1:
                yield Block(slice(start, start + count), rows, row == 0, buffers)
            else:
                # A product of matrices is faster than a batch of one such product.
                yield Block(start, rows, row == 0, tuple(buffer[0] for buffer in buffers))


def multiply(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    """Write a product of matrices, or of a batch of them."""
    if left.dim() == 2:
        torch.mm(left, right, out=out)
    else:
        torch.bmm(left, right, out=out)


def accumulate(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, afresh: bool = False) -> None:
    """Add a product to the content of `into`, or replace the content with `afresh`."""
    # With beta=0 the content of `into` is not read, not even NaN.
    if left.dim() == 2:
        into.addmm_(left, right, beta=0 if afresh else 1)
    else:
        into.baddbmm_(left, right, beta=0 if afresh else 1)


def softmax_scores(query: torch.Tensor, key: torch.Tensor, *, out: torch.Tensor) -> None:
    """Write softmax(q kᵀ)."""
    multiply(query, key.mT, out=out)
    torch.softmax(out, dim=-1, out=out)


def softmax_backward(grad: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Replace dA by A∘(dA − rowsum(A∘dA))."""
    if grad.device.type == "cpu":
        # Row by row in cache, this takes less than half the time of three passes over the scores.
        torch.ops.aten._softmax_backward_data.out(grad, attention, -1, grad.dtype, grad_input=grad)  # noqa: SLF001
        return grad
    grad.mul_(attention)
    return grad.addcmul_(attention, grad.sum(-1, keepdim=True), value=-1)


def ready(operand: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The operand in `dtype`, with strides that a product accepts without a copy: by row, or transposed."""
    across, along = operand.stride()[-2:]
    rows, width = operand.shape[-2:]
    # The gradient of a sum is an expanded tensor, which the product of every block would copy again.
    if not ((along == 1 and across >= width) or (across == 1 and along >= rows)):
        operand = operand.contiguous()
    return operand.to(dtype)


def factors(dtype: torch.dtype, *parts: torch.Tensor) -> torch.Tensor:
    """The parts side by side, so that one product is the sum of theirs. Columns of zeros are added if that is faster."""
    width = sum(part.shape[-1] for part in parts)
    # On the CPU, a product narrower than 16 takes half as long again as one of width 16.
    padded = max(16, width) if parts[0].device.type == "cpu" else width
    if padded == width and len(parts) == 1:
        return ready(parts[0], dtype)
    together = parts[0].new_zeros(parts[0].shape[0], padded, parts[0].shape[1], dtype=dtype).mT
    start = 0
    for part in parts:
        together[..., start : start + part.shape[-1]] = part
        start += part.shape[-1]
    return together


def empty_gradient(operand: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An array for the sum of products with a transposed block of scores."""
    # On the CPU, a narrow array is up to three times as fast transposed. A wide one is a sixth faster by row.
    if operand.shape[-1] < 32:
        return operand.new_empty(*operand.shape[:-2], *operand.shape[:-3:-1], dtype=dtype).mT
    return operand.new_empty(operand.shape, dtype=dtype)
