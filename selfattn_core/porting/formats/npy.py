"""Reads the header of an `.npy` file, before any memory is reserved for the array."""

import tokenize
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.lib import format as npy

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.numbers import bits
from selfattn_core.porting.formats.untrusted.limits import checked_shape

__all__ = ["LONGEST_HEADER", "NpyHeader", "dtype_name", "npy_header"]

LONGEST_HEADER = 2**16
"""The largest header in bytes. numpy itself reads at most 10,000."""


@dataclass(frozen=True)
class NpyHeader:
    """What the header declares about an array.

    Args:
        shape: the shape.
        fortran: whether the first axis varies fastest in the file.
        dtype: the dtype, which may be Python objects or records.
        size: the bytes of the header. The numbers begin after them.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[np.generic]
    size: int


def npy_header(where: str, start: bytes) -> NpyHeader:
    """Read the header at the beginning of a file.

    Args:
        where: the file, for messages.
        start: the first `LONGEST_HEADER` bytes of the file, or all of it.

    Raises:
        PortError: if it is not a header of numpy, or if its shape is impossible.

    Example:
        >>> file = BytesIO()
        >>> np.save(file, np.ones((3, 5), np.float16))
        >>> npy_header("x.npy", file.getvalue())
        NpyHeader(shape=(3, 5), fortran=False, dtype=dtype('float16'), size=128)
    """
    file = BytesIO(start)
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    # numpy parses the header with Python's own parser, which raises these on nonsense.
    except (
        ValueError,
        KeyError,
        TypeError,
        SyntaxError,
        RecursionError,
        MemoryError,
        tokenize.TokenError,
        # numpy warns about a header that Python 2 wrote, and a warning may be an error.
        UserWarning,
    ) as error:
        raise PortError(f"{where}: its header is not numpy's ({str(error)[:200]})") from None
    return NpyHeader(checked_shape(where, shape), fortran, dtype, file.tell())


def dtype_name(dtype: np.dtype[np.generic]) -> str | None:
    """The name of a dtype, None if it is not numeric. numpy saves bfloat16 as two bytes without a type.

    Example:
        >>> [dtype_name(np.dtype(stored)) for stored in (">f4", "V2", "U3")]
        ['float32', 'bfloat16', None]
    """
    if dtype.fields is not None or dtype.subdtype is not None:
        return None
    if dtype.kind == "V" and dtype.itemsize == 2:
        return "bfloat16"
    return dtype.name if dtype.kind in "biufc" and bits(dtype.name) else None
