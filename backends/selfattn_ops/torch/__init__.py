"""Attention without a scale, for PyTorch: softmax(q kᵀ) v in memory linear in N, through second derivatives.

The computation takes one block of query rows at a time, against all keys, so every softmax row is exact. Derivatives
compute the scores again, so only q, k and v are kept.
"""

import math

from selfattn_core.installed import require

require("selfattn_ops.torch", ["torch"], "torch")

import torch  # noqa: E402 - the message above must come first

from selfattn_ops.blocks import SCORE_BUDGET, check_block_size, check_operands  # noqa: E402
from selfattn_ops.torch.autograd import attend_in_blocks  # noqa: E402
from selfattn_ops.torch.compiled import attend_op  # noqa: E402
from selfattn_ops.torch.dense import (  # noqa: E402
    dense_attention,
    dense_output,
    dense_transposed,
    is_autocast,
    is_forward_mode,
)
from selfattn_ops.torch.kept import attend_kept, is_kept  # noqa: E402

__all__ = ["attend", "attend_transposed", "attend_with_map"]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_size: int | None = None
) -> torch.Tensor:
    """Softmax over keys of q kᵀ, times v; no 1/sqrt(d).

    Memory is linear in N in the forward pass and in first and second derivatives. Third derivatives are exact and take
    (…, N, M) numbers. Forward mode, `torch.func`, `vmap` and batched gradients work. For 16-bit operands, logits, softmax
    and sums are computed in float32. On a processor with tiles (AMX), the derivatives of bfloat16 operands multiply in
    bfloat16. Autocast changes nothing, because the dtype of the operands decides.

    On a CPU, weights below any rounding are raised, because subnormal numbers are slow: see `selfattn_ops.torch.peaked`.

    `torch.compile` sees two opaque operators whatever the number of blocks. In three cases the computation consists of
    standard operators in one block, which take (…, N, M) numbers: in `torch.export`, in a `torch.func` transform inside a
    compiled region, and for a DTensor (call `attend` on its local shards instead).

    A compiled region cannot be differentiated twice from outside: torch raises RuntimeError. For a gradient penalty, set
    `torch._dynamo.config.trace_autograd_ops = True` and take the inner gradient inside the region with
    `torch.autograd.grad(..., create_graph=True)`, or leave that step uncompiled.

    Args:
        query: (…, N, Dk).
        key: (…, M, Dk).
        value: (…, M, Dv).
        block_size: query rows at a time. None chooses by size.

    Returns:
        (…, N, Dv), in the dtype of the operands.

    Raises:
        ValueError: if the operands do not belong together, or `block_size` is not a positive integer.

    Example:
        >>> attend(torch.zeros(1, 6, 2), torch.zeros(1, 4, 2), torch.ones(1, 4, 3)).shape
        torch.Size([1, 6, 3])
    """
    block_size = _check(query, key, value, block_size)
    compiling = torch.compiler.is_compiling()
    if _must_be_plain(query, compiling=compiling):
        return dense_attention(query, key, value)[0]
    if not compiling:
        rows, keys = query.shape[-2], key.shape[-2]
        if query.numel() * keys == 0:
            return dense_attention(query, key, value)[0]
        batch = math.prod(query.shape[:-2])
        if _is_in_one_block(batch, rows, keys, block_size):
            if is_kept(query, batch * rows * keys):
                return _shaped(attend_kept(*map(_flat, (query, key, value))), query)
            # Under autocast, torch's own backward would run in the dtype of autocast.
            if not is_autocast(query):
                return dense_output(query, key, value)
    operands = _flat(query), _flat(key), _flat(value)
    out = attend_op(*operands, block_size) if compiling else attend_in_blocks(*operands, block_size)
    return _shaped(out, query)


def attend_transposed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_size: int | None = None
) -> torch.Tensor:
    """`attend` for operands and output with positions last, as the feature maps of a layer are when they are flattened.

    A small map is computed without a transposition. Its operands are not checked.

    Args:
        query: (B, Dk, N).
        key: (B, Dk, M).
        value: (B, Dv, M).
        block_size: as in `attend`.

    Returns:
        (B, Dv, N), in the dtype of the operands.

    Raises:
        ValueError: as `attend`, if the map is not small.

    Example:
        >>> attend_transposed(torch.zeros(1, 2, 6), torch.zeros(1, 2, 4), torch.ones(1, 3, 4)).shape
        torch.Size([1, 3, 6])
    """
    batch, _, rows = query.shape
    keys = key.shape[2]
    if (
        not (torch.compiler.is_compiling() or _must_be_plain(query, compiling=False))
        and _is_in_one_block(batch, rows, keys, block_size)
        and not (is_autocast(query) or is_kept(query, batch * rows * keys))
    ):
        return dense_transposed(query, key, value)
    operands = (operand.transpose(-2, -1) for operand in (query, key, value))
    return attend(*operands, block_size=block_size).transpose(-2, -1)


def attend_with_map(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of `attend` and the map (…, N, M). Each row of the map belongs to an output position and sums to 1.

    The map takes N·M numbers of memory for each sample. Both outputs can be differentiated any number of times.
    `block_size` is checked but has no effect.

    Example:
        >>> attend_with_map(torch.zeros(1, 6, 2), torch.zeros(1, 4, 2), torch.ones(1, 4, 3))[1].sum(-1)
        tensor([[1., 1., 1., 1., 1., 1.]])
    """
    _check(query, key, value, block_size)
    return dense_attention(query, key, value)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int | None) -> int | None:
    # The shared check begins with its message. Under torch.compile that would fix every dynamic size.
    agree = (
        query.dim() == key.dim() == value.dim() >= 2
        and query.shape[-1] == key.shape[-1]
        and key.shape[:-1] == value.shape[:-1]
        and query.shape[:-2] == key.shape[:-2]
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
    )
    if not agree:
        operands = (query, key, value)
        check_operands(
            *(tuple(operand.shape) for operand in operands),
            dtypes=[operand.dtype for operand in operands],
            devices=[operand.device for operand in operands],
        )
    return None if block_size is None else check_block_size(block_size)


def _must_be_plain(query: torch.Tensor, *, compiling: bool) -> bool:
    """Whether standard operators are required: in an exported graph, in a compiled transform, for a DTensor."""
    if not compiling:
        # A DTensor has no rule for writing into a buffer, and taking a block of rows would gather its shards.
        return torch.jit.is_tracing() or hasattr(type(query), "__tensor_flatten__")
    # For the operators made for torch.compile, forward mode would silently use a tangent of zero.
    return (
        torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001
        or is_forward_mode()
    )


def _is_in_one_block(batch: int, rows: int, keys: int, block_size: int | None) -> bool:
    return (
        4 * batch * rows * keys <= SCORE_BUDGET
        and (block_size is None or block_size >= rows)
        # Under vmap there are more scores than the shapes show.
        and not torch._C._are_functorch_transforms_active()  # noqa: SLF001
    )


def _shaped(out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return out if query.dim() == 3 else out.reshape(*query.shape[:-1], out.shape[-1])


def _flat(operand: torch.Tensor) -> torch.Tensor:
    if operand.dim() == 3:
        return operand
    return operand.flatten(0, -3) if operand.dim() > 3 else operand.unsqueeze(0)
