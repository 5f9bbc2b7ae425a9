"""The header of an `.npy` file: what is promised about the array, before anything is taken for it."""

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
"""Bytes within which a header ends; numpy itself reads none of more than 10,000."""


@dataclass(frozen=True)
class NpyHeader:
    """What an array is said to be.

    Args:
        shape: of it.
        fortran: whether its first axis is the fastest in the file.
        dtype: of it, Python objects and records too.
        size: bytes of the header, after which the numbers begin.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[np.generic]
    size: int


def npy_header(where: str, start: bytes) -> NpyHeader:
    """The header that a file begins with.

    Args:
        where: the file, for messages.
        start: its first bytes, `LONGEST_HEADER` of them or all.

    Raises:
        PortError: if there is none of numpy's, or its shape is none that an array can have.

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
    # What numpy's parser of the header, which is Python's own, raises on nonsense.
    except (
        ValueError,
        KeyError,
        TypeError,
        SyntaxError,
        RecursionError,
        MemoryError,
        tokenize.TokenError,
        # Where warnings are errors: numpy warns of a header that Python 2 wrote.
        UserWarning,
    ) as error:
        raise PortError(f"{where}: its header is not numpy's ({str(error)[:200]})") from None
    return NpyHeader(checked_shape(where, shape), fortran, dtype, file.tell())


def dtype_name(dtype: np.dtype[np.generic]) -> str | None:
    """The name of a dtype of ours; bfloat16 is saved by numpy as two bytes of nothing.

    Example:
        >>> [dtype_name(np.dtype(stored)) for stored in (">f4", "V2", "U3")]
        ['float32', 'bfloat16', None]
    """
    if dtype.fields is not None or dtype.subdtype is not None:
        return None
    if dtype.kind == "V" and dtype.itemsize == 2:
        return "bfloat16"
    return dtype.name if dtype.kind in "biufc" and bits(dtype.name) else None
