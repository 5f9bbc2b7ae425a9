"""Reads the numbers of a tensor from a file. Narrow floats become float32."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from selfattn_core.arrays import Array
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.tensors import TensorInfo

__all__ = ["bits", "decode", "read_array", "stored_bytes"]

ReadInto = Callable[[memoryview], None]

_NUMPY = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
# Floats that numpy does not have and that float32 represents exactly.
_NARROW = {"bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}
# Dtypes that are listed and never read.
_OPAQUE = {
    "float4_e2m1fn": 4,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
    "float8_e8m0fnu": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2fnuz": 8,
}
_PIECE = 2**20


def bits(dtype: str) -> int | None:
    """The bits of one number, or None for an unknown dtype.

    Example:
        >>> bits("float32"), bits("float4_e2m1fn"), bits("object")
        (32, 4, None)
    """
    if dtype in _NUMPY:
        return _NUMPY[dtype].itemsize * 8
    return _NARROW.get(dtype) or _OPAQUE.get(dtype)


def stored_bytes(info: TensorInfo) -> int:
    """The bytes of a tensor of a known dtype in a file.

    Example:
        >>> stored_bytes(TensorInfo((3, 5), "float16"))
        30
    """
    return (math.prod(info.shape) * (bits(info.dtype) or 0) + 7) // 8


def read_array(where: str, info: TensorInfo, read_into: ReadInto) -> Array:
    """Read a tensor's values without a second copy.

    Args:
        where: file and tensor, for messages.
        info: shape and stored dtype. The caller has checked that the file has enough bytes.
        read_into: fills a buffer with the next bytes of the file, or raises EOFError.

    Returns:
        A new array. bfloat16 and 8-bit floats become float32.

    Raises:
        PortError: if numpy cannot hold the dtype.

    Example:
        >>> from io import BytesIO
        >>> file = BytesIO(bytes([0xC0, 0x3F]))
        >>> def read_into(buffer):
        ...     file.readinto(buffer)
        >>> read_array("x", TensorInfo((1,), "bfloat16"), read_into)
        array([1.5], dtype=float32)
    """
    if info.dtype in _NUMPY:
        array = np.empty(info.shape, _NUMPY[info.dtype].newbyteorder("<"))
        if array.size:
            read_into(array.reshape(-1).view(np.uint8).data)
        return array.astype(_NUMPY[info.dtype], copy=False)
    if info.dtype not in _NARROW:
        raise PortError(
            f"{where}: {info.dtype} numbers cannot be read. Convert the tensor to float32, float16 or bfloat16 in its framework."
        )
    wide = np.empty(math.prod(info.shape), np.float32)
    size = _NARROW[info.dtype] // 8
    for start in range(0, wide.size, _PIECE):
        piece = wide[start : start + _PIECE]
        raw = np.empty(piece.size * size, np.uint8)
        read_into(raw.data)
        piece[...] = decode(raw, info.dtype)
    return wide.reshape(info.shape)


def decode(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """The bytes of narrow floats as float32.

    Example:
        >>> decode(np.array([0x38, 0x7E], np.uint8), "float8_e4m3fn")
        array([  1., 448.], dtype=float32)
    """
    if dtype == "bfloat16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "float8_e5m2":
        # Its bits are the upper half of a float16.
        return (raw.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    return _e4m3fn()[raw]


@cache
def _e4m3fn() -> NDArray[np.float32]:
    """All numbers with 4 exponent bits (bias 7) and 3 mantissa bits. There is no infinity, and one NaN of each sign."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values = np.where(codes & 128, -values, values)
    values[(codes & 127) == 127] = np.nan
    return values.astype(np.float32)
