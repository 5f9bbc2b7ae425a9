"""Attention without a scale, for PyTorch: softmax(q kᵀ) v in memory linear in N, through second derivatives.

A block of query rows meets all keys at a time, so every block has its exact softmax row, and only q, k, v are
kept for the derivatives, which compute the scores again. With `S = q kᵀ`, `A = softmax(S)`, G the gradient of o:

    first   dA = G vᵀ             dS = A∘(dA − D)       D = rowsum(A∘dA)
            dq = dS k             dk = dSᵀ q            dv = Aᵀ G
    second  U = q̇ kᵀ + q k̇ᵀ       Ȧ = A∘(U − u)         u = rowsum(A∘U)         R = G v̇ᵀ + Ġ vᵀ
            dṠ = A∘(X − rowsum(A∘X))                    X = (U − u)∘(dA − D) + R
            ddq = dṠ k + dS k̇     ddk = dṠᵀ q + dSᵀ q̇   ddv = Ȧᵀ G + Aᵀ Ġ       ȯ = Ȧ v + A v̇

The second order is at once the derivative of the backward pass and the tangent of forward mode.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from selfattn_core.installed import require

require("selfattn_ops.torch", ["torch"], "torch")

import torch  # noqa: E402 - the message above must come first

from selfattn_ops.blocks import (  # noqa: E402
    SCORE_BUDGET,
    block_rows,
    check_block_size,
    check_operands,
    score_budget,
)

__all__ = ["attend", "attend_with_map"]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_size: int | None = None
) -> torch.Tensor:
    """Softmax over keys of q kᵀ, times v; no 1/sqrt(d).

    Memory is linear in N in the forward pass and in first and second derivatives; third derivatives are exact
    and take (…, N, M). Forward mode, `torch.func`, `vmap` and batched gradients work. 16-bit operands have their logits, softmax and
    derivatives in float32. Autocast does not change what is computed: the operands' dtype decides.

    `torch.compile` sees two opaque operators whatever the number of blocks. Standard operators in one block, and
    so (…, N, M), are what `torch.export` sees, a `torch.func` transform inside a compiled region, and a DTensor
    (attend from its local shards instead).

    No compiled region can be differentiated twice from outside: torch raises RuntimeError. For a gradient penalty
    take the inner gradient inside the region, `torch.autograd.grad(..., create_graph=True)`, after setting
    `torch._dynamo.config.trace_autograd_ops = True` yourself, or leave that step uncompiled.

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
    block_size = _check(query, key, value, block_size)
    compiling = torch.compiler.is_compiling()
    if _must_be_plain(query, compiling=compiling) or (not compiling and _is_small(query, key, block_size)):
        return _dense(query, key, value)[0]
    operands = _flat(query), _flat(key), _flat(value)
    out = _attend_op(*operands, block_size) if compiling else _Attend.apply(*operands, block_size)
    return out if query.dim() == 3 else out.reshape(*query.shape[:-1], value.shape[-1])


