"""What a runtime makes of an exported file: what goes in, what comes out, and a function between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

__all__ = ["Artifact", "Tensor"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """An input or an output of a file.

    Args:
        name: in the file.
        dtype: as numpy spells it; "bfloat16" too.
        shape: sizes of the axes, None where a size is open; None as a whole where the file does not say.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        sizes = (
            "of any shape"
            if self.shape is None
            else f"({', '.join('?' if size is None else str(size) for size in self.shape)})"
        )
        return f"{self.name} {self.dtype} {sizes}"


@dataclass(frozen=True)
class Artifact:
    """A file that its runtime has opened.

    Args:
        inputs: all of them.
        outputs: all of them.
        run: from x, in the dtype and layout of the file, and the names of an input and of some outputs, to these outputs.
        versions: of the runtime.
        formats: dtypes that weights are stored in or products computed in, as far as the runtime tells.
        notes: what a reader of the report has to know about this run.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    run: Callable[[Array, str, tuple[str, ...]], list[Array]]
    versions: Mapping[str, str]
    formats: frozenset[str] = frozenset()
    notes: tuple[str, ...] = field(default=())
