"""One foreign layer of a model and its replacement: the common base of the adapters' `convert`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.conformance.verdicts.tolerance import FACTOR
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats import Tensors
from selfattn_core.porting.networks.conversion import (
    Conversion,
    ConversionError,
    ConvertedLayer,
    Foreign,
    Question,
    agreement,
    apart,
    chosen_dialect,
    compared,
    question,
    read_layer,
    refuse,
    sizes,
)

__all__ = ["DoesNotRunError", "ForeignLayerBase", "Options", "convert_all", "notes_of"]

Key = TypeVar("Key")
Layer = TypeVar("Layer")


class DoesNotRunError(PortError):
    """A layer raised an error on an input. It may run at another size."""


@dataclass(frozen=True)
class Options:
    """The arguments of `convert` that a single layer needs."""

    settings: Mapping[str, str | bool | float]
    keep_spectral_norm: bool
    returns: str
    block_size: int | None
    size: tuple[int, int] | None


class ForeignLayerBase(ABC, Generic[Layer]):
    """One foreign layer that is replaced.

    Args:
        layer: the framework's object.
        names: its names in the model. A layer in several places has several.
        options: the options of the conversion.
    """

    tensors: Tensors
    """The tensors that a file of this layer would contain."""

    def __init__(self, layer: Any, names: tuple[str, ...], options: Options) -> None:
        self.layer, self.names, self.options = layer, names, options
        self.where = f"{names[0] or 'the model'} ({type(layer).__name__})"

    def converted(self, name: str | None) -> tuple[Layer, ConvertedLayer]:
        """The layer that replaces this one, and the report on both.

        Args:
            name: the name of its dialect, or None.

        Raises:
            PortError: if the layer cannot be read or run. A layer that computes something else is in the report.
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
        """The layer of this dialect that replaces it, and the report on both."""

    def _compared(
        self,
        foreign: Foreign,
        answers: Callable[[Question], tuple[Mapping[str, Array], Mapping[str, Array]]],
        *,
        also: tuple[int, int] | None = None,
    ) -> tuple[dict[str, float], dict[str, float], tuple[str, ...], list[str]]:
        """The errors of both layers at every size, the errors beyond the limits, and the sizes at which the old one fails.

        Args:
            foreign: the layer.
            answers: a function that returns the answers of the old layer and of ours.
            also: (H, W) of one more input.

        Raises:
            DoesNotRunError: if the old layer does not run at any size.
            PortError: if it runs, but its result cannot be compared.
        """
        old: dict[str, float] = {}
        new: dict[str, float] = {}
        failures: list[str] = []
        refused: list[tuple[str, DoesNotRunError]] = []
        every = dict.fromkeys((*sizes(foreign.config, self.options.size), *((also,) if also else ())))
        for height, width in every:
            asked = question(foreign, (height, width))
            try:
                theirs, ours = answers(asked)
            except DoesNotRunError as error:
                refused.append((f"{height}×{width}", error))
                continue
            floors = compared(foreign, asked, theirs, ours)
            for kept, found in ((old, floors[0]), (new, floors[1])):
                kept |= {name: max(value, kept.get(name, 0.0)) for name, value in found.items()}
            failures += [f"at {height}×{width} {text}" for text in floors[2]]
        if len(refused) == len(every):
            raise refused[0][1]
        missed = [place for place, _ in refused]
        ran = [place for place in (f"{height}×{width}" for height, width in every) if place not in missed]
        notes = [
            f"it does not run at {place}, but the new one does; both were compared at {' and '.join(ran)}"
            for place in missed
        ]
        return old, new, tuple(failures), notes

    def _differs_in_training(
        self, foreign: Foreign, asked: Question, old: Array, new: Array
    ) -> tuple[str, str]:
        """A failure or a note on outputs in training that differ. One of the two, or both, is ""."""
        floors = apart(foreign, asked, old, new)
        if floors <= 2 * FACTOR:
            return "", ""
        if foreign.config.spectral_norm or foreign.divided:
            return "", (
                f"in training its next output differs by {floors:.2g} noise floors: its spectral norm is updated differently, for example "
                "by several iterations or from another vector"
            )
        if foreign.batch_norm:
            return "", ""
        return (
            f"in training the old layer computes something else ({floors:.2g} noise floors away), for example because of dropout or "
            "noise. Remove that from it"
        ), ""

    def _read(self, tensors: Tensors, dialect: Dialect) -> Foreign:
        options = self.options
        return read_layer(tensors, dialect, options.settings, keep_spectral_norm=options.keep_spectral_norm)

    def _does_not_run(self, shape: tuple[int, ...], error: str) -> DoesNotRunError:
        return DoesNotRunError(
            f"{self.where}: does not run on an input {shape}: {error}. Pass the size that it accepts as size=(H, W). A layer with "
            "several inputs cannot be converted."
        )

    def _map(self, found: Array, foreign: Foreign, asked: Question) -> Array:
        """The second result of the layer as a map (B, N, M)."""
        batch, height, width, _ = asked.x.shape
        down, across = foreign.config.key_grid(height, width)
        shape = (batch, height * width, down * across)
        if found.size != np.prod(shape):
            raise PortError(
                f"{self.where}: returned y and a tensor {found.shape}; expected y and a map of {shape}. Write a layer that calls it and "
                "returns only y, and convert that."
            )
        return found.reshape(shape)


def convert_all(
    layers: Mapping[Key, Callable[[], ForeignLayerBase[Layer]]], dialect: str | None
) -> tuple[dict[Key, Layer], Conversion[Any]]:
    """The replacements of all layers, and the report on all, whose model is None.

    Args:
        layers: the functions that create the foreign layers.
        dialect: as in `convert`.

    Raises:
        ConversionError: if a layer computes something else than its dialect describes.
        PortError: if a layer cannot be read or run, with every reason.
    """
    new: dict[Key, Layer] = {}
    reports: list[ConvertedLayer] = []
    problems: list[str] = []
    for key, foreign in layers.items():
        try:
            new[key], report = foreign().converted(dialect)
            reports.append(report)
        except PortError as error:
            problems.append(str(error))
    refuse(problems)
    done = Conversion[Any](None, tuple(reports))
    if not done.passed:
        raise ConversionError(done)
    return new, done


def notes_of(foreign: Foreign, new: Mapping[str, Array], *, dropped_map: bool) -> list[str]:
    """Notes on the values of a new layer.

    Args:
        foreign: the foreign layer as its dialect reads it.
        new: the arrays of the new layer, by canonical name.
        dropped_map: whether the foreign layer returned (y, A) and the new one does not.
    """
    notes = []
    if foreign.made:
        notes.append(f"{', '.join(foreign.made)}: not in the old layer, and training does not change them")
    if foreign.divided:
        notes.append("the kernels are divided by their spectral norms, which training no longer limits")
    rounded = [name for name, array in new.items() if (array != foreign.params[name]).any()]
    if rounded:
        notes.append(f"{', '.join(rounded)}: rounded to the dtype of the old layer")
    if dropped_map:
        notes.append("the old layer returned (y, A), and the new one returns y: change its callers")
    return notes
