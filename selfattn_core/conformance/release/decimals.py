"""Numbers for arrays of dtype object. With them the spec computes the same bits on every machine.

numpy uses the BLAS for sums and the processor's vector units for functions, so the last bits of a float64 result differ
between machines. `decimal` uses integer arithmetic. Fifty digits of it, rounded once to float64, are the same on every
machine and correct to the last bit. `Single` is float32 arithmetic in one fixed order. It measures the size of float32
errors.
"""

import decimal
import math
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import numpy as np

from selfattn_core.arrays import Array

__all__ = ["DIGITS", "Single", "fifty_digits", "to_decimals", "to_floats", "to_singles"]


DIGITS = 50


@contextmanager
def fifty_digits() -> Iterator[None]:
    """A context in which decimals have `DIGITS` digits, independent of the caller's context."""
    context = decimal.Context(prec=DIGITS, rounding=decimal.ROUND_HALF_EVEN)
    with decimal.localcontext(context):
        yield


class Single:
    """A float32 number whose operations are all rounded correctly.

    Sums, products, quotients and roots of float32 values are computed in float64 and then rounded. As float64 has more than
    twice the digits, this equals rounding once.

    Args:
        value: a number that float32 can represent.

    Example:
        >>> float(Single(16777216.0) + Single(1.0))
        16777216.0
    """

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value

    def __add__(self, other: "Single | float") -> "Single":
        value = _value(other)
        return NotImplemented if value is None else _rounded(self.value + value)

    def __sub__(self, other: "Single | float") -> "Single":
        value = _value(other)
        return NotImplemented if value is None else _rounded(self.value - value)

    def __rsub__(self, other: "Single | float") -> "Single":
        value = _value(other)
        return NotImplemented if value is None else _rounded(value - self.value)

    def __mul__(self, other: "Single | float") -> "Single":
        value = _value(other)
        return NotImplemented if value is None else _rounded(self.value * value)

    def __truediv__(self, other: "Single | float") -> "Single":
        value = _value(other)
        return NotImplemented if value is None else _rounded(self.value / value)

    __radd__ = __add__
    __rmul__ = __mul__

    def __abs__(self) -> "Single":
        return Single(abs(self.value))

    def __lt__(self, other: "Single | float") -> bool:
        value = _value(other)
        return NotImplemented if value is None else self.value < value

    def __gt__(self, other: "Single | float") -> bool:
        value = _value(other)
        return NotImplemented if value is None else self.value > value

    def __le__(self, other: "Single | float") -> bool:
        value = _value(other)
        return NotImplemented if value is None else self.value <= value

    def __ge__(self, other: "Single | float") -> bool:
        value = _value(other)
        return NotImplemented if value is None else self.value >= value

    def __eq__(self, other: object) -> bool:
        return self.value == _value(other)

    def __hash__(self) -> int:
        return hash(self.value)

    def sqrt(self) -> "Single":
        """The square root. numpy's `sqrt` calls it on arrays of dtype object."""
        return _rounded(math.sqrt(self.value))

    def exp(self) -> "Single":
        """The exponential, computed with fifty digits. numpy's `exp` calls it on arrays of dtype object."""
        with fifty_digits():
            return _rounded(float(Decimal(self.value).exp()))

    def log(self) -> "Single":
        """The natural logarithm, computed with fifty digits. numpy's `log` calls it on arrays of dtype object."""
        with fifty_digits():
            return _rounded(float(Decimal(self.value).ln()))


def to_decimals(array: Array) -> Array:
    """The same values as decimals, exactly.

    Args:
        array: an array of float32 or float64 values.

    Example:
        >>> to_decimals(np.array([0.5]))[0]
        Decimal('0.5')
    """
    return _objects(array, Decimal)


def to_singles(array: Array) -> Array:
    """The same values as `Single`s.

    Args:
        array: an array of values that float32 can represent.
    """
    return _objects(array, Single)


def to_floats(array: Array) -> Array:
    """Decimals or `Single`s rounded to float64.

    Args:
        array: an array of dtype object.

    Example:
        >>> to_floats(to_decimals(np.array([0.1])) + to_decimals(np.array([0.2])))
        array([0.3])
    """
    return np.array([float(value) for value in array.flat], np.float64).reshape(array.shape)


def _objects(array: Array, number: Any) -> Array:
    objects = np.empty(array.shape, object)
    objects.ravel()[:] = [number(float(value)) for value in array.flat]
    return objects


def _value(number: object) -> float | None:
    """The float32 value of a number. None for other objects, such as arrays, which then handle the operation themselves."""
    if type(number) is Single:
        return number.value
    # Zeros that numpy creates, the factors 2 in the spec, and its constants. numpy rounds these in the same way.
    return float(np.float32(number)) if isinstance(number, int | float) else None


def _rounded(value: float) -> "Single":
    return Single(float(np.float32(value)))
