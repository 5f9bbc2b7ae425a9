"""The layer on some rows of a feature map, with the other rows in other processes."""

import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import nn

from selfattn_ops.torch import attend, attend_with_map
from selfattn_torch.layer import SelfAttention2d, scaled_sum
from selfattn_torch.parallel.collectives import all_gather_numbers
from selfattn_torch.parallel.keys import gather, owned, pooled
from selfattn_torch.parallel.layout import Rows
from selfattn_torch.parallel.stream import Shards, attend_stream
from selfattn_torch.projection import project

__all__ = ["KV", "attend_local", "check_kv", "rows_of"]

KV = Literal["gather", "stream"]


def check_kv(kv: str) -> None:
    """Refuse an unknown way to have the values of other processes.

    Raises:
        ValueError: if it is neither "gather" nor "stream".
    """
    if kv not in get_args(KV):
        raise ValueError(f'kv={kv!r} must be "gather" (keys and values) or "stream" (values one by one).')


def rows_of(
    layer: SelfAttention2d,
    maps: torch.Tensor,
    group: dist.ProcessGroup,
    heights: Sequence[int] | None,
    kv: KV,
) -> Rows:
    """The rows of all processes. Without `heights`, the processes exchange a few numbers and check that they agree.

    Args:
        layer: the layer.
        maps: (B, C, h, W), the rows of this process.
        group: the process group.
        heights: the rows of each process, if the caller knows them.
        kv: as in `attend_rows`.

    Raises:
        ValueError: if the processes do not agree, or the heights do not fit.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, channels, height, width = maps.shape
    if heights is not None:
        rows = Rows(tuple(heights), rank)
        if len(rows.heights) != size or min(rows.heights) < 0 or rows.height != height:
            raise ValueError(
                f"attend_rows: got heights {rows.heights} and {height} rows in rank {rank} of {size}; "
                f"expected {size} heights, of which number {rank} is {height}."
            )
    else:
        rows = Rows(_exchanged_heights(layer, maps, group, kv), rank)
    layer.config.check_input(
        (batch, channels, rows.total, width),
        layout="BCHW",
        layer="attend_rows",
        dtype=maps.dtype,
        floating=maps.is_floating_point(),
    )
    return rows


@torch.compiler.disable(reason="the processes exchange their numbers of rows: pass heights to compile this")
def _exchanged_heights(
    layer: SelfAttention2d, maps: torch.Tensor, group: dist.ProcessGroup, kv: KV
) -> tuple[int, ...]:
    """The rows of each process, once it is known that the processes agree on everything else."""
    batch, channels, height, width = maps.shape
    mine = {
        "rows": height,
        "batch": batch,
        "channels": channels,
        "width": width,
        "dtype": zlib.crc32(str(maps.dtype).encode()),
        "config": zlib.crc32(repr(layer.config).encode()),
        "kv": get_args(KV).index(kv),
    }
    everyone = all_gather_numbers(list(mine.values()), group, maps.device)
    columns = dict(zip(mine, zip(*everyone, strict=True), strict=True))
    heights = columns.pop("rows")
    if problems := [f"{name} {list(column)}" for name, column in columns.items() if len(set(column)) > 1]:
        raise ValueError(
            f"attend_rows: got maps or layers that differ between the processes, by rank: {'; '.join(problems)}; "
            "expected the rows of one map, and one layer (dtype and config are given as checksums)."
        )
    return heights


def attend_local(
    layer: SelfAttention2d,
    maps: torch.Tensor,
    rows: Rows,
    group: dist.ProcessGroup,
    *,
    kv: KV,
    need_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output (B, C, h, W) of the rows of this process, and their part (B, h·W, M) of the map or None."""
    pool = layer.config.kv_pool
    query, key, value = _projected(maps, layer.query, layer.key, layer.value)
    query = query.flatten(2).mT  # (B, h·W, Dk)
    windows = [pooled(operand, rows, pool) for operand in (key, value)]
    attention = None
    if kv == "stream" and not need_weights:
        keys = gather(windows[0], rows, pool, group)  # (B, M, Dk)
        values, counts = owned(windows[1], rows, pool, group)
        shards = Shards(tuple(count * values.shape[3] for count in counts), group)
        attended = attend_stream(query, keys, values.flatten(2).mT, shards, layer.block_size)
    else:
        widths = [operand.shape[1] for operand in windows]
        together = gather(torch.cat(windows, 1), rows, pool, group)  # (B, M, Dk + Dv)
        keys, values = together.split(widths, -1)
        if need_weights:
            attended, attention = attend_with_map(query, keys, values, block_size=layer.block_size)
        else:
            attended = attend(query, keys, values, block_size=layer.block_size)  # (B, h·W, Dv)
    attended = attended.mT.unflatten(-1, maps.shape[2:])  # (B, Dv, h, W)
    if layer.config.out_projection:
        (attended,) = _projected(attended, layer.out)  # (B, C, h, W)
    return scaled_sum(maps, layer.gamma, attended), attention


def _projected(maps: torch.Tensor, *children: nn.Module) -> tuple[torch.Tensor, ...]:
    if maps.shape[2]:
        return project(maps, *children, flat=False)
    # Convolutions refuse a map without rows. The children are called all the same, because a call may move their state,
    # and all processes have to take part in the collectives of the derivatives.
    one = project(nn.functional.pad(maps, (0, 0, 0, 1)), *children, flat=False)
    return tuple(output[:, :, :0] for output in one)
