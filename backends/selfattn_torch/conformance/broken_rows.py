"""Mutants with errors that only a layer over several processes can have, for the tests of the kit.

Each makes one process group whose processes replace a function of `selfattn_torch.parallel`.
"""

from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from selfattn_torch.conformance.rows import RankBackend, RowsBackend
from selfattn_torch.parallel import keys, rows
from selfattn_torch.parallel.collectives import all_gather
from selfattn_torch.parallel.layout import Rows

__all__ = ["cut", "doubled", "halo", "order", "unshared"]


def _replace(owner: Any, **functions: Any) -> None:
    for name, function in functions.items():
        setattr(owner, name, function)


class _ValuesStayHome(RankBackend):
    """Each process attends to its own values only. The keys are gathered."""

    def asked(self, method: str, number: int, *arguments: Any) -> Any:
        width = self.models[number].layer.config.qk_channels
        _replace(rows, gather=partial(_keys_only, width))
        return super().asked(method, number, *arguments)


def _keys_only(
    width: int, windows: torch.Tensor, layout: Rows, pool: int, group: dist.ProcessGroup
) -> torch.Tensor:
    together = keys.gather(windows, layout, pool, group)  # (B, M, Dk + Dv)
    own, across = layout.windows(pool)[layout.rank], windows.shape[3]
    position = torch.arange(together.shape[1])[:, None]
    is_own = (own.start * across <= position) & (position < own.stop * across)
    return together * (is_own | (torch.arange(together.shape[2]) < width))


class _OneRowEarly(RankBackend):
    """Where a border cuts a window, the windows of the process after it begin one row too early."""

    def __init__(self) -> None:
        super().__init__()
        right = Rows.parts

        def parts(layout: Rows, pool: int) -> list[tuple[int, int]]:
            found = right(layout, pool)
            is_cut = bool(found) and found[0][1] < pool and layout.start > 0
            return [(max(first - is_cut, 0), count) for first, count in found]

        _replace(Rows, parts=parts)


class _Doubled(RankBackend):
    """The gradients of keys and values are summed over the processes twice as often as they should be."""

    def __init__(self) -> None:
        super().__init__()

        def gather(shard: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
            everyone = all_gather(shard, group)
            return 2 * everyone - everyone.detach()

        _replace(keys, all_gather=gather)


class _Cut(RankBackend):
    """Each process pools the whole windows of its own rows, and leaves out the others."""

    def __init__(self) -> None:
        super().__init__()

        def windows(layout: Rows, pool: int) -> list[range]:
            counts = [height // pool for height in layout.heights]
            stops = accumulate(counts)
            return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]

        def parts(layout: Rows, pool: int) -> list[tuple[int, int]]:
            return [(index * pool, pool) for index in range(layout.height // pool)]

        _replace(Rows, windows=windows, parts=parts)


class _Backwards(RankBackend):
    """The shards are gathered in the wrong order of ranks. y does not show it without pooling."""

    def __init__(self) -> None:
        super().__init__()

        def gather(shard: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
            everyone = all_gather(shard, group)
            return everyone.unflatten(0, (dist.get_world_size(group), -1)).flip(0).flatten(0, 1)

        _replace(keys, all_gather=gather)


def unshared() -> RowsBackend:
    """Without the gather of values."""
    return RowsBackend(_ValuesStayHome)


def halo() -> RowsBackend:
    """With a halo that is off by one."""
    return RowsBackend(_OneRowEarly)


def doubled() -> RowsBackend:
    """With a gradient that is summed twice."""
    return RowsBackend(_Doubled)


def cut() -> RowsBackend:
    """With windows that end at borders."""
    return RowsBackend(_Cut)


def order() -> RowsBackend:
    """With ranks in the wrong order."""
    return RowsBackend(_Backwards)
