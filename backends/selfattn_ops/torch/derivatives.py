"""The function and its first and second derivatives, computed one block of query rows at a time.

With `S = q kᵀ`, `A = softmax(S)`, G the gradient of o:

    first   dA = G vᵀ             dS = A∘(dA − D)       D = rowsum(A∘dA)
            dq = dS k             dk = dSᵀ q            dv = Aᵀ G
    second  U = q̇ kᵀ + q k̇ᵀ       Ȧ = A∘(U − u)         u = rowsum(A∘U)         R = G v̇ᵀ + Ġ vᵀ
            dṠ = A∘(X − rowsum(A∘X))                    X = (U − u)∘(dA − D) + R
            ddq = dṠ k + dS k̇     ddk = dṠᵀ q + dSᵀ q̇   ddv = Ȧᵀ G + Aᵀ Ġ       ȯ = Ȧ v + A v̇

The second order is both the derivative of the backward pass and its tangent in forward mode.
"""

import torch

from selfattn_ops.torch.blocks import (
    accumulate,
    blocks,
    empty_gradient,
    factors,
    multiply,
    ready,
    softmax_backward,
    softmax_scores,
)
from selfattn_ops.torch.dense import arithmetic_of

__all__ = ["backward", "forward", "second", "tangent"]


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int | None
) -> torch.Tensor:
    """The output."""
    arithmetic = arithmetic_of(query)
    q, k, v = factors(arithmetic, query), factors(arithmetic, key), ready(value, value.dtype)
    out = value.new_empty(*query.shape[:2], value.shape[2])
    for block in blocks(q, k, block_size, arithmetic, *(() if v.dtype == arithmetic else (v.dtype,))):
        scores, a = block.buffers[0], block.buffers[-1]
        softmax_scores(block.rows_of(q), block.keys_of(k), out=scores)
        if a is not scores:
            a.copy_(scores)
        multiply(a, block.keys_of(v), out=block.rows_of(out))
    return out


def backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor, block_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients dq, dk and dv."""
    arithmetic = arithmetic_of(query)
    q, k, v, g = (ready(operand, arithmetic) for operand in (query, key, value, grad))
    q_factor, k_factor = factors(arithmetic, q), factors(arithmetic, k)
    dq, dk, dv = (empty_gradient(operand, arithmetic) for operand in (query, key, value))
    for block in blocks(q, k, block_size, *(arithmetic,) * 2):
        a, ds = block.buffers
        q_rows, g_rows, keys, values = block.rows_of(q), block.rows_of(g), block.keys_of(k), block.keys_of(v)
        softmax_scores(block.rows_of(q_factor), block.keys_of(k_factor), out=a)
        accumulate(block.keys_of(dv), a.mT, g_rows, afresh=block.first)
        multiply(g_rows, values.mT, out=ds)
        softmax_backward(ds, a)
        multiply(ds, keys, out=block.rows_of(dq))
        accumulate(block.keys_of(dk), ds.mT, q_rows, afresh=block.first)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


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
    arithmetic = arithmetic_of(query)
    q, k, v, g = (ready(operand, arithmetic) for operand in (query, key, value, grad))
    q_dot, k_dot, v_dot = (ready(operand, arithmetic) for operand in (query_dot, key_dot, value_dot))
    g_dot = None if grad_dot is None else ready(grad_dot, arithmetic)
    q_factor, k_factor = factors(arithmetic, q), factors(arithmetic, k)
    q_factors, k_factors = factors(arithmetic, q_dot, q), factors(arithmetic, k, k_dot)
    ddq, ddk, ddv = (empty_gradient(operand, arithmetic) for operand in (query, key, value))
    out_dot = value.new_empty(*query.shape[:2], value.shape[2], dtype=arithmetic)
    for block in blocks(q, k, block_size, *(arithmetic,) * 4):
        a, u, w, product = block.buffers
        q_rows, q_dot_rows, g_rows = block.rows_of(q), block.rows_of(q_dot), block.rows_of(g)
        keys, keys_dot = block.keys_of(k), block.keys_of(k_dot)
        values, values_dot = block.keys_of(v), block.keys_of(v_dot)
        ddq_rows, out_dot_rows = block.rows_of(ddq), block.rows_of(out_dot)
        ddk_keys, ddv_keys = block.keys_of(ddk), block.keys_of(ddv)
        softmax_scores(block.rows_of(q_factor), block.keys_of(k_factor), out=a)

        multiply(block.rows_of(q_factors), block.keys_of(k_factors).mT, out=u)
        u.sub_(torch.mul(a, u, out=product).sum(-1, keepdim=True))
        a_dot = torch.mul(a, u, out=product)
        multiply(a_dot, values, out=out_dot_rows)
        accumulate(out_dot_rows, a, values_dot)
        accumulate(ddv_keys, a_dot.mT, g_rows, afresh=block.first)

        multiply(g_rows, values.mT, out=w)
        w.sub_(torch.mul(a, w, out=product).sum(-1, keepdim=True))
        x = u.mul_(w)
        ds = w.mul_(a)
        multiply(ds, keys_dot, out=ddq_rows)
        accumulate(ddk_keys, ds.mT, q_dot_rows, afresh=block.first)

        accumulate(x, g_rows, values_dot.mT)
        if g_dot is not None:
            accumulate(x, block.rows_of(g_dot), values.mT)
            accumulate(ddv_keys, a.mT, block.rows_of(g_dot))
        ds_dot = softmax_backward(x, a)
        accumulate(ddq_rows, ds_dot, keys)
        accumulate(ddk_keys, ds_dot.mT, q_rows)
    return ddq.to(query.dtype), ddk.to(key.dtype), ddv.to(value.dtype), out_dot.to(value.dtype)


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
    arithmetic = arithmetic_of(query)
    q_factor, k_factor = factors(arithmetic, query), factors(arithmetic, key)
    q_factors, k_factors = factors(arithmetic, query_dot, query), factors(arithmetic, key, key_dot)
    v, v_dot = ready(value, arithmetic), ready(value_dot, arithmetic)
    out_dot = value.new_empty(*query.shape[:2], value.shape[2], dtype=arithmetic)
    for block in blocks(q_factor, k_factor, block_size, *(arithmetic,) * 2):
        a, a_dot = block.buffers
        out_dot_rows = block.rows_of(out_dot)
        softmax_scores(block.rows_of(q_factor), block.keys_of(k_factor), out=a)
        multiply(block.rows_of(q_factors), block.keys_of(k_factors).mT, out=a_dot)
        softmax_backward(a_dot, a)
        multiply(a_dot, block.keys_of(v), out=out_dot_rows)
        accumulate(out_dot_rows, a, block.keys_of(v_dot))
    return out_dot.to(value.dtype)
