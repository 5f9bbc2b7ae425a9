"""Attention whose values stay in the processes that they belong to, and pass through the others one shard at a time.

Queries are those of this process. Keys are all there, because they are narrow. So the largest score and the sum of each
softmax row are known before any value is, and every shard of values is used once in the output, once in the first
derivative and twice in the second. There is no running softmax to correct.

With `S = q kᵀ`, `A = softmax(S)`, G the gradient of o, and sums over keys taken shard by shard:

    first   dA = G vᵀ             dS = A∘(dA − D)       D = rowsum(G∘o)
    second  U = q̇ kᵀ + q k̇ᵀ       Ȧ = A∘(U − u)         u = rowsum(A∘U)         ȯ = Ȧ v + A v̇
            X = (U − u)∘(dA − D) + G v̇ᵀ                 dṠ = A∘(X − rowsum(G∘ȯ))

The other terms are those of `selfattn_ops.torch.derivatives`. rowsum(A∘dA) and rowsum(A∘X) are written with o and ȯ, so
that they are known before the pass that needs them.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from selfattn_ops.blocks import SCORE_BUDGET
from selfattn_ops.torch.blocks import Block, Sum, blocks, multiply, ready
from selfattn_ops.torch.products import arithmetic_of

__all__ = ["Shards", "attend_stream"]

_LEAST_ROWS = 64
"""The fewest query rows in a block of the automatic choice."""


class Shards(NamedTuple):
    """How the keys are divided over the processes, in rank order.

    Args:
        sizes: the keys of each process.
        group: the process group.
    """

    sizes: tuple[int, ...]
    group: dist.ProcessGroup

    def places(self) -> Iterator[tuple[int, slice]]:
        """The rank and the keys of each process that has keys."""
        start = 0
        for rank, size in enumerate(self.sizes):
            if size:
                yield rank, slice(start, start + size)
            start += size

    def room(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the largest shard of an operand by key (B, m, D)."""
        return like.new_empty(like.shape[0] * max(self.sizes) * like.shape[2], dtype=dtype)

    def part(self, rank: int, room: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The memory of a process' shard in `room`."""
        shape = like.shape[0], self.sizes[rank], like.shape[2]
        return room[: math.prod(shape)].view(shape)

    def fetch(self, rank: int, own: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """What a process has of an operand by key, in the memory of `room`."""
        shard = self.part(rank, room, own)
        if rank == dist.get_rank(self.group):
            shard.copy_(own)
        dist.broadcast(shard, group_src=rank, group=self.group)
        return shard

    def deliver(self, rank: int, part: torch.Tensor, total: torch.Tensor) -> None:
        """Write the sum of all processes' parts to `total` in the process of this rank."""
        dist.reduce(part, group_dst=rank, group=self.group)
        if rank == dist.get_rank(self.group):
            total.copy_(part)


class _Scratch:
    """Buffers of scores for the blocks of all shards, because those of changing sizes fragment the allocator."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, shards: Shards, size: int | None, count: int
    ) -> None:
        # Half of the usual buffer: its share of the memory of one process is to fall with the number of processes.
        self._size = size or max(_LEAST_ROWS, SCORE_BUDGET // 2 // (4 * max(shards.sizes)))
        shapes = [
            self._shape(block, keys.stop - keys.start)
            for _, keys in shards.places()
            for block in blocks(q, k[:, keys], self._size)
        ]
        most = max(map(math.prod, shapes), default=0)
        self._whole = [q.new_empty(most) for _ in range(count)]

    def blocks(self, q: torch.Tensor, k: torch.Tensor) -> Iterator[Block]:
        """Loop over the batch and the query rows for one shard of keys."""
        for block in blocks(q, k, self._size):
            shape = self._shape(block, k.shape[1])
            parts = tuple(buffer[: math.prod(shape)].view(shape) for buffer in self._whole)
            yield block._replace(buffers=parts)

    @staticmethod
    def _shape(block: Block, keys: int) -> tuple[int, ...]:
        rows = block.rows.stop - block.rows.start, keys
        return rows if isinstance(block.at, int) else (block.at.stop - block.at.start, *rows)


@torch.compiler.disable(
    reason='kv="stream" moves values between processes while it computes, which is not compiled'
)
def attend_stream(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shards: Shards, block_size: int | None
) -> torch.Tensor:
    """Softmax over all keys of q kᵀ, times v, with the values in the processes of a group. It can be differentiated twice.

    Args:
        query: (B, n, Dk), the queries of this process.
        key: (B, M, Dk), all keys.
        value: (B, m, Dv), the values of this process, which are a part of all.
        shards: how the keys are divided.
        block_size: query rows at a time. None chooses by size.

    Returns:
        (B, n, Dv).
    """
    return _Stream.apply(query, key, value, shards, block_size)


class _Softmax(NamedTuple):
    """The largest score and the sum of exponentials of each query row, (B, n, 1)."""

    peak: torch.Tensor
    total: torch.Tensor

    def weights(self, block: Block, q: torch.Tensor, k: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the block's weights."""
        multiply(block.rows_of(q), block.keys_of(k).mT, out=out)
        return out.sub_(block.rows_of(self.peak)).exp_().div_(block.rows_of(self.total))


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        shards: Shards,
        size: int | None,
    ) -> torch.Tensor:
        dtype = arithmetic_of(query)
        q, k = ready(query, dtype), ready(key, dtype)
        scratch, room = _Scratch(q, k, shards, size, 1), shards.room(value, value.dtype)
        softmax = _softmax(q, k, shards, scratch)
        out = q.new_zeros(*q.shape[:2], value.shape[2])
        for rank, keys in shards.places():
            v, k_shard = shards.fetch(rank, value, room).to(dtype), k[:, keys]
            for block in scratch.blocks(q, k_shard):
                a = softmax.weights(block, q, k_shard, block.buffers[0])
                Sum(block.rows_of(out), None).add(a, block.keys_of(v))
        ctx.save_for_backward(query, key, value, out, *softmax)
        ctx.shards, ctx.size = shards, size
        return out.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, *softmax = ctx.saved_tensors
        gradients = _StreamBackward.apply(
            query, key, value, grad, out.detach(), *softmax, ctx.shards, ctx.size
        )
        return *gradients, None, None


class _StreamBackward(torch.autograd.Function):
    """The first derivative. `out` and the softmax are functions of the operands, so no derivative goes through them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grad: torch.Tensor,
        out: torch.Tensor,
        peak: torch.Tensor,
        total: torch.Tensor,
        shards: Shards,
        size: int | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(query, key, value, grad, out, peak, total)
        ctx.shards, ctx.size = shards, size
        dtype, softmax = arithmetic_of(query), _Softmax(peak, total)
        q, k, g = (ready(operand, dtype) for operand in (query, key, grad))
        mean = (g * out).sum(-1, keepdim=True)
        dq, dk, dv_own = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(value)
        scratch, room, dv_room = (
            _Scratch(q, k, shards, size, 2),
            shards.room(value, value.dtype),
            shards.room(value, dtype),
        )
        for rank, keys in shards.places():
            v, k_shard, dk_shard = shards.fetch(rank, value, room).to(dtype), k[:, keys], dk[:, keys]
            dv = shards.part(rank, dv_room, value).zero_()
            for block in scratch.blocks(q, k_shard):
                a, ds = block.buffers
                softmax.weights(block, q, k_shard, a)
                Sum(block.keys_of(dv), None).add(a.mT, block.rows_of(g))
                multiply(block.rows_of(g), block.keys_of(v).mT, out=ds)
                ds.sub_(block.rows_of(mean)).mul_(a)
                Sum(block.rows_of(dq), None).add(ds, block.keys_of(k_shard))
                Sum(block.keys_of(dk_shard), None).add(ds.mT, block.rows_of(q))
            shards.deliver(rank, dv, dv_own)
        return dq.to(query.dtype), dk.to(key.dtype), dv_own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dots: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = _second(ctx.saved_tensors, dots, ctx.shards, ctx.size)
        return *gradients, *(None,) * 5


def _second(
    saved: tuple[torch.Tensor, ...], dots: tuple[torch.Tensor, ...], shards: Shards, size: int | None
) -> tuple[torch.Tensor, ...]:
    """The gradients of the first derivative for q, k, v and G."""
    query, key, value, grad, out, peak, total = saved
    query_dot, key_dot, value_dot = dots
    dtype, softmax = arithmetic_of(query), _Softmax(peak, total)
    q, k, g, q_dot, k_dot = (ready(operand, dtype) for operand in (query, key, grad, query_dot, key_dot))
    # One product gives U, and one broadcast v and v̇.
    q_both, k_both = torch.cat([q_dot, q], -1), torch.cat([k, k_dot], -1)
    v_both = torch.cat([value, value_dot], -1)
    mean = (g * out).sum(-1, keepdim=True)
    scratch, room, ddv_room = (
        _Scratch(q, k, shards, size, 4),
        shards.room(v_both, v_both.dtype),
        shards.room(value, dtype),
    )

    u_mean = torch.zeros_like(mean)
    for _, keys in shards.places():
        for block in scratch.blocks(q, k[:, keys]):
            a, u, *_rest = block.buffers
            softmax.weights(block, q, k[:, keys], a)
            multiply(block.rows_of(q_both), block.keys_of(k_both[:, keys]).mT, out=u)
            block.rows_of(u_mean).add_(a.mul_(u).sum(-1, keepdim=True))

    out_dot = torch.zeros_like(out)
    for rank, keys in shards.places():
        v, v_dot = shards.fetch(rank, v_both, room).to(dtype).chunk(2, -1)
        for block in scratch.blocks(q, k[:, keys]):
            a, u, *_rest = block.buffers
            softmax.weights(block, q, k[:, keys], a)
            multiply(block.rows_of(q_both), block.keys_of(k_both[:, keys]).mT, out=u)
            out_rows = Sum(block.rows_of(out_dot), None)
            out_rows.add(u.sub_(block.rows_of(u_mean)).mul_(a), block.keys_of(v))
            out_rows.add(a, block.keys_of(v_dot))
    x_mean = (g * out_dot).sum(-1, keepdim=True)

    ddq, ddk, ddv_own = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(value)
    for rank, keys in shards.places():
        v, v_dot = shards.fetch(rank, v_both, room).to(dtype).chunk(2, -1)
        k_shard, ddk_shard = k[:, keys], ddk[:, keys]
        ddv = shards.part(rank, ddv_room, value).zero_()
        for block in scratch.blocks(q, k_shard):
            a, u, w, product = block.buffers
            g_rows = block.rows_of(g)
            ddq_rows, ddk_keys = Sum(block.rows_of(ddq), None), Sum(block.keys_of(ddk_shard), None)
            softmax.weights(block, q, k_shard, a)
            multiply(block.rows_of(q_both), block.keys_of(k_both[:, keys]).mT, out=u)
            u.sub_(block.rows_of(u_mean))
            Sum(block.keys_of(ddv), None).add(torch.mul(a, u, out=product).mT, g_rows)
            multiply(g_rows, block.keys_of(v).mT, out=w)
            w.sub_(block.rows_of(mean))
            ds = torch.mul(a, w, out=product)
            ddq_rows.add(ds, block.keys_of(k_dot[:, keys]))
            ddk_keys.add(ds.mT, block.rows_of(q_dot))
            x = u.mul_(w)
            Sum(x, None).add(g_rows, block.keys_of(v_dot).mT)
            ds_dot = x.sub_(block.rows_of(x_mean)).mul_(a)
            ddq_rows.add(ds_dot, block.keys_of(k_shard))
            ddk_keys.add(ds_dot.mT, block.rows_of(q))
        shards.deliver(rank, ddv, ddv_own)
    return ddq.to(query.dtype), ddk.to(key.dtype), ddv_own, out_dot.to(grad.dtype)


def _softmax(q: torch.Tensor, k: torch.Tensor, shards: Shards, scratch: _Scratch) -> _Softmax:
    """Over all keys, from the scores of one shard of keys at a time."""
    peak = q.new_full((*q.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(peak)
    for _, keys in shards.places():
        for block in scratch.blocks(q, k[:, keys]):
            scores = block.buffers[0]
            multiply(block.rows_of(q), block.keys_of(k[:, keys]).mT, out=scores)
            highest, sums = block.rows_of(peak), block.rows_of(total)
            higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
            sums.mul_(highest.sub_(higher).exp_()).add_(scores.sub_(higher).exp_().sum(-1, keepdim=True))
            highest.copy_(higher)
    return _Softmax(peak, total)
