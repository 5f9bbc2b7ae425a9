"""Attention that computes the whole map at once, in standard operators, differentiable any number of times."""

from collections.abc import Callable
from typing import Any

import torch

from selfattn_ops.torch.peaked import raised
from selfattn_ops.torch.products import arithmetic_of

__all__ = [
    "dense_attention",
    "dense_output",
    "dense_second",
    "dense_tangent",
    "dense_transposed",
    "is_autocast",
    "is_forward_mode",
    "pushed",
]

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the map."""
    if is_autocast(query):
        with torch.autocast(query.device.type, enabled=False):
            return dense_attention(query, key, value)
    multiply = _product(query)
    attention = _softmax(_scores(multiply, query, key.transpose(-2, -1)), value.dtype)
    return multiply(attention, value), attention


def dense_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output for a small map, in eager mode and without autocast. Scores that cannot count are raised."""
    multiply = _product(query)
    attention = _softmax(raised(_scores(multiply, query, key.transpose(-2, -1))), value.dtype, owned=True)
    return multiply(attention, value)


def dense_transposed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`dense_output` (B, Dv, N) for query (B, Dk, N), key (B, Dk, M) and value (B, Dv, M)."""
    attention = _softmax(raised(_scores(torch.bmm, query.transpose(1, 2), key)), value.dtype, owned=True)
    if attention.requires_grad:
        # The derivative of the other product is a transposed dA, for which torch's softmax takes twice the time.
        return torch.bmm(attention, value.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(value, attention.transpose(1, 2))


def _scores(multiply: Product, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The scores for query (…, N, Dk) and key (…, Dk, M)."""
    arithmetic = arithmetic_of(query)
    if arithmetic == query.dtype:
        # Even a cast that does nothing would be a node of an exported graph.
        return multiply(query, key)
    return multiply(query.to(arithmetic), key.to(arithmetic))


def _softmax(scores: torch.Tensor, dtype: torch.dtype, *, owned: bool = False) -> torch.Tensor:
    """The map. If nobody else has the scores, and nothing is differentiated, it takes their memory."""
    if owned and not (scores.requires_grad or is_forward_mode()):
        attention = torch.softmax(scores, -1, out=scores)
    else:
        attention = torch.softmax(scores, -1)
    return attention if attention.dtype == dtype else attention.to(dtype)


def _product(operand: torch.Tensor) -> Product:
    return torch.bmm if operand.dim() == 3 else torch.matmul


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    if tensor.is_cpu:
        return torch.is_autocast_enabled("cpu")
    # torch cannot answer this for the meta device.
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def is_forward_mode() -> bool:
    """Whether forward mode is on, so that tensors may have tangents."""
    return torch.autograd.forward_ad._current_level >= 0  # noqa: SLF001


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
