"""What the cases of every framework are made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RefusedError", "Step"]


class RefusedError(Exception):
    """An implementation does not take this cell; the message says why."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Step:
    """One implementation, ready to compute one cell.

    Args:
        run: the weights w, as an array of the framework, to the answers by name; returns when they are computed.
        to_numpy: the answers as numpy arrays, under the names and in the shapes that `Problem.check` knows.
        compile: does beforehand what can be done without computing anything.
    """

    run: Callable[[Any], Any]
    to_numpy: Callable[[Any], Mapping[str, NDArray[np.float32]]]
    compile: Callable[[], None] = _nothing
