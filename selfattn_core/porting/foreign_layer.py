"""One foreign layer of a model on its way to ours: what the adapters' `convert` have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from selfattn_core.porting.converting import (
    ConvertedLayer,
    Foreign,
    Question,
    agreement,
    chosen_dialect,
    read_layer,
)
from selfattn_core.porting.dialects import Dialect
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.readers import Tensors

__all__ = ["ForeignLayerBase", "Options", "notes_of"]

Array = NDArray[Any]
Layer = TypeVar("Layer")


@dataclass(frozen=True)
class Options:
    """The arguments of `convert` that a single layer needs."""

    settings: Mapping[str, str | bool | float]
    keep_spectral_norm: bool
    returns: str
    block_size: int | None
    size: tuple[int, int] | None


class ForeignLayerBase(ABC, Generic[Layer]):
    """One layer that is to be replaced.

    Args:
        layer: the framework's object.
        names: of every place where it stands.
        options: of the conversion.
    """

    tensors: Tensors
    """What a file of the layer alone would hold."""

    def __init__(self, layer: Any, names: tuple[str, ...], options: Options) -> None:
        self.layer, self.names, self.options = layer, names, options
        self.where = f"{names[0] or 'the model'} ({type(layer).__name__})"

    def converted(self, name: str | None) -> tuple[Layer, ConvertedLayer]:
        """The layer that takes its place, and what there is to say of both.

        Args:
            name: of its dialect; None if nobody said.

        Raises:
            PortError: if it cannot be read or asked. One that computes something else is in the report.
        """
        chosen = chosen_dialect(name, self.tensors, self._agrees)
        new, report = self._twin(chosen)
        if report.failures and (hint := agreement(chosen, self.tensors, self._agrees)):
            report = replace(report, failures=(*report.failures, hint))
        return new, report

    def _agrees(self, dialect: Dialect) -> bool:
        try:
            return not self._twin(dialect)[1].failures
        except PortError:
            return False

    @abstractmethod
    def _twin(self, dialect: Dialect) -> tuple[Layer, ConvertedLayer]:
        """The layer of this dialect that takes its place, and the report on both."""

    def _read(self, tensors: Tensors, dialect: Dialect) -> Foreign:
        options = self.options
        return read_layer(tensors, dialect, options.settings, keep_spectral_norm=options.keep_spectral_norm)

    def _does_not_run(self, shape: tuple[int, ...], error: str) -> PortError:
        return PortError(
            f"{self.where}: does not run on an input {shape}: {error}. Pass the size that it takes as size=(H, W); a layer that takes "
            "more than one input cannot be converted."
        )

    def _map(self, found: Array, foreign: Foreign, asked: Question) -> Array:
        """What it returned beside y, as (B, N, M)."""
        batch, height, width, _ = asked.x.shape
        down, across = foreign.config.key_grid(height, width)
        shape = (batch, height * width, down * across)
        if found.size != np.prod(shape):
            raise PortError(
                f"{self.where}: returned y and a tensor {found.shape}; expected y and a map of {shape}. Put a layer of your own around "
                "it that returns y alone, and convert that."
            )
        return found.reshape(shape)


def notes_of(foreign: Foreign, new: Mapping[str, Array], *, dropped_map: bool) -> list[str]:
    """What there is to say of the numbers of the layer that takes a foreign one's place.

    Args:
        foreign: the layer as its dialect reads it.
        new: arrays of ours by canonical name.
        dropped_map: whether the foreign layer returned (y, A), and ours does not.
    """
    notes = []
    if foreign.made:
        notes.append(f"{', '.join(foreign.made)}: the old layer has none, and training does not change them")
    if any("÷" in step for origin in foreign.origins.values() for step in origin.steps):
        notes.append("the kernels are divided by their spectral norms, which training no longer limits")
    rounded = [name for name, array in new.items() if (array != foreign.params[name]).any()]
    if rounded:
        notes.append(f"{', '.join(rounded)}: rounded to the dtype of the old layer")
    if dropped_map:
        notes.append("the old layer returned (y, A), and the new one returns y: change what calls it")
    return notes
