"""`attend_rows`, and DTensors: the layer is computed from their local shards."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from selfattn_torch.layer import SelfAttention2d
from selfattn_torch.parallel.layout import chunked
from selfattn_torch.parallel.rows import KV, attend_local, check_kv, rows_of

__all__ = ["attend_rows", "attend_shards", "is_in_rank_order"]


def attend_rows(
    layer: SelfAttention2d,
    x: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    kv: KV = "gather",
    heights: Sequence[int] | None = None,
    need_weights: bool = False,
) -> Any:
    """The layer on some rows of a map, with the other rows in the other processes of a group, in rank order.

    Each process projects and pools its own rows, and attends from them to the keys of all. The result is that of one
    process, through second derivatives. No process holds the whole x, or N × M numbers.

    The loss is the sum of the losses of the processes of the group, and the gradient of a parameter in one process is its
    share: their sum over the group is the gradient. Every process of the group has to make the same calls, backward
    passes too, with no rows as well.

    Args:
        layer: the layer, with equal parameters in every process (`check_replicas`).
        x: (B, C, h, W) or (C, h, W), the rows of this process. h can differ, and can be 0. Or a DTensor: see `RowParallel`.
        group: the process group. By default all processes. A DTensor brings its own.
        kv: "gather" for one all-gather of keys and values. "stream" gathers the keys alone, and fetches the values of one
            process at a time, again in each derivative.
        heights: the rows of each process. Without them each call exchanges seven numbers first, which also shows whether
            the processes agree on sizes, dtype and config. A DTensor has them.
        need_weights: whether to return (y, A) too, with A (B, h·W, M), the map of the rows of this process.

    Returns:
        y, like x.

    Raises:
        ValueError: if the processes do not agree, the heights do not fit, the map is smaller than a window, or a DTensor is
            sharded along C or W.
        TypeError: if x is not a tensor, or not floating-point.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        >>> layer, x = SelfAttention2d(16), torch.randn(2, 16, 5, 7)
        >>> torch.equal(attend_rows(layer, x), layer(x))
        True
        >>> dist.destroy_process_group()
    """
    check_kv(kv)
    if isinstance(x, DTensor):
        return attend_shards(layer, x, kv=kv, need_weights=need_weights, group=group)
    if not isinstance(x, torch.Tensor) or x.dim() not in (3, 4):
        raise TypeError(
            f"attend_rows: got {_described(x)}; expected a tensor (B, C, h, W) or (C, h, W), the rows of this process."
        )
    if group is None:
        group = dist.group.WORLD
    maps = x if x.dim() == 4 else x.unsqueeze(0)
    rows = rows_of(layer, maps, group, heights, kv)
    y, attention = attend_local(layer, maps, rows, group, kv=kv, need_weights=need_weights)
    if x.dim() == 3:
        y, attention = y.squeeze(0), attention if attention is None else attention.squeeze(0)
    return (y, attention) if need_weights else y


def attend_shards(
    layer: SelfAttention2d,
    x: DTensor,
    *,
    kv: KV = "gather",
    need_weights: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Any:
    """The layer on a DTensor, from its local shards: rows, samples, or both on two dimensions of the mesh.

    Args:
        layer: the layer. Its parameters are tensors, or DTensors that are replicated on the mesh of x.
        x: (B, C, H, W) or (C, H, W), sharded along H or B, or replicated, on each dimension of its mesh.
        kv: as in `attend_rows`.
        need_weights: whether to return the map too. It is a DTensor if only samples are sharded, and otherwise the local
            rows.
        group: the process group that rows have to be sharded over, if the caller has one.

    Returns:
        y, sharded like x. The gradient of a parameter that is a tensor is the share of this process. That of a DTensor is
        a DTensor with the whole gradient.

    Raises:
        ValueError: if x or a parameter is sharded in another way.
    """
    mesh, row_axis = x.device_mesh, x.dim() - 2
    rows_at = [index for index, placement in enumerate(x.placements) if _shards(placement, row_axis)]
    problems = [
        f"dimension {index} of its mesh has {placement}"
        for index, placement in enumerate(x.placements)
        if not (
            type(placement) is Replicate
            or _shards(placement, row_axis)
            or (x.dim() == 4 and _shards(placement, 0))
        )
    ]
    if len(rows_at) > 1:
        problems.append("H is sharded over two dimensions of its mesh")
    for index in rows_at:
        own = mesh.get_group(index)
        if group is not None and dist.get_process_group_ranks(own) != dist.get_process_group_ranks(group):
            problems.append(
                f"its rows are in ranks {dist.get_process_group_ranks(own)}, "
                f"and those of the layer in {dist.get_process_group_ranks(group)}"
            )
        if not is_in_rank_order(mesh, index):
            problems.append("the ranks of its mesh are not in ascending order")
    if problems:
        raise ValueError(
            f"SelfAttention2d: got a DTensor of shape {tuple(x.shape)}; expected it sharded along H (axis {row_axis}) on one "
            "dimension of its mesh, and along B or not at all on the others: "
            f"{'; '.join(problems)}. Redistribute it first."
        )
    layer.config.check_input(
        tuple(x.shape),
        layout="BCHW or CHW",
        layer="SelfAttention2d",
        dtype=x.dtype,
        floating=x.is_floating_point(),
    )
    spread = [type(placement) is not Replicate for placement in x.placements]
    local = _Local(layer, kv, need_weights, mesh.get_group(rows_at[0]) if rows_at else None)
    heights = chunked(x.shape[row_axis], mesh.size(rows_at[0])) if rows_at else None
    parameters = _local_parameters(layer, mesh, spread)
    shard = x.to_local()
    if parameters:
        found = torch.func.functional_call(local, parameters, (shard, heights))
    else:
        found = local.forward(shard, heights)
    y, attention = found if need_weights else (found, None)
    y = DTensor.from_local(y, mesh, x.placements, shape=x.shape, stride=_strides(x.shape))
    if not need_weights:
        return y
    if not rows_at:
        attention = DTensor.from_local(attention, mesh, x.placements)
    return y, attention


def is_in_rank_order(mesh: Any, index: int) -> bool:
    """Whether the shards along a dimension of a mesh are in the order of the ranks of its group.

    Args:
        mesh: a `DeviceMesh`.
        index: the dimension.
    """
    if torch.compiler.is_compiling():
        return True
    # All processes have to find the same, also one whose own place is the right one.
    place: list[Any] = list(mesh.get_coordinate())
    place[index] = slice(None)
    return mesh.mesh[tuple(place)].tolist() == dist.get_process_group_ranks(mesh.get_group(index))


class _Local(nn.Module):
    """The layer as a child of a module, so that its hooks are not run again while its parameters are exchanged."""

    def __init__(
        self, layer: SelfAttention2d, kv: KV, need_weights: bool, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.layer, self.kv, self.need_weights, self.group = layer, kv, need_weights, group

    def forward(self, x: torch.Tensor, heights: Sequence[int] | None) -> Any:
        if self.group is None:
            # Not the call of a subclass, which would come back here.
            alone: Any = SelfAttention2d.forward
            return alone(self.layer, x, self.need_weights)
        return attend_rows(
            self.layer, x, self.group, kv=self.kv, heights=heights, need_weights=self.need_weights
        )


def _local_parameters(layer: SelfAttention2d, mesh: Any, spread: list[bool]) -> dict[str, torch.Tensor]:
    """Parameters and buffers that are DTensors, as tensors. Their gradients are sums over the shards of x."""
    found, problems = {}, []
    placements = [Partial() if each else Replicate() for each in spread]
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if not isinstance(tensor, DTensor):
            continue
        if tensor.device_mesh != mesh or any(type(each) is not Replicate for each in tensor.placements):
            problems.append(f"{name} has {tensor.placements} on {tensor.device_mesh}")
            continue
        found[f"layer.{name}"] = tensor.to_local(grad_placements=placements)
    if problems:
        raise ValueError(
            f"SelfAttention2d: got a DTensor on {mesh}, and parameters that are not replicated there: "
            f"{'; '.join(problems)}; expected tensors, or DTensors replicated on the same mesh."
        )
    return found


def _shards(placement: Any, axis: int) -> bool:
    # Not a subclass, whose shards are in another order.
    return type(placement) is Shard and placement.dim == axis


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _described(x: object) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"input of type {type(x).__name__}"
