"""The function and its first and second derivatives, computed one block of query rows at a time.

With `S = q kᵀ`, `A = softmax(S)`, G the gradient of o:

    first   dA = G vᵀ             dS = A∘(dA − D)       D = rowsum(A∘dA)
            dq = dS k             dk = dSᵀ q            dv = Aᵀ G
    second  U = q̇ kᵀ + q k̇ᵀ       Ȧ = A∘(U − u)         u = rowsum(A∘U)         R = G v̇ᵀ + Ġ vᵀ
            dṠ = A∘(X − rowsum(A∘X))                    X = (U − u)∘(dA − D) + R
            ddq = dṠ k + dS k̇     ddk = dṠᵀ q + dSᵀ q̇   ddv = Ȧᵀ G + Aᵀ Ġ       ȯ = Ȧ v + A v̇

The second order is both the derivative of the backward pass and its tangent in forward mode.

S and U are products in at least float32. The factors of the other products can be in bfloat16, if the operands are. What
they give is then added up in float32.
"""

import torch

from selfattn_ops.torch.blocks import (
    Sum,
    as_factor,
    blocks,
    empty_gradient,
    factors,
    multiply,
    narrow_softmax_scores,
    ready,
    softmax_backward,
    softmax_scores,
)
from selfattn_ops.torch.peaked import reach, unit
from selfattn_ops.torch.products import arithmetic_of, factor_of

__all__ = ["backward", "forward", "second", "tangent"]


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int | None
) -> torch.Tensor:
    """The output."""
    arithmetic = arithmetic_of(query)
    q, k, v = factors(arithmetic, query), factors(arithmetic, key), ready(value, value.dtype)
    lowest = reach(q, k)
    out = value.new_empty(*query.shape[:2], value.shape[2])
    for block in blocks(q, k, block_size, arithmetic, *(() if v.dtype == arithmetic else (v.dtype,))):
        scores, a = block.buffers[0], block.buffers[-1]
        softmax_scores(block.rows_of(q), block.keys_of(k), out=scores, reach=lowest)
        if a is not scores:
            a.copy_(scores)
        multiply(a, block.keys_of(v), out=block.rows_of(out))
    return out


def backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor, block_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients dq, dk and dv."""
    arithmetic, factor = arithmetic_of(query), factor_of(query)
    q, k, v, g = (ready(operand, factor) for operand in (query, key, value, grad))
    q_factor, k_factor = factors(arithmetic, query), factors(arithmetic, key)
    lowest, scale = reach(q_factor, k_factor), 1.0
    if lowest is not None:
        scale = unit(g)
        g = g * scale
    dq = empty_gradient(query, factor)
    dk, dv = (Sum.of(empty_gradient(operand, arithmetic), factor) for operand in (key, value))
    for block in blocks(q, k, block_size, *(factor,) * 2):
        a, ds = block.buffers
        q_rows, g_rows, keys, values = block.rows_of(q), block.rows_of(g), block.keys_of(k), block.keys_of(v)
        rows = block.rows_of(q_factor), block.keys_of(k_factor)
        if factor == arithmetic:
            softmax_scores(*rows, out=a, reach=lowest)
        else:
            narrow_softmax_scores(*rows, out=a, reach=lowest, spare=ds)
        dv.of_keys(block).add(a.mT, g_rows, afresh=block.first)
        multiply(g_rows, values.mT, out=ds)
        softmax_backward(ds, a)
        multiply(ds, keys, out=block.rows_of(dq))
        dk.of_keys(block).add(ds.mT, q_rows, afresh=block.first)
    return (
        _unscaled(dq, scale).to(query.dtype),
        _unscaled(dk.total, scale).to(key.dtype),
        _unscaled(dv.total, scale).to(value.dtype),
    )


def second(
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
    """The gradients of `backward` for q, k, v and G."""
    arithmetic, factor = arithmetic_of(query), factor_of(query)
    q, k, v, g = (ready(operand, factor) for operand in (query, key, value, grad))
    q_dot, k_dot, v_dot = (ready(operand, factor) for operand in (query_dot, key_dot, value_dot))
    g_dot = None if grad_dot is None else ready(grad_dot, factor)
    q_factor, k_factor = factors(arithmetic, query), factors(arithmetic, key)
    lowest, scale, dot_scale = reach(q_factor, k_factor), 1.0, 1.0
    if lowest is not None:
        scale, dot_scale = unit(g), unit(q_dot, k_dot, v_dot)
        g, q_dot, k_dot, v_dot = g * scale, q_dot * dot_scale, k_dot * dot_scale, v_dot * dot_scale
        g_dot = None if g_dot is None else g_dot * (scale * dot_scale)
    q_factors, k_factors = factors(arithmetic, q_dot, query), factors(arithmetic, key, k_dot)
    narrow = (factor,) * 2 if factor != arithmetic else ()
    ddq, ddk, ddv = (Sum.of(empty_gradient(operand, arithmetic), factor) for operand in (query, key, value))
    out_dot = Sum.of(value.new_empty(*query.shape[:2], value.shape[2], dtype=arithmetic), factor)
    for block in blocks(q, k, block_size, *(arithmetic,) * 4, *narrow):
        a, u, w, product, *narrowed = block.buffers
        a_narrow, spare = narrowed or (None, None)
        q_rows, q_dot_rows, g_rows = block.rows_of(q), block.rows_of(q_dot), block.rows_of(g)
        keys, keys_dot = block.keys_of(k), block.keys_of(k_dot)
        values, values_dot = block.keys_of(v), block.keys_of(v_dot)
        ddq_rows, out_dot_rows = ddq.of_rows(block), out_dot.of_rows(block)
        ddk_keys, ddv_keys = ddk.of_keys(block), ddv.of_keys(block)
        softmax_scores(block.rows_of(q_factor), block.keys_of(k_factor), out=a, reach=lowest)
        a_factor = as_factor(a, a_narrow)

        multiply(block.rows_of(q_factors), block.keys_of(k_factors).mT, out=u)
        u.sub_(torch.mul(a, u, out=product).sum(-1, keepdim=True))
        a_dot = as_factor(torch.mul(a, u, out=product), spare)
        out_dot_rows.add(a_dot, values, afresh=True)
        out_dot_rows.add(a_factor, values_dot)
        ddv_keys.add(a_dot.mT, g_rows, afresh=block.first)

        Sum(w, spare).add(g_rows, values.mT, afresh=True)
        w.sub_(torch.mul(a, w, out=product).sum(-1, keepdim=True))
        x = u.mul_(w)
        ds = as_factor(w.mul_(a), spare)
        ddq_rows.add(ds, keys_dot, afresh=True)
        ddk_keys.add(ds.mT, q_dot_rows, afresh=block.first)

        Sum(x, spare).add(g_rows, values_dot.mT)
        if g_dot is not None:
            Sum(x, spare).add(block.rows_of(g_dot), values.mT)
            ddv_keys.add(a_factor.mT, block.rows_of(g_dot))
        ds_dot = as_factor(softmax_backward(x, a), spare)
        ddq_rows.add(ds_dot, keys)
        ddk_keys.add(ds_dot.mT, q_rows)
    return (
        *(
            _unscaled(gradient.total, scale * dot_scale).to(operand.dtype)
            for gradient, operand in ((ddq, query), (ddk, key), (ddv, value))
        ),
        _unscaled(out_dot.total, dot_scale).to(value.dtype),
    )


def tangent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_dot: torch.Tensor,
    key_dot: torch.Tensor,
    value_dot: torch.Tensor,
    block_size: int | None,
) -> torch.Tensor:
    """The tangent of the output."""
    arithmetic, factor = arithmetic_of(query), factor_of(query)
    q_factor, k_factor = factors(arithmetic, query), factors(arithmetic, key)
    q_factors, k_factors = factors(arithmetic, query_dot, query), factors(arithmetic, key, key_dot)
    v, v_dot = ready(value, factor), ready(value_dot, factor)
    lowest, narrow = reach(q_factor, k_factor), (factor,) if factor != arithmetic else ()
    out_dot = Sum.of(value.new_empty(*query.shape[:2], value.shape[2], dtype=arithmetic), factor)
    for block in blocks(q_factor, k_factor, block_size, *(arithmetic,) * 2, *narrow):
        a, a_dot, *narrowed = block.buffers
        out_dot_rows = out_dot.of_rows(block)
        softmax_scores(block.rows_of(q_factor), block.keys_of(k_factor), out=a, reach=lowest)
        multiply(block.rows_of(q_factors), block.keys_of(k_factors).mT, out=a_dot)
        softmax_backward(a_dot, a)
        out_dot_rows.add(as_factor(a_dot, *narrowed), block.keys_of(v), afresh=True)
        out_dot_rows.add(as_factor(a, *narrowed), block.keys_of(v_dot))
    return out_dot.total.to(value.dtype)


def _unscaled(gradient: torch.Tensor, scale: float) -> torch.Tensor:
    return gradient if scale == 1 else gradient.mul_(1 / scale)
