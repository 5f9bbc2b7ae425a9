"""Attention without a scale, for PyTorch: softmax(q kᵀ) v with logits and softmax in at least float32."""

import torch

from selfattn_ops.blocks import block_rows, check_operands

__all__ = ["attend", "attend_with_map"]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_size: int | None = None
) -> torch.Tensor:
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
        >>> attend(torch.zeros(1, 6, 2), torch.zeros(1, 4, 2), torch.ones(1, 4, 3)).shape
        torch.Size([1, 6, 3])
    """
    return attend_with_map(query, key, value, block_size=block_size)[0]


def attend_with_map(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, and the map (…, N, M), whose rows are output positions and sum to 1.

    Example:
        >>> attend_with_map(torch.zeros(1, 6, 2), torch.zeros(1, 4, 2), torch.ones(1, 4, 3))[1].sum(-1)
        tensor([[1., 1., 1., 1., 1., 1.]])
    """
    operands = (query, key, value)
    check_operands(
        *(operand.shape for operand in operands),
        dtypes=[operand.dtype for operand in operands],
        devices=[operand.device for operand in operands],
    )
    block_rows(block_size, 1, query.shape[-2], key.shape[-2])
    arithmetic = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(arithmetic) @ key.to(arithmetic).mT
        attention = torch.softmax(scores, dim=-1).to(value.dtype)
        return attention @ value, attention
