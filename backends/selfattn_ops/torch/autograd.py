"""The function and its derivatives as `torch.autograd.Function`s, for eager mode, `torch.func` and forward mode."""

from typing import Any

import torch

from selfattn_ops.torch.dense import dense_second, dense_tangent, pushed
from selfattn_ops.torch.derivatives import backward, forward, second, tangent

__all__ = ["attend_backward", "attend_in_blocks", "is_batched"]


def attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int | None
) -> torch.Tensor:
    """(B, N, Dk), (B, M, Dk), (B, M, Dv) to (B, N, Dv)."""
    return _Attend.apply(query, key, value, block_size)


def attend_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor, block_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients dq, dk and dv for the gradient of the output, with derivatives of their own."""
    return _applied(_AttendBackward, query, key, value, grad, block_size)


def is_batched() -> bool:
    """Whether a derivative is one of a batch, by `torch.func` or by `torch.autograd.grad(is_grads_batched=True)`."""
    return torch._C._are_functorch_transforms_active() or _batch_level() > 0  # noqa: SLF001


class _InBlocks(torch.autograd.Function):
    """A function of flat operands and the block size. It keeps its inputs for derivatives. vmap is a larger batch."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG004
        *tensors, ctx.block_size = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        *tensors, block_size = inputs
        folded = [
            tensor
            if tensor is None
            else (tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)).flatten(
                0, 1
            )
            for tensor, axis in zip(tensors, in_dims, strict=False)
        ]
        outputs = cls.apply(*folded, block_size)
        if isinstance(outputs, tuple):
            return tuple(output.unflatten(0, (size, -1)) for output in outputs), (0,) * len(outputs)
        return outputs.unflatten(0, (size, -1)), 0


class _Attend(_InBlocks):
    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int | None
    ) -> torch.Tensor:
        return forward(query, key, value, block_size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        return *attend_backward(query, key, value, grad, ctx.block_size), None

    @staticmethod
    def jvp(ctx: Any, *dots: torch.Tensor) -> torch.Tensor:
        return _AttendTangent.apply(*ctx.saved_tensors, *dots[:3], ctx.block_size)


class _AttendBackward(_InBlocks):
    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grad: torch.Tensor,
        block_size: int | None,
    ) -> tuple[torch.Tensor, ...]:
        return backward(query, key, value, grad, block_size)

    @staticmethod
    def backward(ctx: Any, *dots: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_applied(_AttendSecond, *ctx.saved_tensors, *dots, None, ctx.block_size), None

    @staticmethod
    def jvp(ctx: Any, *dots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _AttendSecond.apply(*ctx.saved_tensors, *dots[:4], ctx.block_size)[:3]


class _AttendTangent(_InBlocks):
    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_dot: torch.Tensor,
        key_dot: torch.Tensor,
        value_dot: torch.Tensor,
        block_size: int | None,
    ) -> torch.Tensor:
        return tangent(query, key, value, query_dot, key_dot, value_dot, block_size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *dots = ctx.saved_tensors
        to_operands = _applied(_AttendSecond, q, k, v, grad, *dots, None, ctx.block_size)[:3]
        return *to_operands, *attend_backward(q, k, v, grad, ctx.block_size), None

    @staticmethod
    def jvp(ctx: Any, *dots: torch.Tensor) -> torch.Tensor:
        return pushed(dense_tangent, ctx.saved_tensors, dots[:6])


class _AttendSecond(_InBlocks):
    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grad: torch.Tensor,
        query_dot: torch.Tensor,
        key_dot: torch.Tensor,
        value_dot: torch.Tensor,
        grad_dot: torch.Tensor | None,
        block_size: int | None,
    ) -> tuple[torch.Tensor, ...]:
        return second(query, key, value, grad, query_dot, key_dot, value_dot, grad_dot, block_size)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *operands, grad_dot = ctx.saved_tensors
        given = operands if grad_dot is None else [*operands, grad_dot]
        _, pull = torch.func.vjp(dense_second, *given)
        gradients = pull(cotangents)
        return *gradients, *(None,) * (9 - len(gradients))

    @staticmethod
    def jvp(ctx: Any, *dots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = 7 if ctx.saved_tensors[-1] is None else 8
        return pushed(dense_second, ctx.saved_tensors[:count], dots[:count])


def _applied(function: Any, *inputs: Any) -> Any:
    """`function.apply` inside a derivative, which may be one of a batch.

    `torch.autograd.grad(is_grads_batched=True)` batches gradients in a way that is older than `torch.func`. `apply` does
    not support it, so this function removes the batch and adds it again.
    """
    level = _batch_level()
    if level == 0:
        return function.apply(*inputs)
    *tensors, block_size = inputs
    bare = [
        # A tensor without the batch gets a batch of size 1, which is expanded to the others' size below.
        None if tensor is None else torch._remove_batch_dim(tensor, level, 1, 0)  # noqa: SLF001
        for tensor in tensors
    ]
    size = max(tensor.shape[0] for tensor in bare if tensor is not None)
    folded = [
        tensor if tensor is None else tensor.expand(size, *tensor.shape[1:]).flatten(0, 1) for tensor in bare
    ]
    return tuple(
        torch._add_batch_dim(output.unflatten(0, (size, -1)), 0, level)  # noqa: SLF001
        for output in function.apply(*folded, block_size)
    )


def _batch_level() -> int:
    level = torch._C._vmapmode_increment_nesting() - 1  # noqa: SLF001
    torch._C._vmapmode_decrement_nesting()  # noqa: SLF001
    return level
