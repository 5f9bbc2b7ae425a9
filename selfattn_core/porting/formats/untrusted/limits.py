"""How much a reader takes from a file that it does not trust, before the tensors that are asked for.

Listing a file allocates at most a fixed multiple of what is really in its header, and no more than these bounds; a tensor
is allocated only when the file has been seen to hold that many bytes.
"""

import math
from collections.abc import Sequence

from selfattn_core.porting.errors import PortError

__all__ = [
    "MAX_DEPTH",
    "MAX_EXPANSION",
    "MAX_HEADER",
    "MAX_RANK",
    "MAX_TENSORS",
    "SMALL",
    "checked_shape",
]

# Bytes of a header, a pickle or an index that are parsed. A network of ten thousand tensors needs about one MiB.
MAX_HEADER = 32 * 2**20
# Tensors and other values of a file.
MAX_TENSORS = 200_000
# Levels of nested folders, groups and dicts.
MAX_DEPTH = 32
# Axes; numpy's own limit is 64.
MAX_RANK = 32
# What compressed bytes may grow to: this many times, or to this many bytes.
MAX_EXPANSION = 200
SMALL = 16 * 2**20


def checked_shape(where: str, shape: Sequence[object]) -> tuple[int, ...]:
    """A shape that a file promises, once it is one that an array can have.

    Raises:
        PortError: if an axis is no non-negative integer, or there are more than an array can have.

    Example:
        >>> checked_shape("x.npz: gamma", [1])
        (1,)
        >>> checked_shape("x.npz: gamma", [-1])
        Traceback (most recent call last):
        ...
        selfattn_core.porting.errors.PortError: x.npz: gamma: the shape [-1] is not one of an array.
    """
    axes = tuple(axis for axis in shape if isinstance(axis, int) and not isinstance(axis, bool) and axis >= 0)
    if len(axes) != len(shape) or len(axes) > MAX_RANK or math.prod(axis or 1 for axis in axes) >= 2**62:
        raise PortError(f"{where}: the shape {str(list(shape))[:200]} is not one of an array.")
    return axes
