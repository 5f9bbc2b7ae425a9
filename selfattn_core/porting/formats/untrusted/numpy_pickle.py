"""Builds numpy arrays from the instructions of a pickle, without numpy's own functions.

Source: numpy/_core/src/multiarray/methods.c (`array_reduce`, `array_setstate`) and descriptor.c (`arraydescr_reduce`).
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.numbers import bits, read_array, stored_bytes
from selfattn_core.porting.formats.tensors import Entry, TensorInfo
from selfattn_core.porting.formats.untrusted.limits import checked_shape

__all__ = [
    "ARRAYS",
    "BUFFERS",
    "DTYPE",
    "JAX",
    "SCALARS",
    "NumpyArray",
    "NumpyType",
    "entry",
    "from_buffer",
    "type_of",
]

ARRAYS = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
SCALARS = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
# A whole array in protocol 5.
BUFFERS = {"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"}
DTYPE = "numpy.dtype"
# An array of JAX has this function, its arguments and the state of its numpy array.
JAX = "jax._src.array._reconstruct_array"
_CODES = {
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "b1": "bool",
    "c8": "complex64",
    "c16": "complex128",
    **{f"{kind}{size}": f"{'u' * (kind == 'u')}int{8 * size}" for kind in "iu" for size in (1, 2, 4, 8)},
}


@dataclass
class NumpyType:
    """A dtype. Its state sets `order` to "<", ">" or "|"."""

    name: str
    order: str = "|"

    def set_state(self, state: Any) -> None:
        """Take the state of the instruction BUILD: the version, the byte order, and the fields of structured dtypes."""
        if isinstance(state, tuple) and len(state) > 1 and isinstance(state[1], str):
            self.order = state[1]


@dataclass
class NumpyArray:
    """An array. Its state sets all of it."""

    shape: Any = ()
    dtype: NumpyType | None = None
    fortran: bool = False
    data: Any = None

    @property
    def has_numbers(self) -> bool:
        """Whether its dtype is numeric, so that it can be a tensor."""
        return self.dtype is not None and bits(self.dtype.name) is not None

    def set_state(self, state: Any) -> None:
        """Take the state of the instruction BUILD: version, shape, dtype, order and bytes."""
        if not isinstance(state, tuple) or len(state) < 4:
            raise PortError("is a damaged pickle (an array without a state)")
        self.shape, dtype, self.fortran, self.data = state[-4:]
        self.dtype = dtype if isinstance(dtype, NumpyType) else None


def type_of(code: Any) -> NumpyType:
    """A dtype by its code, such as "f4", or by its name in ml_dtypes.

    Example:
        >>> type_of("f4").name, type_of("O8").name
        ('float32', 'O8')
    """
    return NumpyType(_CODES.get(str(code), str(code).removeprefix("ml_dtypes.")))


def from_buffer(arguments: tuple[Any, ...]) -> NumpyArray:
    """The array of a call of numpy's `_frombuffer`, with bytes, dtype, shape and order."""
    data, dtype, shape, order = arguments
    whole = bytes(data) if isinstance(data, bytes | bytearray) else None
    return NumpyArray(shape, dtype if isinstance(dtype, NumpyType) else None, order == "F", whole)


def from_state(state: Any) -> NumpyArray:
    """The array with this state."""
    array = NumpyArray()
    array.set_state(state)
    return array


def entry(where: str, array: NumpyArray) -> Entry:
    """An array as a tensor of a file.

    Raises:
        PortError: if it is not numeric, or if the number of its bytes does not fit its shape.
    """
    name = array.dtype.name if array.dtype else "nothing"
    if bits(name) is None or not isinstance(array.data, bytes):
        raise PortError(f"{where}: is an array of {name[:40]}, which is not numeric")
    shape = array.shape if isinstance(array.shape, tuple) else (None,)
    info = TensorInfo(checked_shape(where, shape), name)
    if len(array.data) != stored_bytes(info):
        raise PortError(
            f"{where}: {name} {info.shape} needs {stored_bytes(info)} bytes, there are {len(array.data)}"
        )
    data, fortran = array.data, bool(array.fortran)
    swapped = array.dtype is not None and array.dtype.order == ">"
    flat_info = TensorInfo((math.prod(info.shape),), name)

    def read() -> NDArray[Any]:
        flat = read_array(where, flat_info, _filler(data))
        flat = flat.byteswap() if swapped else flat
        return flat.reshape(info.shape[::-1]).T if fortran else flat.reshape(info.shape)

    return Entry(info, read)


def _filler(data: bytes) -> Callable[[memoryview], None]:
    file = io.BytesIO(data)

    def fill(buffer: memoryview) -> None:
        file.readinto(buffer)

    return fill
