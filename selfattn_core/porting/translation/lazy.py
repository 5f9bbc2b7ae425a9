"""Arrays that are computed at every access and not kept, so that a port holds one at a time."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from selfattn_core.arrays import Array

__all__ = ["LazyArrays", "Mark", "MarkedArrays", "checksum", "mark"]


class Mark(NamedTuple):
    """A mark that two arrays share if they are equal bit for bit. It compares arrays that are not in memory."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    sha256: str


def checksum(array: Array) -> str:
    """The sha256 of an array's bytes in C order.

    Example:
        >>> checksum(np.zeros(1, np.float32))[:8]
        'df3f6198'
    """
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def mark(array: Array) -> Mark:
    """The mark of an array."""
    return Mark(array.dtype, array.shape, checksum(array))


class LazyArrays(Mapping[str, Array]):
    """Arrays by name. Each is computed at every access.

    Args:
        makers: the functions that compute the arrays, by name.

    Example:
        >>> LazyArrays({"ones": lambda: np.ones(2)})["ones"]
        array([1., 1.])
    """

    def __init__(self, makers: Mapping[str, Callable[[], Array]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Array:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        # The mixin would compute the array.
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class MarkedArrays(LazyArrays):
    """Lazy arrays that keep the mark of each array from its first access.

    Example:
        >>> arrays = MarkedArrays({"ones": lambda: np.ones(2)})
        >>> arrays.mark("ones") == mark(arrays["ones"])
        True
    """

    def __init__(self, makers: Mapping[str, Callable[[], Array]]) -> None:
        super().__init__(makers)
        self._marks: dict[str, Mark] = {}

    def __getitem__(self, name: str) -> Array:
        array = super().__getitem__(name)
        if name not in self._marks:
            self._marks[name] = mark(array)
        return array

    def mark(self, name: str) -> Mark:
        """The mark of an array. The array is computed if it has no mark yet."""
        if name not in self._marks:
            self[name]
        return self._marks[name]
