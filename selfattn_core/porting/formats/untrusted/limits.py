"""The limits of a reader of untrusted files.

Listing a file allocates at most a fixed multiple of its header, and never more than these limits. A tensor is allocated only
after a check that the file has that many bytes.
"""

from collections.abc import Sequence

from selfattn_core.arrays import declared_shape
from selfattn_core.files.safetensors import LONGEST_HEADER
from selfattn_core.porting.errors import PortError

__all__ = [
    "MAX_DEPTH",
    "MAX_EXPANSION",
    "MAX_HEADER",
    "MAX_TENSORS",
    "SMALL",
    "checked_shape",
]

# The largest header, pickle or index in bytes, the same in every format.
MAX_HEADER = LONGEST_HEADER
# The number of tensors and other values in a file.
MAX_TENSORS = 200_000
# The levels of nested folders, groups and dicts.
MAX_DEPTH = 32
# Compressed bytes may grow by this factor, or to this number of bytes.
MAX_EXPANSION = 200
SMALL = 16 * 2**20


def checked_shape(where: str, shape: Sequence[object]) -> tuple[int, ...]:
    """Check that an array can have the shape that a file declares.

    Raises:
        PortError: if an axis is not a non-negative integer, if there are too many axes, or if the array is too large.

    Example:
        >>> checked_shape("x.npz: gamma", [1])
        (1,)
        >>> checked_shape("x.npz: gamma", [-1])
        Traceback (most recent call last):
        ...
        selfattn_core.porting.errors.PortError: x.npz: gamma: the shape [-1] is not one of an array.
    """
    axes = declared_shape(shape)
    if axes is None:
        raise PortError(f"{where}: the shape {str(list(shape))[:200]} is not one of an array.")
    return axes
