"""Keys and values of the whole map from the rows of each process: pooled where they are, gathered, and joined at borders.

A border between processes can cut a pooling window. Each process then takes the largest number of its part, along W and
then along H. Among equal numbers the first wins, within a part and between the parts in rank order. So the winner is the
one of the whole window, row by row.
"""

import torch
import torch.distributed as dist
from torch import nn

from selfattn_torch.parallel.collectives import all_gather
from selfattn_torch.parallel.layout import Rows

__all__ = ["gather", "owned", "pooled"]


def pooled(maps: torch.Tensor, rows: Rows, pool: int) -> torch.Tensor:
    """The windows that this process has a part of, each pooled over that part.

    Args:
        maps: (B, D, h, W), the rows of this process.
        rows: the rows of all processes.
        pool: the size of a window. 1 means no pooling.

    Returns:
        (B, D, n, W'), with one row for each window.
    """
    if pool == 1:
        return maps
    parts = rows.parts(pool)
    if not parts:
        # A part of the graph, so that this process takes part in the collectives of the derivatives.
        return maps[:, :, :0, : maps.shape[3] // pool]
    if all(part == (index * pool, pool) for index, part in enumerate(parts)):
        return nn.functional.max_pool2d(maps, pool, pool)
    return _first_largest(nn.functional.max_pool2d(maps, (1, pool)), 2, parts)


def gather(windows: torch.Tensor, rows: Rows, pool: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The windows of the whole map, with one all-gather.

    Args:
        windows: (B, D, n, W'), from `pooled`.
        rows: the rows of all processes.
        pool: the size of a window.
        group: the process group.

    Returns:
        (B, M, D), positions in row-major order.
    """
    counts = [len(each) for each in rows.windows(pool)]
    most = max(counts)
    # With the windows first, the gathered parts lie in the order of the keys, and are not copied again.
    own = windows.permute(2, 3, 0, 1)  # (n, W', B, D)
    if len(own) < most:
        own = nn.functional.pad(own, (0,) * 7 + (most - len(own),))
    everyone = all_gather(own, group)
    if min(counts) < most:
        everyone = torch.cat(
            [everyone[index * most : index * most + count] for index, count in enumerate(counts)]
        )
    pieces = rows.pieces(pool)
    if len(everyone) > len(pieces):
        everyone = _first_largest(everyone, 0, pieces)
    return everyone.flatten(0, 1).permute(1, 0, 2)


def owned(
    windows: torch.Tensor, rows: Rows, pool: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, list[int]]:
    """The windows that begin in this process, complete. No process has a part of another's windows then.

    Args:
        windows: (B, D, n, W'), from `pooled`.
        rows: the rows of all processes.
        pool: the size of a window.
        group: the process group.

    Returns:
        The windows (B, D, n', W'), and the number n' of every process.
    """
    parts, begun = rows.windows(pool), rows.begun_earlier(pool)
    counts = [len(own) - late for own, late in zip(parts, begun, strict=True)]
    if not any(begun):
        return windows, counts
    late = begun[rows.rank]
    first = windows[:, :, :1] if late else nn.functional.pad(windows[:, :, :0], (0, 0, 0, 1))
    everyone = all_gather(first.permute(2, 3, 0, 1), group).permute(2, 3, 0, 1)  # (B, D, P, W')
    own = parts[rows.rank][late:]
    rest = [
        rank
        for rank in range(rows.rank + 1, len(parts))
        if own and begun[rank] and parts[rank].start == own[-1]
    ]
    # Also without a rest, which keeps the gathered tensor in the graph of every process.
    together = torch.cat([windows[:, :, late:], everyone[:, :, rest]], 2)
    if not rest:
        return together, counts
    single = [(index, 1) for index in range(len(own) - 1)]
    return _first_largest(together, 2, [*single, (len(own) - 1, 1 + len(rest))]), counts


def _first_largest(maps: torch.Tensor, axis: int, runs: list[tuple[int, int]]) -> torch.Tensor:
    """The largest number of each run of an axis. The derivative goes to the first of equal ones."""
    longest = max(count for _, count in runs)
    # Repeated last entries make the runs equally long. They come after the numbers that they repeat, and so never win.
    index = [start + min(step, count - 1) for start, count in runs for step in range(longest)]
    chosen = maps.index_select(axis, torch.tensor(index, device=maps.device))
    return chosen.unflatten(axis, (len(runs), longest)).max(axis + 1).values
