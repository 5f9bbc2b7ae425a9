"""The walk over blocks of query rows, and products into its buffers.

Every product and every elementwise step writes into a buffer allocated before the loop: blocks of changing temporaries
fragment the allocator until it holds many times what is alive. It also keeps autocast out, which leaves calls with `out=`
and in-place calls alone.
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
    """Query rows of one or several batch elements, and where their scores go."""

    at: int | slice
    rows: slice
    first: bool
    buffers: tuple[torch.Tensor, ...]

    def keys_of(self, operand: torch.Tensor) -> torch.Tensor:
        """The part of an operand by key, (…, M, D)."""
        return operand[self.at]

    def rows_of(self, operand: torch.Tensor) -> torch.Tensor:
        """The part of an operand by query row, (…, n, D)."""
        return operand[self.at][..., self.rows, :]


def blocks(
    query: torch.Tensor, key: torch.Tensor, block_size: int | None, *dtypes: torch.dtype
) -> Iterator[Block]:
    """Walk the batch and the query rows, with one buffer of scores for each of `dtypes`."""
    batch, positions, keys = query.shape[0], query.shape[1], key.shape[1]
    # Whole elements before parts of them: a product with more rows is a faster one.
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
                # A product of matrices is a faster call than a batch of one of them.
                yield Block(start, rows, row == 0, tuple(buffer[0] for buffer in buffers))


def multiply(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    """Write a product of matrices, or of a batch of them."""
    if left.dim() == 2:
        torch.mm(left, right, out=out)
    else:
        torch.bmm(left, right, out=out)


def accumulate(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, afresh: bool = False) -> None:
    """Add a product to what is there, or write it afresh."""
    # With beta=0 what is in `into`, NaN included, is not read.
    if left.dim() == 2:
        into.addmm_(left, right, beta=0 if afresh else 1)
    else:
        into.baddbmm_(left, right, beta=0 if afresh else 1)


def softmax_scores(query: torch.Tensor, key: torch.Tensor, *, out: torch.Tensor) -> None:
    """Write softmax(q kᵀ)."""
    multiply(query, key.mT, out=out)
    torch.softmax(out, dim=-1, out=out)


def softmax_backward(grad: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """A∘(dA − rowsum(A∘dA)), in place of dA."""
    if grad.device.type == "cpu":
        # Row by row in cache: less than half the time of three passes over the scores.
        torch.ops.aten._softmax_backward_data.out(grad, attention, -1, grad.dtype, grad_input=grad)  # noqa: SLF001
        return grad
    grad.mul_(attention)
    return grad.addcmul_(attention, grad.sum(-1, keepdim=True), value=-1)


def ready(operand: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The operand in `dtype`, and in a layout that a product takes as it is, row by row or transposed."""
    across, along = operand.stride()[-2:]
    rows, width = operand.shape[-2:]
    # The gradient of a sum is expanded, and every block's product would copy it anew.
    if not ((along == 1 and across >= width) or (across == 1 and along >= rows)):
        operand = operand.contiguous()
    return operand.to(dtype)


def factors(dtype: torch.dtype, *parts: torch.Tensor) -> torch.Tensor:
    """The parts side by side, so that one product sums theirs, with columns of zeros where that is faster."""
    width = sum(part.shape[-1] for part in parts)
    # Narrower than 16, a product on the CPU takes half as long again as at 16.
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
    """Where the products with a transposed block of scores are summed."""
    # On the CPU, up to three times as fast transposed where it is narrow, a sixth faster row by row where it is not.
    if operand.shape[-1] < 32:
        return operand.new_empty(*operand.shape[:-2], *operand.shape[:-3:-1], dtype=dtype).mT
    return operand.new_empty(operand.shape, dtype=dtype)
