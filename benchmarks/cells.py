"""The measurements: one table for each mode, and the implementations of each framework."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "ACCOUNTABLE",
    "CEILINGS",
    "DIFFUSE",
    "FRAMEWORKS",
    "GROUPS",
    "IMPLEMENTATIONS",
    "IN_FLOAT32",
    "MODES",
    "OURS",
    "REQUIRES",
    "Cell",
    "Mode",
    "too_large",
]

OURS = "ours"

# Ours on another problem than that of the cell, to be timed in turns with the cell's own.
IN_FLOAT32 = "ours in float32"
DIFFUSE = "ours, diffuse map"

FRAMEWORKS = ("torch", "jax", "tensorflow")

GROUPS = {
    "sizes": "float32 and one sample, from 8×8 to 128×128 (4 minutes)",
    "small": "8×8 to 32×32, with one sample and with sixteen (3 minutes)",
    "peaked": "scores of standard deviation 12, 25 and 50 (3 minutes)",
    "bfloat16": "operands in bfloat16, and layers in mixed precision (5 minutes)",
    "memory": "peak memory (5 minutes)",
}
"""The groups of cells that can be measured on their own, and what is in them.

The minutes are those of one framework on two cores, for a full run. Against another checkout it takes about as long, and
the memory three times as long.
"""

# The modules that the cells of each framework import: the framework, and the library of its layers.
REQUIRES = {"torch": ("torch",), "jax": ("jax", "flax"), "tensorflow": ("tensorflow", "keras")}

# Not attention, but only the products of the step, of whole arrays and of blocks of query rows. The faster of the two is
# a lower bound for every implementation on this framework's matmul.
CEILINGS = ("matmul", "matmul-blocks")

# What the library or the benchmark wrote. A fault in it fails the run, while one in code of others is a result.
ACCOUNTABLE = (OURS, "dense", *CEILINGS)

IMPLEMENTATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    # core: softmax(q kᵀ) v for given q, k, v.
    # flat, pooled: the whole layer, x to y, in the form of most copies and in the form of the authors' code.
    "torch": {
        "core": (
            OURS,
            "dense",
            "dense-compiled",
            "sdpa",
            "flex-attention",
            "memory-efficient-attention",
            *CEILINGS,
        ),
        "flat": (OURS, "dense", "dense-compiled"),
        "pooled": (OURS, "dense", "dense-compiled"),
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
    "torch": ("sdpa-memory-efficient",),
    "jax": ("cudnn",),
    "tensorflow": (),
}

# Implementations with N×N arrays. SDPA is one on a CPU, where no fused kernel supports Dv ≠ Dk.
QUADRATIC = frozenset({"dense", "dense-compiled", "sdpa", "flax", "matmul", "keras-mha"})

# Implementations without a measurement of memory: no attention, or compiled in the first call.
_NOT_WEIGHED = (*CEILINGS, "dense-compiled", "flex-attention")

# The number of N×N arrays that the dense formula holds at once, measured from its peak at 64×64.
_MAPS = {"forward": 2, "train": 5, "r1": 13}
_LARGEST_MAP = 4 * 2**30

_ONE_BLOCK = 32
"""The largest side whose map is one block of rows, so that both ceilings are the same."""

Measure = Literal["time", "memory"]
Level = Literal["core", "flat", "pooled"]
Step = Literal["forward", "train", "r1"]
DType = Literal["float32", "bfloat16"]


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
        batch: B.
        dtype: dtype of the operands of the core. A layer in "bfloat16" has parameters in float32, as mixed precision has.
        logits: standard deviation of the scores. None is the usual one: 2 for the core, and for a layer that of its
            initial weights.
    """

    measure: Measure
    level: Level
    step: Step
    channels: int
    side: int
    only: tuple[str, ...] = ()
    batch: int = 1
    dtype: DType = "float32"
    logits: float | None = None

    @property
    def positions(self) -> int:
        """N."""
        return self.side**2

    @property
    def key(self) -> dict[str, Any]:
        """What names the cell in the file of results: all but `only`."""
        named = dataclasses.asdict(self)
        del named["only"]
        return named

    def __str__(self) -> str:
        words = f"{self.level} {self.step} C = {self.channels} at {self.side}×{self.side}"
        words += f", B = {self.batch}" if self.batch > 1 else ""
        words += f", {self.dtype}" if self.dtype != "float32" else ""
        return words + (f", scores of {self.logits:g}" if self.logits else "")

    def implementations(self, framework: str, device: str = "cpu") -> tuple[str, ...]:
        """The implementations of the framework that take part on a device, ours first."""
        first, *others = IMPLEMENTATIONS[framework][self.level]
        first_again = [IN_FLOAT32] * (self.dtype != "float32") + [DIFFUSE] * bool(self.logits)
        names = (first, *first_again, *others)
        if self.level == "core" and not device.startswith("cpu"):
            names += ON_CARDS[framework]
        if self.measure == "memory":
            names = tuple(name for name in names if name not in _NOT_WEIGHED)
        if self.side <= _ONE_BLOCK:
            names = tuple(name for name in names if name != "matmul-blocks")
        return tuple(name for name in names if not self.only or name in self.only)

    def posed(self, name: str) -> tuple[str, "Cell"]:
        """The implementation behind a name, and the cell whose problem it computes.

        Example:
            >>> Cell("time", "core", "train", 64, 64, dtype="bfloat16").posed("ours in float32")[1].dtype
            'float32'
        """
        if name == IN_FLOAT32:
            return OURS, dataclasses.replace(self, dtype="float32")
        if name == DIFFUSE:
            return OURS, dataclasses.replace(self, logits=1.0)
        return name, self


Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Mode:
    """The amount and duration of the measurements.

    Args:
        name: part of the names of the result files, unless it is "full".
        groups: the table: rows of cells by group. One process times all cells of a row, one cell after the other.
        seconds: time for the repeats of one timing cell, beyond the fewest repeats.
    """

    name: str
    groups: Mapping[str, tuple[Row, ...]]
    seconds: float

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells of all groups."""
        return tuple(cell for rows in self.groups.values() for row in rows for cell in row)


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
    one = 4 * cell.batch * cell.positions**2
    if one > _LARGEST_MAP:
        return f"one map alone is {one / 1e9:.1f} GB"
    needed = _MAPS[cell.step] * one
    if available is not None and needed > 0.8 * available:
        return f"needs about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free"
    return None


def _row(
    measure: Measure,
    level: Level,
    step: Step,
    channels: tuple[int, ...],
    sides: tuple[int, ...],
    only: tuple[str, ...] = (),
    *,
    batches: tuple[int, ...] = (1,),
    dtype: DType = "float32",
    logits: tuple[float | None, ...] = (None,),
) -> Row:
    def cells() -> Iterator[Cell]:
        for width in channels:
            for side in sides:
                for batch in batches:
                    for spread in logits:
                        yield Cell(measure, level, step, width, side, only, batch, dtype, spread)

    return tuple(cells())


def _small(batches: tuple[int, ...], sides: tuple[int, ...]) -> Iterator[Row]:
    """The core and both layers on small maps. The core with one sample is in the group of the sizes."""
    for step in _TRAINED:
        yield _row("time", "core", step, (64,), sides, (OURS, "dense", "matmul"), batches=batches[1:])
        yield _row("time", "flat", step, (64, 512), sides, _PUBLISHED, batches=batches)
        yield _row("time", "pooled", step, (64,), sides, _PUBLISHED, batches=batches)


def _peaked(channels: tuple[int, ...], side: int, spreads: tuple[float, ...]) -> Iterator[Row]:
    """Dense takes part where it is not too slow: on some frameworks it takes thirty times as long as on a diffuse map."""
    steps: tuple[Step, ...] = ("forward", "train", "r1")
    for step in steps:
        for width in channels:
            peers = (OURS, DIFFUSE) if step == "r1" or width > 64 else (OURS, DIFFUSE, "dense")
            yield _row("time", "core", step, (width,), (side,), peers, logits=spreads)
        yield _row("time", "flat", step, channels[:1], (side,), (OURS, DIFFUSE), logits=spreads)


_SMALL = (8, 16, 32)
_TRAINED: tuple[Step, ...] = ("forward", "train")
_PUBLISHED = (OURS, "dense")
_IN_BFLOAT16 = (OURS, IN_FLOAT32, "dense", "sdpa", *CEILINGS)

MODES = {
    # A full run is for the record, on a quiet machine. It has the cells for the targets and the curves of the plots.
    "full": Mode(
        "full",
        {
            "sizes": (
                _row("time", "core", "forward", (64, 512), (*_SMALL, 64)),
                _row("time", "core", "forward", (256,), (64,)),
                _row("time", "core", "train", (64,), (*_SMALL, 64, 128)),
                _row("time", "core", "train", (256,), (64,)),
                _row("time", "core", "train", (512,), (16, 64)),
                _row("time", "core", "r1", (64,), (8, 32, 64)),
                _row("time", "flat", "forward", (64, 512), (64,)),
                _row("time", "flat", "train", (64, 512), (64,)),
                _row("time", "flat", "r1", (64,), (64,)),
                _row("time", "pooled", "forward", (64, 512), (64,)),
                _row("time", "pooled", "train", (64,), (64,)),
            ),
            "small": tuple(_small((1, 16), _SMALL)),
            "peaked": tuple(_peaked((64, 512), 64, (12.0, 25.0, 50.0))),
            "bfloat16": (
                _row("time", "core", "forward", (64, 512), (*_SMALL, 64), _IN_BFLOAT16, dtype="bfloat16"),
                _row("time", "core", "forward", (256,), (64,), _IN_BFLOAT16, dtype="bfloat16"),
                _row("time", "core", "train", (64,), (*_SMALL, 64, 128), _IN_BFLOAT16, dtype="bfloat16"),
                _row("time", "core", "train", (256,), (64,), _IN_BFLOAT16, dtype="bfloat16"),
                _row("time", "core", "train", (512,), (16, 64), _IN_BFLOAT16, dtype="bfloat16"),
                _row("time", "core", "r1", (64, 256, 512), (64,), _IN_BFLOAT16[:3], dtype="bfloat16"),
                _row("time", "flat", "forward", (64,), (16, 64), _IN_BFLOAT16, dtype="bfloat16"),
                _row("time", "flat", "train", (64, 256, 512), (64,), _IN_BFLOAT16, dtype="bfloat16"),
                _row("time", "flat", "r1", (64,), (64,), _IN_BFLOAT16, dtype="bfloat16"),
            ),
            "memory": (
                _row("memory", "core", "train", (64,), (64, 128)),
                _row("memory", "core", "train", (64,), (32, 256), _PUBLISHED),
                _row("memory", "core", "train", (512,), (64,), _PUBLISHED),
                _row("memory", "core", "r1", (64,), (64,), _PUBLISHED),
                _row("memory", "core", "r1", (64,), (128, 256), (OURS,)),
                _row("memory", "core", "train", (64, 512), (64,), _PUBLISHED, dtype="bfloat16"),
                _row("memory", "core", "r1", (64,), (64,), (OURS,), dtype="bfloat16"),
            ),
        },
        seconds=2.0,
    ),
    # For a quick look while working on the ops. All cells are fast.
    "quick": Mode(
        "quick",
        {
            "sizes": (
                _row("time", "core", "forward", (64, 512), (16, 64)),
                _row("time", "core", "train", (64,), (16, 64)),
                _row("time", "core", "r1", (64,), (32,)),
                _row("time", "flat", "train", (64,), (32,)),
            ),
            "small": tuple(_small((1, 16), (16,))),
            "peaked": tuple(_peaked((64,), 64, (25.0,))),
            "bfloat16": (
                _row("time", "core", "train", (64, 512), (64,), _IN_BFLOAT16, dtype="bfloat16"),
                _row("time", "core", "r1", (64,), (64,), _IN_BFLOAT16[:3], dtype="bfloat16"),
                _row("time", "flat", "train", (64,), (64,), _IN_BFLOAT16, dtype="bfloat16"),
            ),
            "memory": (_row("memory", "core", "train", (64,), (64,), _PUBLISHED),),
        },
        seconds=1.0,
    ),
    # For an accelerator, where a process takes longer to start than a cell to run.
    "device": Mode(
        "device",
        {
            "sizes": (
                _row("time", "core", "forward", (64,), (32, 64, 128)),
                _row("time", "core", "train", (64, 512), (64,)),
                _row("time", "core", "train", (64,), (32, 128)),
                _row("time", "core", "r1", (64,), (64, 128)),
                _row("time", "flat", "train", (64,), (64,)),
                _row("time", "pooled", "train", (64,), (64,)),
            ),
            "bfloat16": (
                _row("time", "core", "forward", (64,), (32, 64, 128), dtype="bfloat16"),
                _row("time", "core", "train", (64, 512), (64,), dtype="bfloat16"),
                _row("time", "core", "train", (64,), (32, 128), dtype="bfloat16"),
                _row("time", "core", "r1", (64,), (64, 128), dtype="bfloat16"),
            ),
            "memory": (
                _row("memory", "core", "train", (64,), (64, 128), _PUBLISHED),
                _row("memory", "core", "r1", (64,), (128, 256), (OURS,)),
                _row("memory", "core", "train", (64,), (64, 128), _PUBLISHED, dtype="bfloat16"),
                _row("memory", "core", "r1", (64,), (128, 256), (OURS,), dtype="bfloat16"),
            ),
        },
        seconds=1.0,
    ),
    # The same, small enough for the minutes of `make device-check`.
    "device-quick": Mode(
        "device-quick",
        {
            "sizes": (
                _row("time", "core", "forward", (64,), (64,)),
                _row("time", "core", "train", (64,), (64, 128)),
                _row("time", "core", "r1", (64,), (64,)),
            ),
            "bfloat16": (
                _row("time", "core", "forward", (64,), (64,), dtype="bfloat16"),
                _row("time", "core", "train", (64,), (64, 128), dtype="bfloat16"),
                _row("time", "core", "r1", (64,), (64,), dtype="bfloat16"),
            ),
            "memory": (
                _row("memory", "core", "r1", (64,), (128,), (OURS,)),
                _row("memory", "core", "r1", (64,), (128,), (OURS,), dtype="bfloat16"),
            ),
        },
        seconds=0.5,
    ),
    # For the tests: every level, step, dtype and measure, at sizes that take no time and whose numbers mean nothing.
    "toy": Mode(
        "toy",
        {
            "sizes": (
                (
                    *_row("time", "core", "train", (8,), (40,), (OURS, *CEILINGS)),
                    *_row("time", "core", "r1", (16,), (8,), (OURS, "dense", "memory-efficient-attention")),
                    *_row("time", "flat", "train", (16,), (8,), (*_PUBLISHED, "keras-mha")),
                    *_row("time", "pooled", "forward", (16,), (8,), _PUBLISHED),
                ),
            ),
            "small": (_row("time", "flat", "train", (16,), (8,), _PUBLISHED, batches=(2,)),),
            "peaked": (
                (
                    *_row("time", "core", "r1", (16,), (8,), (OURS, DIFFUSE), logits=(25.0,)),
                    *_row("time", "flat", "train", (16,), (8,), (OURS, DIFFUSE), logits=(25.0,)),
                ),
            ),
            "bfloat16": (
                (
                    *_row("time", "core", "train", (16,), (40,), _IN_BFLOAT16, dtype="bfloat16"),
                    *_row("time", "core", "r1", (16,), (8,), _IN_BFLOAT16, dtype="bfloat16"),
                    *_row("time", "flat", "train", (16,), (8,), _IN_BFLOAT16, dtype="bfloat16"),
                ),
            ),
            "memory": (_row("memory", "core", "train", (16,), (12,), (OURS,)),),
        },
        seconds=0.05,
    ),
}
