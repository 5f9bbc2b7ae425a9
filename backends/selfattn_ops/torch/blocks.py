"""The loop over blocks of query rows, and the products that write into its buffers.

Every product and every elementwise step writes into a buffer allocated before the loop. Temporaries of changing sizes
would fragment the allocator until it holds many times the memory in use. The buffers also keep autocast out, because
autocast ignores in-place calls and calls with `out=`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Self

import torch

from selfattn_ops.blocks import block_rows, score_budget
from selfattn_ops.torch.peaked import raise_scores

__all__ = [
    "Block",
    "Sum",
    "as_factor",
    "blocks",
    "empty_gradient",
    "factors",
    "multiply",
    "narrow_softmax_scores",
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


class Sum(NamedTuple):
    """An array that products are added to. If their factors have a smaller dtype, `part` takes each product first."""

    total: torch.Tensor
    part: torch.Tensor | None

    @classmethod
    def of(cls, total: torch.Tensor, factor: torch.dtype) -> Self:
        """A sum of products whose factors are in the dtype `factor`."""
        return cls(total, None if factor == total.dtype else empty_gradient(total, factor))

    def of_keys(self, block: Block) -> Self:
        """A block's part of a sum by key."""
        return type(self)(block.keys_of(self.total), None if self.part is None else block.keys_of(self.part))

    def of_rows(self, block: Block) -> Self:
        """A block's part of a sum by query row."""
        return type(self)(block.rows_of(self.total), None if self.part is None else block.rows_of(self.part))

    def add(self, left: torch.Tensor, right: torch.Tensor, *, afresh: bool = False) -> None:
        """Add a product to the content, or replace the content with `afresh`."""
        if self.part is not None:
            multiply(left, right, out=self.part)
            if afresh:
                self.total.copy_(self.part)
            else:
                self.total.add_(self.part)
        # With beta=0 the content is not read, not even NaN.
        elif left.dim() == 2:
            self.total.addmm_(left, right, beta=0 if afresh else 1)
        else:
            self.total.baddbmm_(left, right, beta=0 if afresh else 1)


def as_factor(scores: torch.Tensor, narrow: torch.Tensor | None = None) -> torch.Tensor:
    """The scores as the factor of a product: in the buffer `narrow`, if there is one."""
    return scores if narrow is None else narrow.copy_(scores)


def softmax_scores(query: torch.Tensor, key: torch.Tensor, *, out: torch.Tensor, reach: float | None) -> None:
    """Write softmax(q kᵀ). With `reach`, lower scores are raised first; see `peaked`."""
    multiply(query, key.mT, out=out)
    if reach is not None:
        raise_scores(out, reach)
    torch.softmax(out, dim=-1, out=out)


def narrow_softmax_scores(
    query: torch.Tensor, key: torch.Tensor, *, out: torch.Tensor, reach: float | None, spare: torch.Tensor
) -> None:
    """Write softmax(q kᵀ) in a smaller dtype than it is computed in, part by part, with `spare`'s memory for the parts."""
    count = max(1, len(out) // 2)
    size = count * out[0].numel()
    if len(out) > 1:
        room = spare.flatten()[: spare.numel() // 2 * 2].view(query.dtype)
    else:
        room = query.new_empty(size)
    for start in range(0, len(out), count):
        part = out[start : start + count]
        scores = room[: part.numel()].view(part.shape)
        own = slice(start, start + count)
        softmax_scores(query[own], key if key.dim() == 2 else key[own], out=scores, reach=reach)
        part.copy_(scores)


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
    # On the CPU, a narrow array is up to three times as fast transposed. A wide one is a sixth faster by row. In 16 bits, a
    # batch of transposed products takes a thousand times longer.
    if operand.shape[-1] < 32 and dtype.itemsize > 2:
        return operand.new_empty(*operand.shape[:-2], *operand.shape[:-3:-1], dtype=dtype).mT
    return operand.new_empty(operand.shape, dtype=dtype)