def attend_with_map(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, and the map (…, N, M), whose rows are output positions and sum to 1.

    Asking for the map is asking for its memory: both outputs are differentiable, any number of times, and
    `block_size` is checked but changes nothing.

    Example:
        >>> attend_with_map(torch.zeros(1, 6, 2), torch.zeros(1, 4, 2), torch.ones(1, 4, 3))[1].sum(-1)
        tensor([[1., 1., 1., 1., 1., 1.]])
    """
    _check(query, key, value, block_size)
    return _dense(query, key, value)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int | None) -> int | None:
    # The shared check writes its message first; under torch.compile that would pin every dynamic size.
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
    """Whether only standard operators will do: in an exported graph, in a compiled transform, for a DTensor."""
    if not compiling:
        # A DTensor has no rule for writing into a buffer, and a block of rows would be gathered from its shards.
        return torch.jit.is_tracing() or hasattr(type(query), "__tensor_flatten__")
    # Of the operators for torch.compile, forward mode would take the tangent to be zero and say nothing.
    return (
        torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001
        or torch.autograd.forward_ad._current_level >= 0  # noqa: SLF001
    )


def _is_small(query: torch.Tensor, key: torch.Tensor, block_size: int | None) -> bool:
    """Whether the dense computation, in operators of torch's own, is no more than one block."""
    rows, keys = query.shape[-2], key.shape[-2]
    if query.numel() == 0 or keys == 0:
        return True
    return (
        (block_size is None or block_size >= rows)
        and 4 * (query.numel() // query.shape[-1]) * keys <= SCORE_BUDGET
        # Under autocast torch's own backward would run in the dtype of autocast, and under vmap there are
        # more scores than the shapes tell.
        and not _is_autocast(query)
        and not torch._C._are_functorch_transforms_active()  # noqa: SLF001
    )


def _is_autocast(tensor: torch.Tensor) -> bool:
    # Of a device that holds no numbers torch does not know it.
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_autocast(query):
        with torch.autocast(query.device.type, enabled=False):
            return _dense(query, key, value)
    multiply = torch.bmm if query.dim() == 3 else torch.matmul
    if _arithmetic(query) == query.dtype:
        # Casts that do nothing still are nodes of an exported graph.
        attention = torch.softmax(multiply(query, key.transpose(-2, -1)), dim=-1)
    else:
        arithmetic = _arithmetic(query)
        scores = multiply(query.to(arithmetic), key.to(arithmetic).transpose(-2, -1))
        attention = torch.softmax(scores, dim=-1).to(value.dtype)
    return multiply(attention, value), attention


def _arithmetic(operand: torch.Tensor) -> torch.dtype:
    # Not `promote_types`, which torch.export writes into the graph.
    return torch.float32 if operand.dtype.itemsize < 4 else operand.dtype


def _flat(operand: torch.Tensor) -> torch.Tensor:
    if operand.dim() == 3:
        return operand
    return operand.flatten(0, -3) if operand.dim() > 3 else operand.unsqueeze(0)


# The numbers. Every product and every elementwise step writes into a buffer allocated before the loop: blocks of
# changing temporaries fragment the allocator until it holds many times what is alive. It also keeps autocast out,
# which leaves calls with `out=` and in-place calls alone.


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int | None
) -> torch.Tensor:
    arithmetic = _arithmetic(query)
    q, k, v = _factors(arithmetic, query), _factors(arithmetic, key), _ready(value, value.dtype)
    out = value.new_empty(*query.shape[:2], value.shape[2])
    for block in _blocks(q, k, block_size, arithmetic, *(() if v.dtype == arithmetic else (v.dtype,))):
        scores, a = block.buffers[0], block.buffers[-1]
        _softmax_scores(block.rows_of(q), block.keys_of(k), out=scores)
        if a is not scores:
            a.copy_(scores)
        _multiply(a, block.keys_of(v), out=block.rows_of(out))
    return out


def _backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor, block_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arithmetic = _arithmetic(query)
    q, k, v, g = (_ready(operand, arithmetic) for operand in (query, key, value, grad))
    q_factor, k_factor = _factors(arithmetic, q), _factors(arithmetic, k)
    dq, dk, dv = (_empty_gradient(operand, arithmetic) for operand in (query, key, value))
    for block in _blocks(q, k, block_size, *(arithmetic,) * 2):
        a, ds = block.buffers
        q_rows, g_rows, keys, values = block.rows_of(q), block.rows_of(g), block.keys_of(k), block.keys_of(v)
        _softmax_scores(block.rows_of(q_factor), block.keys_of(k_factor), out=a)
        _accumulate(block.keys_of(dv), a.mT, g_rows, afresh=block.first)
        _multiply(g_rows, values.mT, out=ds)
        _softmax_backward(ds, a)
        _multiply(ds, keys, out=block.rows_of(dq))
        _accumulate(block.keys_of(dk), ds.mT, q_rows, afresh=block.first)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _second(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    query_dot: torch.Tensor,
    key_dot: torch.Tensor,
    value_dot: torch.Tensor,
    grad_dot: torch.Tensor | None,
    block_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arithmetic = _arithmetic(query)
    q, k, v, g = (_ready(operand, arithmetic) for operand in (query, key, value, grad))
    q_dot, k_dot, v_dot = (_ready(operand, arithmetic) for operand in (query_dot, key_dot, value_dot))
    g_dot = None if grad_dot is None else _ready(grad_dot, arithmetic)
    q_factor, k_factor = _factors(arithmetic, q), _factors(arithmetic, k)
    q_factors, k_factors = _factors(arithmetic, q_dot, q), _factors(arithmetic, k, k_dot)
    ddq, ddk, ddv = (_empty_gradient(operand, arithmetic) for operand in (query, key, value))
    out_dot = value.new_empty(*query.shape[:2], value.shape[2], dtype=arithmetic)
    for block in _blocks(q, k, block_size, *(arithmetic,) * 4):
        a, u, w, product = block.buffers
        q_rows, q_dot_rows, g_rows = block.rows_of(q), block.rows_of(q_dot), block.rows_of(g)
        keys, keys_dot = block.keys_of(k), block.keys_of(k_dot)
        values, values_dot = block.keys_of(v), block.keys_of(v_dot)
        ddq_rows, out_dot_rows = block.rows_of(ddq), block.rows_of(out_dot)
        ddk_keys, ddv_keys = block.keys_of(ddk), block.keys_of(ddv)
        _softmax_scores(block.rows_of(q_factor), block.keys_of(k_factor), out=a)

        _multiply(block.rows_of(q_factors), block.keys_of(k_factors).mT, out=u)
        u.sub_(torch.mul(a, u, out=product).sum(-1, keepdim=True))
        a_dot = torch.mul(a, u, out=product)
        _multiply(a_dot, values, out=out_dot_rows)
        _accumulate(out_dot_rows, a, values_dot)
        _accumulate(ddv_keys, a_dot.mT, g_rows, afresh=block.first)

        _multiply(g_rows, values.mT, out=w)
        w.sub_(torch.mul(a, w, out=product).sum(-1, keepdim=True))
        x = u.mul_(w)
        ds = w.mul_(a)
        _multiply(ds, keys_dot, out=ddq_rows)
        _accumulate(ddk_keys, ds.mT, q_dot_rows, afresh=block.first)

        _accumulate(x, g_rows, values_dot.mT)
        if g_dot is not None:
            _accumulate(x, block.rows_of(g_dot), values.mT)
            _accumulate(ddv_keys, a.mT, block.rows_of(g_dot))
        ds_dot = _softmax_backward(x, a)
        _accumulate(ddq_rows, ds_dot, keys)
        _accumulate(ddk_keys, ds_dot.mT, q_rows)
    return ddq.to(query.dtype), ddk.to(key.dtype), ddv.to(value.dtype), out_dot.to(value.dtype)


def _tangent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_dot: torch.Tensor,
    key_dot: torch.Tensor,
    value_dot: torch.Tensor,
    block_size: int | None,
) -> torch.Tensor:
    arithmetic = _arithmetic(query)
    q_factor, k_factor = _factors(arithmetic, query), _factors(arithmetic, key)
    q_factors, k_factors = _factors(arithmetic, query_dot, query), _factors(arithmetic, key, key_dot)
    v, v_dot = _ready(value, arithmetic), _ready(value_dot, arithmetic)
    out_dot = value.new_empty(*query.shape[:2], value.shape[2], dtype=arithmetic)
    for block in _blocks(q_factor, k_factor, block_size, *(arithmetic,) * 2):
        a, a_dot = block.buffers
        out_dot_rows = block.rows_of(out_dot)
        _softmax_scores(block.rows_of(q_factor), block.keys_of(k_factor), out=a)
        _multiply(block.rows_of(q_factors), block.keys_of(k_factors).mT, out=a_dot)
        _softmax_backward(a_dot, a)
        _multiply(a_dot, block.keys_of(v), out=out_dot_rows)
        _accumulate(out_dot_rows, a, block.keys_of(v_dot))
    return out_dot.to(value.dtype)


class _Block(NamedTuple):
    at: int | slice
    rows: slice
    first: bool
    buffers: tuple[torch.Tensor, ...]

    def keys_of(self, operand: torch.Tensor) -> torch.Tensor:
        return operand[self.at]

    def rows_of(self, operand: torch.Tensor) -> torch.Tensor:
        return operand[self.at][..., self.rows, :]


def _blocks(
    query: torch.Tensor, key: torch.Tensor, block_size: int | None, *dtypes: torch.dtype
) -> Iterator[_Block]:
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
                yield _Block(slice(start, start + count), rows, row == 0, buffers)
            else:
                # A product of matrices is a faster call than a batch of one of them.
                yield _Block(start, rows, row == 0, tuple(buffer[0] for buffer in buffers))


def _multiply(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    if left.dim() == 2:
        torch.mm(left, right, out=out)
    else:
        torch.bmm(left, right, out=out)


def _accumulate(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, afresh: bool = False) -> None:
    # With beta=0 what is in `into`, NaN included, is not read.
    if left.dim() == 2:
        into.addmm_(left, right, beta=0 if afresh else 1)
    else:
        into.baddbmm_(left, right, beta=0 if afresh else 1)


def _softmax_scores(query: torch.Tensor, key: torch.Tensor, *, out: torch.Tensor) -> None:
    _multiply(query, key.mT, out=out)
    torch.softmax(out, dim=-1, out=out)


def _softmax_backward(grad: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """A∘(dA − rowsum(A∘dA)), in place of dA."""
    if grad.device.type == "cpu":
        # Row by row in cache: less than half the time of three passes over the scores.
        torch.ops.aten._softmax_backward_data.out(grad, attention, -1, grad.dtype, grad_input=grad)  # noqa: SLF001
        return grad
    grad.mul_(attention)
    return grad.addcmul_(attention, grad.sum(-1, keepdim=True), value=-1)


def _ready(operand: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The operand in `dtype`, and in a layout that a product takes as it is, row by row or transposed."""
    across, along = operand.stride()[-2:]
    rows, width = operand.shape[-2:]
    # The gradient of a sum is expanded, and every block's product would copy it anew.
    if not ((along == 1 and across >= width) or (across == 1 and along >= rows)):
        operand = operand.contiguous()
    return operand.to(dtype)


def _factors(dtype: torch.dtype, *parts: torch.Tensor) -> torch.Tensor:
    """The parts side by side, so that one product sums theirs, with columns of zeros where that is faster."""
    width = sum(part.shape[-1] for part in parts)
    # Narrower than 16, a product on the CPU takes half as long again as at 16.
    padded = max(16, width) if parts[0].device.type == "cpu" else width
    if padded == width and len(parts) == 1:
        return _ready(parts[0], dtype)
    together = parts[0].new_zeros(parts[0].shape[0], padded, parts[0].shape[1], dtype=dtype).mT
    start = 0
    for part in parts:
        together[..., start : start + part.shape[-1]] = part
        start += part.shape[-1]
    return together


def _empty_gradient(operand: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where the products with a transposed block of scores are summed."""
    # On the CPU, up to three times as fast transposed where it is narrow, a sixth faster row by row where it is not.
    if operand.shape[-1] < 32:
        return operand.new_empty(*operand.shape[:-2], *operand.shape[:-3:-1], dtype=dtype).mT
    return operand.new_empty(operand.shape, dtype=dtype)


# The derivatives, twice: as functions for eager mode, which also serve torch.func and forward mode, and as
# operators for torch.compile, which would unroll the loop of the former.


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int | None
    ) -> torch.Tensor:
        return _forward(query, key, value, block_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG004
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_applied(_AttendBackward, *ctx.saved_tensors, grad, ctx.block_size), None

    @staticmethod
    def jvp(ctx: Any, *dots: torch.Tensor) -> torch.Tensor:
        return _AttendTangent.apply(*ctx.saved_tensors, *dots[:3], ctx.block_size)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _folded(_Attend, info, in_dims, inputs)


class _AttendBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grad: torch.Tensor,
        block_size: int | None,
    ) -> tuple[torch.Tensor, ...]:
        return _backward(query, key, value, grad, block_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG004
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *dots: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_applied(_AttendSecond, *ctx.saved_tensors, *dots, None, ctx.block_size), None

    @staticmethod
    def jvp(ctx: Any, *dots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _AttendSecond.apply(*ctx.saved_tensors, *dots[:4], ctx.block_size)[:3]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _folded(_AttendBackward, info, in_dims, inputs)


class _AttendTangent(torch.autograd.Function):
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
        return _tangent(query, key, value, query_dot, key_dot, value_dot, block_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG004
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *dots = ctx.saved_tensors
        to_operands = _applied(_AttendSecond, q, k, v, grad, *dots, None, ctx.block_size)[:3]
        return *to_operands, *_applied(_AttendBackward, q, k, v, grad, ctx.block_size), None

    @staticmethod
    def jvp(ctx: Any, *dots: torch.Tensor) -> torch.Tensor:
        return _pushed(_dense_tangent, ctx.saved_tensors, dots[:6])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _folded(_AttendTangent, info, in_dims, inputs)


class _AttendSecond(torch.autograd.Function):
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
        return _second(query, key, value, grad, query_dot, key_dot, value_dot, grad_dot, block_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG004
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *operands, grad_dot = ctx.saved_tensors
        given = operands if grad_dot is None else [*operands, grad_dot]
        _, pull = torch.func.vjp(_dense_second, *given)
        gradients = pull(cotangents)
        return *gradients, *(None,) * (9 - len(gradients))

    @staticmethod
    def jvp(ctx: Any, *dots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = 7 if ctx.saved_tensors[-1] is None else 8
        return _pushed(_dense_second, ctx.saved_tensors[:count], dots[:count])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _folded(_AttendSecond, info, in_dims, inputs)


def _applied(function: Any, *inputs: Any) -> Any:
    """`function.apply` from within a derivative, which may be one of a batch.

    `torch.autograd.grad(is_grads_batched=True)` batches gradients in a way of its own, older than `torch.func`, of
    which `apply` does not know: the batch is taken off here, and put on again.
    """
    level = torch._C._vmapmode_increment_nesting() - 1  # noqa: SLF001
    torch._C._vmapmode_decrement_nesting()  # noqa: SLF001
    if level == 0:
        return function.apply(*inputs)
    *tensors, block_size = inputs
    bare = [
        # A tensor without the batch is expanded to the size given, 1, and so to that of the others below.
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


def _keep(ctx: Any, inputs: tuple[Any, ...]) -> None:
    *tensors, ctx.block_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _folded(
    function: Any, info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """`function` over a batch in which the axis of vmap comes first."""
    size = info.batch_size
    *tensors, block_size = inputs
    folded = [
        tensor
        if tensor is None
        else (tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)).flatten(0, 1)
        for tensor, axis in zip(tensors, in_dims, strict=False)
    ]
    outputs = function.apply(*folded, block_size)
    if isinstance(outputs, tuple):
        return tuple(output.unflatten(0, (size, -1)) for output in outputs), (0,) * len(outputs)
    return outputs.unflatten(0, (size, -1)), 0


# Third derivatives: what `_tangent` and `_second` compute, in operators that torch differentiates on its own.


def _dense_tangent(*operands: torch.Tensor) -> torch.Tensor:
    return _pushed(lambda *qkv: _dense(*qkv)[0], operands[:3], operands[3:])


def _dense_second(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    def first(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor) -> Any:
        out, pull = torch.func.vjp(lambda *qkv: _dense(*qkv)[0], query, key, value)
        return *pull(grad), out

    *dots, last = operands[4:] if len(operands) == 8 else (*operands[4:], torch.zeros_like(operands[3]))
    return _pushed(first, operands[:4], (*dots, last))


def _pushed(function: Any, operands: tuple[torch.Tensor, ...], dots: tuple[torch.Tensor, ...]) -> Any:
    # An expanded operand, as under vmap, cannot be given a tangent.
    own = tuple(operand.clone(memory_format=torch.contiguous_format) for operand in operands)
    return torch.func.jvp(function, own, dots)[1]


@torch.library.custom_op("selfattn::attend", mutates_args=())
def _attend_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int | None
) -> torch.Tensor:
    return _forward(query, key, value, block_size)


@torch.library.custom_op("selfattn::attend_backward", mutates_args=())
def _attend_backward_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor, block_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(query, key, value, grad, block_size)


@torch.library.custom_op("selfattn::attend_second", mutates_args=())
def _attend_second_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    query_dot: torch.Tensor,
    key_dot: torch.Tensor,
    value_dot: torch.Tensor,
    block_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _second(query, key, value, grad, query_dot, key_dot, value_dot, None, block_size)


@_attend_op.register_fake
def _(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return value.new_empty(*query.shape[:2], value.shape[2])


@_attend_backward_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(_empty_gradient(operand, operand.dtype) for operand in (query, key, value))


@_attend_second_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    gradients = (_empty_gradient(operand, operand.dtype) for operand in (query, key, value))
    return *gradients, value.new_empty(*query.shape[:2], value.shape[2])


def _keep_for_op(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG001
    *tensors, ctx.block_size = inputs
    ctx.save_for_backward(*tensors)


def _attend_op_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_attend_backward_op(*ctx.saved_tensors, grad, ctx.block_size), None


def _attend_backward_op_backward(ctx: Any, *dots: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_attend_second_op(*ctx.saved_tensors, *dots, ctx.block_size), None


_attend_op.register_autograd(_attend_op_backward, setup_context=_keep_for_op)
_attend_backward_op.register_autograd(_attend_backward_op_backward, setup_context=_keep_for_op)
