"""The common interface of the implementations in every framework."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RefusedError", "Step"]


class RefusedError(Exception):
    """An implementation cannot compute this cell. The message contains the reason."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Step:
    """One implementation, ready to compute one cell.

    Args:
        run: maps the weights w, an array of the framework, to the answers by name. Returns when they are computed.
        to_numpy: turns the answers into numpy arrays, with the names and shapes of `Problem.check`.
        compile: prepares everything that needs no computation.
    """

    run: Callable[[Any], Any]
    to_numpy: Callable[[Any], Mapping[str, NDArray[np.float32]]]
    compile: Callable[[], None] = _nothing
