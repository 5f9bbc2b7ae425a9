"""`RowParallel`, which `parallelize_module` applies to a layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from selfattn_torch.layer import SelfAttention2d
from selfattn_torch.parallel.replicas import check_replicas
from selfattn_torch.parallel.rows import KV, check_kv
from selfattn_torch.parallel.sharded import attend_rows, attend_shards, is_in_rank_order

__all__ = ["RowParallel", "RowParallelSelfAttention2d"]


class RowParallel(ParallelStyle):
    """Divide the rows of the feature map over one dimension of a device mesh.

    `parallelize_module(model, mesh["rows"], {"attention": RowParallel()})` makes the layer compute `attend_rows`. Its
    parameters stay as they are: tensors, equal in every process. So it combines with DDP and FSDP2, applied afterwards,
    over all ranks. Both divide gradients by the number of ranks, so multiply the loss by the number of row shards.

    The input is the rows of this process, or a DTensor that is sharded along H on this dimension, and along B or not at all
    on others. The output is of the same kind.

    The first call checks that the layers of all processes are equal, except in a compiled graph.

    Args:
        kv: "gather" or "stream", as in `attend_rows`.
        heights: the rows of each process, as in `attend_rows`, if they are always the same. A compiled graph of local rows
            needs them.

    Raises:
        ValueError: if `kv` is neither, or the mesh has more than one dimension.
        TypeError: if the module is not a `SelfAttention2d`.

    Example:
        >>> import tempfile
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> folder = tempfile.mkdtemp()
        >>> dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 1), SelfAttention2d(16))
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("rows",))
        >>> model = parallelize_module(model, mesh["rows"], {"1": RowParallel()})
        >>> model(torch.randn(2, 3, 5, 7)).shape
        torch.Size([2, 16, 5, 7])
        >>> dist.destroy_process_group()
    """

    def __init__(self, *, kv: KV = "gather", heights: Sequence[int] | None = None) -> None:
        super().__init__()
        check_kv(kv)
        self.kv, self.heights = kv, None if heights is None else tuple(heights)

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if type(module) is not SelfAttention2d:
            raise TypeError(
                f"RowParallel: got a module of type {type(module).__name__}; expected a SelfAttention2d, "
                "before fully_shard is applied to it."
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"RowParallel: got a mesh of {device_mesh.ndim} dimensions; expected one: pass the dimension of the rows, "
                'as in mesh["rows"].'
            )
        group = device_mesh.get_group()
        if not is_in_rank_order(device_mesh, 0):
            raise ValueError(
                "RowParallel: got a mesh whose ranks are not in ascending order; "
                "expected ascending ones, because the rows of the map are in rank order."
            )
        module.__class__ = RowParallelSelfAttention2d
        module.sharing = Sharing(group, self.kv, self.heights)
        return module


@dataclass
class Sharing:
    """How the map of one layer is shared.

    Args:
        group: the processes of the rows.
        kv: as in `attend_rows`.
        heights: as in `attend_rows`.
        checked: whether the layers of all processes are known to be equal.
    """

    group: dist.ProcessGroup
    kv: KV
    heights: tuple[int, ...] | None
    checked: bool = False

    def __deepcopy__(self, _: object) -> Self:
        # A group of processes cannot be copied. The copy of a layer belongs to the same one.
        return replace(self)


class RowParallelSelfAttention2d(SelfAttention2d):
    """A layer that `RowParallel` was applied to."""

    sharing: Sharing

    def forward(self, x: torch.Tensor, need_weights: bool = False) -> Any:
        """The output for the rows of this process, with `need_weights` also the map of these rows.

        Args:
            x: (B, C, h, W) or (C, h, W), or a DTensor (B, C, H, W) or (C, H, W).
            need_weights: whether to return (y, A) instead of y.
        """
        sharing = self.sharing
        if not (sharing.checked or torch.compiler.is_compiling()):
            check_replicas(self, sharing.group)
            sharing.checked = True
        if isinstance(x, DTensor):
            return attend_shards(self, x, kv=sharing.kv, need_weights=need_weights, group=sharing.group)
        return attend_rows(
            self, x, sharing.group, kv=sharing.kv, heights=sharing.heights, need_weights=need_weights
        )

    def extra_repr(self) -> str:
        """The options of the layer, and how its map is shared."""
        return f"{super().extra_repr()}, rows over {dist.get_world_size(self.sharing.group)} processes, kv={self.sharing.kv}"
