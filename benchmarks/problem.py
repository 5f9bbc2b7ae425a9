"""The inputs of a cell, as a file hands them to the process that measures.

Of the library under measurement this file needs nothing but its configuration, so that an older checkout can be measured
too (`bench.py --against`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.cells import Cell
from selfattn_core import SelfAttentionConfig

__all__ = ["Problem", "config_of"]

Array = NDArray[np.float32]

_KINDS = ("operands", "params")


def config_of(cell: Cell) -> SelfAttentionConfig:
    """The configuration of a layer. For the core, one with its widths."""
    if cell.level == "pooled":
        return SelfAttentionConfig.pooled(cell.channels)
    return SelfAttentionConfig(cell.channels)


@dataclass(frozen=True)
class Problem:
    """A cell with its inputs. All arrays are float32. In bfloat16 their values are such that bfloat16 represents them.

    Args:
        cell: the cell.
        operands: q, k, v (B, N, ·) of the core, or x (B, H, W, C) of a layer, in this order.
        params: canonical parameters of a layer. Empty for the core.
        weight: w, in the shape of the output.
        checked_weight: the weights for the expected answers.
        rows: the query rows from which these answers are computed.
    """

    cell: Cell
    operands: Mapping[str, Array]
    params: Mapping[str, Array]
    weight: Array
    checked_weight: Array
    rows: NDArray[np.int64]

    @property
    def config(self) -> SelfAttentionConfig:
        """The configuration of the cell."""
        return config_of(self.cell)

    @property
    def blocks(self) -> list[slice]:
        """The query rows of the blocks that the operators would choose."""
        from selfattn_ops.blocks import block_rows

        positions = self.cell.positions
        rows = block_rows(None, self.cell.batch, positions, positions)
        return [slice(start, min(start + rows, positions)) for start in range(0, positions, rows)]

    def save(self, path: Path) -> None:
        """Write the arrays to a file that `load` reads."""
        arrays = {name: getattr(self, name) for name in ("weight", "checked_weight", "rows")}
        for kind in _KINDS:
            arrays |= {f"{kind}/{name}": array for name, array in getattr(self, kind).items()}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, cell: Cell, path: Path) -> "Problem":
        """The problem of a cell from a file of `save`."""
        with np.load(path) as file:
            arrays = dict(file)
        kinds = {
            kind: {
                name.partition("/")[2]: array for name, array in arrays.items() if name.startswith(f"{kind}/")
            }
            for kind in _KINDS
        }
        named = {name: array for name, array in arrays.items() if "/" not in name}
        return cls(cell, **kinds, **named)
