"""Attention that computes the whole map at once, in standard operators, differentiable any number of times."""

from typing import Any

import torch

__all__ = ["arithmetic_of", "dense_attention", "dense_second", "dense_tangent", "is_autocast", "pushed"]


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the map."""
    if is_autocast(query):
        with torch.autocast(query.device.type, enabled=False):
            return dense_attention(query, key, value)
    multiply = torch.bmm if query.dim() == 3 else torch.matmul
    arithmetic = arithmetic_of(query)
    if arithmetic == query.dtype:
        # Even a cast that does nothing would be a node of an exported graph.
        attention = torch.softmax(multiply(query, key.transpose(-2, -1)), dim=-1)
    else:
        scores = multiply(query.to(arithmetic), key.to(arithmetic).transpose(-2, -1))
        attention = torch.softmax(scores, dim=-1).to(value.dtype)
    return multiply(attention, value), attention


def arithmetic_of(operand: torch.Tensor) -> torch.dtype:
    """The dtype of the computation, which is at least float32."""
    # `promote_types` would become part of the graph of torch.export.
    return torch.float32 if operand.dtype.itemsize < 4 else operand.dtype


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
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
