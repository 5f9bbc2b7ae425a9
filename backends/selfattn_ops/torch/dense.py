"""Attention that computes the whole map at once, in standard operators, differentiable any number of times."""

from collections.abc import Callable
from typing import Any

import torch

from selfattn_ops.torch.products import arithmetic_of

__all__ = ["dense_attention", "dense_second", "dense_tangent", "dense_transposed", "is_autocast", "pushed"]


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the map."""
    if is_autocast(query):
        with torch.autocast(query.device.type, enabled=False):
            return dense_attention(query, key, value)
    multiply = torch.bmm if query.dim() == 3 else torch.matmul
    attention = _map(multiply, query, key.transpose(-2, -1), value)
    return multiply(attention, value), attention


def dense_transposed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output (B, Dv, N) for query (B, Dk, N), key (B, Dk, M) and value (B, Dv, M), without autocast."""
    attention = _map(torch.bmm, query.transpose(1, 2), key, value)
    if attention.requires_grad:
        # The derivative of the other product is a transposed dA, for which torch's softmax takes twice the time.
        return torch.bmm(attention, value.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(value, attention.transpose(1, 2))


def _map(
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """The map for query (…, N, Dk) and key (…, Dk, M), in the dtype of the value."""
    arithmetic = arithmetic_of(query)
    if arithmetic == query.dtype:
        # Even a cast that does nothing would be a node of an exported graph.
        return torch.softmax(multiply(query, key), -1)
    return torch.softmax(multiply(query.to(arithmetic), key.to(arithmetic)), -1).to(value.dtype)


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    if tensor.is_cpu:
        return torch.is_autocast_enabled("cpu")
    # torch cannot answer this for the meta device.
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def dense_tangent(*operands: torch.Tensor) -> torch.Tensor:
    """The result of `derivatives.tangent` in standard operators, for third derivatives."""
    return pushed(lambda *qkv: dense_attention(*qkv)[0], operands[:3], operands[3:])


def dense_second(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The result of `derivatives.second` in standard operators, for third derivatives."""

    def first(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor) -> Any:
        out, pull = torch.func.vjp(lambda *qkv: dense_attention(*qkv)[0], query, key, value)
        return *pull(grad), out

    *dots, last = operands[4:] if len(operands) == 8 else (*operands[4:], torch.zeros_like(operands[3]))
    return pushed(first, operands[:4], (*dots, last))


def pushed(function: Any, operands: tuple[torch.Tensor, ...], dots: tuple[torch.Tensor, ...]) -> Any:
    """The tangent of a function's results."""
    # An expanded operand, as under vmap, cannot have a tangent.
    own = tuple(operand.clone(memory_format=torch.contiguous_format) for operand in operands)
    return torch.func.jvp(function, own, dots)[1]
