"""The function and its derivatives as custom operators, because `torch.compile` would unroll the loop over blocks."""

from typing import Any

import torch

from selfattn_ops.torch.blocks import empty_gradient
from selfattn_ops.torch.derivatives import backward, forward, second
from selfattn_ops.torch.products import arithmetic_of, factor_of

__all__ = ["attend_backward_op", "attend_op", "attend_second_op"]


@torch.library.custom_op("selfattn::attend", mutates_args=())
def attend_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int | None
) -> torch.Tensor:
    """The output."""
    return forward(query, key, value, block_size)


@torch.library.custom_op("selfattn::attend_backward", mutates_args=())
def attend_backward_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor, block_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the output."""
    return backward(query, key, value, grad, block_size)


@torch.library.custom_op("selfattn::attend_second", mutates_args=())
def attend_second_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    query_dot: torch.Tensor,
    key_dot: torch.Tensor,
    value_dot: torch.Tensor,
    block_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the gradients."""
    return second(query, key, value, grad, query_dot, key_dot, value_dot, None, block_size)


@attend_op.register_fake
def _(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return value.new_empty(*query.shape[:2], value.shape[2])


@attend_backward_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return _empty(query, factor_of(query)), _empty(key), _empty(value)


@attend_second_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return *map(_empty, (query, key, value)), value.new_empty(*query.shape[:2], value.shape[2])


def _empty(operand: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A gradient with the strides of the one that is computed in `dtype`, by default that of sums."""
    return empty_gradient(operand, dtype or arithmetic_of(operand)).to(operand.dtype)


def _keep_for_op(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG001
    *tensors, ctx.block_size = inputs
    ctx.save_for_backward(*tensors)


def _attend_op_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *attend_backward_op(*ctx.saved_tensors, grad, ctx.block_size), None


def _attend_backward_op_backward(ctx: Any, *dots: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *attend_second_op(*ctx.saved_tensors, *dots, ctx.block_size), None


attend_op.register_autograd(_attend_op_backward, setup_context=_keep_for_op)
attend_backward_op.register_autograd(_attend_backward_op_backward, setup_context=_keep_for_op)
