"""Attention that computes the whole map at once and keeps it for the backward pass, in the dtype of its factors there.

It takes the place of standard operators on small maps where their derivatives would not be what they should: under autocast
they would be in its dtype, and for bfloat16, where the processor multiplies it fast, in float32. The map has at most as many
numbers as a block of scores.
"""

from typing import Any

import torch

from selfattn_ops.torch.autograd import attend_backward, is_batched
from selfattn_ops.torch.blocks import softmax_backward
from selfattn_ops.torch.dense import is_autocast, is_forward_mode
from selfattn_ops.torch.peaked import raised
from selfattn_ops.torch.products import arithmetic_of, factor_of

__all__ = ["attend_kept", "is_kept"]

_FEW = 2**16
"""Scores up to which a function of our own takes longer than the faster products save."""


def is_kept(query: torch.Tensor, scores: int) -> bool:
    """Whether `attend_kept` takes the place of standard operators.

    Args:
        query: the query.
        scores: the numbers of all maps.
    """
    # A tangent would need a rule of its own.
    if is_forward_mode():
        return False
    if is_autocast(query):
        return True
    return (
        scores > _FEW
        and query.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and factor_of(query) != arithmetic_of(query)
    )


def attend_kept(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, N, Dk), (B, M, Dk), (B, M, Dv) to (B, N, Dv). Autocast changes nothing."""
    return _AttendKept.apply(query, key, value)


class _AttendKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        arithmetic = arithmetic_of(query)
        scores = _product(query.to(arithmetic), key.to(arithmetic).mT)
        attention = torch.softmax(raised(scores), -1, out=scores)
        ctx.save_for_backward(query, key, value, attention.to(factor_of(query)))
        return _product(attention.to(value.dtype), value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, attention = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched():
            # The map is kept without its own derivatives.
            return attend_backward(query, key, value, grad, None)
        q, k, v, g = (operand.to(attention.dtype) for operand in (query, key, value, grad))
        ds = softmax_backward(_product(g, v.mT), attention)
        gradients = _product(ds, k), _product(ds.mT, q), _product(attention.mT, g)
        return tuple(gradient.to(query.dtype) for gradient in gradients)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # Autocast ignores calls with `out=`.
    return torch.bmm(left, right, out=left.new_empty(*left.shape[:2], right.shape[2]))
