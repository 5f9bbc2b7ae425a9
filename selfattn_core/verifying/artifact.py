"""An exported file as its runtime opened it: inputs, outputs and a function to run it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from selfattn_core.arrays import Array

__all__ = ["Artifact", "Tensor"]


@dataclass(frozen=True)
class Tensor:
    """An input or an output of a file.

    Args:
        name: name in the file.
        dtype: numpy's name of the dtype, or "bfloat16".
        shape: sizes of the axes, with None for an open size. None if the file does not contain the shape.
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
        inputs: all inputs.
        outputs: all outputs.
        run: maps x, in the dtype and layout of the file, the name of an input and the names of outputs to these outputs.
        versions: versions of the runtime.
        formats: dtypes of stored weights and of products, if the runtime provides them.
        notes: notes about this run for the reader of the report.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    run: Callable[[Array, str, tuple[str, ...]], list[Array]]
    versions: Mapping[str, str]
    formats: frozenset[str] = frozenset()
    notes: tuple[str, ...] = field(default=())
