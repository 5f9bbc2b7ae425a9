"""Arrays that are made when they are asked for, and not kept: a port holds one at a time."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

__all__ = ["LazyArrays"]

Array = NDArray[Any]


class LazyArrays(Mapping[str, Array]):
    """Arrays by name, each made anew at every access.

    Args:
        makers: what makes each, by name.

    Example:
        >>> import numpy as np
        >>> LazyArrays({"ones": lambda: np.ones(2)})["ones"]
        array([1., 1.])
    """

    def __init__(self, makers: Mapping[str, Callable[[], Array]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Array:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        # The mixin would make the array.
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
