"""The measurements: one table for each mode, and the implementations of each framework."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CEILINGS",
    "FRAMEWORKS",
    "IMPLEMENTATIONS",
    "MODES",
    "OURS",
    "REQUIRES",
    "Cell",
    "Mode",
    "too_large",
]

OURS = "ours"

FRAMEWORKS = ("torch", "jax", "tensorflow")

# The modules that the cells of each framework import: the framework, and the library of its layers.
REQUIRES = {"torch": ("torch",), "jax": ("jax", "flax"), "tensorflow": ("tensorflow", "keras")}

# Not attention, but only the products of the step, of whole arrays and of blocks of query rows. The faster of the two is
# a lower bound for every implementation on this framework's matmul.
CEILINGS = ("matmul", "matmul-blocks")

IMPLEMENTATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    # core: softmax(q kᵀ) v for given q, k, v.
    # flat, pooled: the whole layer, x to y, in the form of most copies and in the form of the authors' code.
    "torch": {
        "core": (OURS, "dense", "sdpa", "memory-efficient-attention", *CEILINGS),
        "flat": (OURS, "dense"),
        "pooled": (OURS, "dense"),
    },
    "jax": {
        "core": (OURS, "dense", "flax", "memory-efficient-attention", *CEILINGS),
        "flat": (OURS, "dense"),
        "pooled": (OURS, "dense"),
    },
    "tensorflow": {
        "core": (OURS, "dense", *CEILINGS),
        "flat": (OURS, "dense", "keras-mha"),
        "pooled": (OURS, "dense"),
    },
}

# Implementations that run only on cards. Elsewhere they raise an error and are listed as "refused".
ON_CARDS: dict[str, tuple[str, ...]] = {
    "torch": ("sdpa-memory-efficient", "flex-attention"),
    "jax": ("cudnn",),
    "tensorflow": (),
}

# Implementations with N×N arrays. SDPA is one on a CPU, where no fused kernel supports Dv ≠ Dk.
QUADRATIC = frozenset({"dense", "sdpa", "flax", "matmul", "keras-mha"})

# The number of N×N arrays that the dense formula holds at once, measured from its peak at 64×64.
_MAPS = {"forward": 2, "train": 5, "r1": 13}
_LARGEST_MAP = 4 * 2**30

_ONE_BLOCK = 32
"""The largest side whose map is one block of rows, so that both ceilings are the same."""


@dataclass(frozen=True)
class Cell:
    """One entry of the table, measured in every framework.

    Args:
        measure: "time" (all implementations take turns in one process) or "memory" (a process for each).
        level: "core", "flat" or "pooled".
        step: "forward". Or "train", forward and the gradient of a weighted sum of the output. Or "r1", the gradient of the
            squared norm of the input gradient of that sum.
        channels: C. Dk is C/8, and Dv is C (pooled: C/2).
        side: H = W, so N = side².
        only: the implementations that take part. Empty means all of the framework.
    """

    measure: Literal["time", "memory"]
    level: Literal["core", "flat", "pooled"]
    step: Literal["forward", "train", "r1"]
    channels: int
    side: int
    only: tuple[str, ...] = ()

    @property
    def positions(self) -> int:
        """N."""
        return self.side**2

    def implementations(self, framework: str, device: str = "cpu") -> tuple[str, ...]:
        """The implementations of the framework that take part on a device, ours first."""
        names = IMPLEMENTATIONS[framework][self.level]
        if self.level == "core" and not device.startswith("cpu"):
            names += ON_CARDS[framework]
        if self.measure == "memory":
            names = tuple(name for name in names if name not in CEILINGS)
        if self.side <= _ONE_BLOCK:
            names = tuple(name for name in names if name != "matmul-blocks")
        return tuple(name for name in names if not self.only or name in self.only)


@dataclass(frozen=True)
class Mode:
    """The amount and duration of the measurements.

    Args:
        name: part of the names of the result files, unless it is "full".
        cells: the table.
        seconds: time for the repeats of one timing cell, beyond the fewest repeats.
    """

    name: str
    cells: tuple[Cell, ...]
    seconds: float


def too_large(name: str, cell: Cell, available: int | None) -> str | None:
    """Why an implementation with whole maps is not started on a cell, or None if it is.

    Args:
        name: name of the implementation.
        cell: the cell.
        available: free bytes of memory, or None if unknown.

    Example:
        >>> too_large("dense", Cell("memory", "core", "train", 64, 256), None)
        'one map alone is 17.2 GB'
    """
    if name not in QUADRATIC:
        return None
    one = 4 * cell.positions**2
    if one > _LARGEST_MAP:
        return f"one map alone is {one / 1e9:.1f} GB"
    needed = _MAPS[cell.step] * one
    if available is not None and needed > 0.8 * available:
        return f"needs about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free"
    return None


def _cells(
    measure: Literal["time", "memory"],
    level: Literal["core", "flat", "pooled"],
    step: Literal["forward", "train", "r1"],
    channels: tuple[int, ...],
    sides: tuple[int, ...],
    only: tuple[str, ...] = (),
) -> Iterator[Cell]:
    for width in channels:
        for side in sides:
            yield Cell(measure, level, step, width, side, only)


_SMALL = (8, 16, 32)
_PUBLISHED = (OURS, "dense")

MODES = {
    # A full run is for the record, on a quiet machine. It has the cells for the targets and the curves of the plots.
    "full": Mode(
        "full",
        (
            *_cells("time", "core", "forward", (64, 512), (*_SMALL, 64)),
            *_cells("time", "core", "forward", (256,), (64,)),
            *_cells("time", "core", "train", (64,), (*_SMALL, 64, 128)),
            *_cells("time", "core", "train", (256,), (64,)),
            *_cells("time", "core", "train", (512,), (16, 64)),
            *_cells("time", "core", "r1", (64,), (8, 32, 64)),
            *_cells("time", "flat", "forward", (64, 512), (64,)),
            *_cells("time", "flat", "train", (64,), (64,)),
            *_cells("time", "flat", "r1", (64,), (64,)),
            *_cells("time", "pooled", "forward", (64, 512), (64,)),
            *_cells("time", "pooled", "train", (64,), (64,)),
            *_cells("memory", "core", "train", (64,), (64, 128)),
            *_cells("memory", "core", "train", (64,), (32, 256), _PUBLISHED),
            *_cells("memory", "core", "r1", (64,), (64,), _PUBLISHED),
            *_cells("memory", "core", "r1", (64,), (128, 256), (OURS,)),
        ),
        seconds=2.0,
    ),
    # For a quick look while working on the ops. All cells are fast.
    "quick": Mode(
        "quick",
        (
            *_cells("time", "core", "forward", (64, 512), (16, 64)),
            *_cells("time", "core", "train", (64,), (16, 64)),
            *_cells("time", "core", "r1", (64,), (32,)),
            *_cells("time", "flat", "train", (64,), (32,)),
            *_cells("memory", "core", "train", (64,), (64,), _PUBLISHED),
        ),
        seconds=1.0,
    ),
    # For an accelerator, where a process takes longer to start than a cell to run.
    "device": Mode(
        "device",
        (
            *_cells("time", "core", "forward", (64,), (32, 64, 128)),
            *_cells("time", "core", "train", (64, 512), (64,)),
            *_cells("time", "core", "train", (64,), (32, 128)),
            *_cells("time", "core", "r1", (64,), (64, 128)),
            *_cells("time", "flat", "train", (64,), (64,)),
            *_cells("time", "pooled", "train", (64,), (64,)),
            *_cells("memory", "core", "train", (64,), (64, 128), _PUBLISHED),
            *_cells("memory", "core", "r1", (64,), (128, 256), (OURS,)),
        ),
        seconds=1.0,
    ),
    # The same, small enough for the minutes of `make device-check`.
    "device-quick": Mode(
        "device-quick",
        (
            *_cells("time", "core", "forward", (64,), (64,)),
            *_cells("time", "core", "train", (64,), (64, 128)),
            *_cells("time", "core", "r1", (64,), (64,)),
            *_cells("memory", "core", "r1", (64,), (128,), (OURS,)),
        ),
        seconds=0.5,
    ),
    # For the tests: every level, step and measure once, each in a process, at sizes that take no time and whose numbers mean
    # nothing.
    "toy": Mode(
        "toy",
        (
            *_cells("time", "core", "r1", (16,), (8,)),
            *_cells("time", "core", "train", (8,), (40,), ("ours", *CEILINGS)),
            *_cells("time", "flat", "train", (16,), (8,)),
            *_cells("time", "pooled", "forward", (16,), (8,)),
            *_cells("memory", "core", "train", (16,), (12,), (OURS,)),
        ),
        seconds=0.05,
    ),
}
