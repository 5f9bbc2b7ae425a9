"""The size of query blocks, and the checks of the operands, without a framework."""

import operator
from collections.abc import Sequence

__all__ = [
    "ACCELERATORS",
    "ACCELERATOR_BUDGET",
    "MINIMUM_ROWS",
    "SCORE_BUDGET",
    "block_rows",
    "check_block_size",
    "check_operands",
    "score_budget",
]

SCORE_BUDGET = 8 * 2**20
"""Bytes of one float32 score buffer that the automatic choice aims at, on a CPU and on unknown devices."""

MINIMUM_ROWS = 128
"""The fewest query rows in a block of the automatic choice. With fewer, products are slow."""


ACCELERATORS = frozenset({"cuda", "gpu", "mps", "rocm", "tpu", "xpu"})
"""Kinds of device, as the frameworks name them, that need larger products than a CPU to be busy."""

ACCELERATOR_BUDGET = 64 * 2**20
"""The largest score buffer on an accelerator, in bytes. No card has been measured."""

_MOST_BUFFERS = 16
"""More score buffers than any step holds at once. Second derivatives hold 13."""


def score_budget(kind: str, batch: int, rows: int, keys: int, dtype: str = "float32") -> int:
    """Bytes of one float32 score buffer that the automatic choice aims at. It depends on the arguments alone.

    On an accelerator the buffer grows with the map. All buffers of a step together stay smaller than one map.

    Args:
        kind: the framework's name for the kind of device, without a number. An unknown kind counts as a CPU.
        batch: B, the product of the leading axes.
        rows: N, query positions.
        keys: M, key positions.
        dtype: dtype of the operands. Scores in float64 take twice the memory.

    Example:
        >>> [score_budget(kind, 1, 128 * 128, 128 * 128) // 2**20 for kind in ("cpu", "cuda")]
        [8, 64]
        >>> score_budget("cuda", 1, 64 * 64, 64 * 64) // 2**20
        8
    """
    if kind not in ACCELERATORS:
        return SCORE_BUDGET
    budget = min(ACCELERATOR_BUDGET, 4 * batch * rows * keys // _MOST_BUFFERS)
    return max(SCORE_BUDGET, budget // 2 if dtype == "float64" else budget)


def block_rows(block_size: int | None, batch: int, rows: int, keys: int, budget: int | None = None) -> int:
    """Query rows in a block. The number depends on sizes alone, never on free memory or on data.

    Args:
        block_size: the caller's choice in query rows, or None for the largest block within the budget.
        batch: B, the product of the leading axes.
        rows: N, query positions.
        keys: M, key positions.
        budget: bytes, from `score_budget`; by default `SCORE_BUDGET`.

    Returns:
        A number from 1 to max(N, 1).

    Raises:
        ValueError: if `block_size` is neither None nor a positive integer.

    Example:
        >>> block_rows(None, batch=1, rows=4096, keys=4096)
        512
        >>> block_rows(None, batch=1, rows=64, keys=64)
        64
    """
    wanted = check_block_size(block_size)
    if wanted is None:
        budget = SCORE_BUDGET if budget is None else budget
        wanted = max(MINIMUM_ROWS, budget // (4 * max(batch, 1) * max(keys, 1)))
    return max(1, min(rows, wanted))


def check_block_size(block_size: int | None) -> int | None:
    """The block size as a plain int, or None for the automatic choice.

    Args:
        block_size: query rows that are computed at a time.

    Raises:
        ValueError: if `block_size` is neither None nor a positive integer.

    Example:
        >>> check_block_size(256)
        256
    """
    if block_size is None:
        return None
    try:
        rows = 0 if isinstance(block_size, bool) else operator.index(block_size)
    except TypeError:
        rows = 0
    if rows < 1:
        raise ValueError(
            f"block_size={block_size!r} must be a positive integer (query rows a block), or None to choose by size."
        )
    return rows


def check_operands(
    query: Sequence[int | None],
    key: Sequence[int | None],
    value: Sequence[int | None],
    *,
    dtypes: Sequence[object],
    devices: Sequence[object] = (),
) -> None:
    """Refuse operands of `attend` that do not belong together.

    Args:
        query: shape (…, N, Dk), with None for a size that is not known yet.
        key: shape (…, M, Dk).
        value: shape (…, M, Dv).
        dtypes: the three dtypes.
        devices: the three devices, if the framework has them.

    Raises:
        ValueError: if the operands do not fit each other. It lists every mismatch.

    Example:
        >>> check_operands((2, 6, 4), (2, 5, 3), (2, 5, 8), dtypes=("float32",) * 3)
        Traceback (most recent call last):
        ...
        ValueError: attend: got query (2, 6, 4), key (2, 5, 3), value (2, 5, 8); expected query (…, N, Dk), key (…, M, Dk), value (…, M, Dv): query has width 4 and key 3.
    """
    shapes = {"query": tuple(query), "key": tuple(key), "value": tuple(value)}
    received = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    problems = []
    if any(len(shape) < 2 for shape in shapes.values()) or len({len(shape) for shape in shapes.values()}) > 1:
        problems.append("the three should have one rank, of at least 2")
    else:
        if _differ(query[-1], key[-1]):
            problems.append(f"query has width {query[-1]} and key {key[-1]}")
        if _differ(key[-2], value[-2]):
            problems.append(f"key has {key[-2]} positions and value {value[-2]}")
        leading = [shape[:-2] for shape in shapes.values()]
        if any(_differ(*pair) for other in leading[1:] for pair in zip(leading[0], other, strict=True)):
            problems.append("the leading axes should be equal")
    if len(set(dtypes)) > 1:
        problems.append(f"dtypes {', '.join(map(str, dtypes))} should be one: cast the operands first")
    if len(set(devices)) > 1:
        problems.append(f"devices {', '.join(map(str, devices))} should be one: move the operands first")
    if problems:
        raise ValueError(
            f"attend: got {received}; expected query (…, N, Dk), key (…, M, Dk), value (…, M, Dv): {'; '.join(problems)}."
        )


def _differ(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one != other
