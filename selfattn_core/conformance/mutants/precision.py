"""Mutants of float64: layers that compute one of their answers in float32 and return it as float64."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.mutants.behaviour import KnowsItsForms
from selfattn_core.conformance.mutants.mutant import Mutant, named
from selfattn_core.conformance.protocol import METHODS, Ability
from selfattn_core.conformance.reference import Model, Reference

__all__ = ["MUTANTS"]

Condition = Callable[[Model], bool]


def _narrow(model: Model) -> Model:
    return replace(model, params={name: array.astype(np.float32) for name, array in model.params.items()})


def _as(dtype: Any, found: Any) -> Any:
    """Answers of any form, with arrays in a dtype."""
    if isinstance(found, Mapping):
        return {name: _as(dtype, value) for name, value in found.items()}
    if isinstance(found, tuple):
        return tuple(_as(dtype, value) for value in found)
    return found.astype(dtype) if isinstance(found, np.ndarray) else found


class ComputesInFloat32(Reference):
    """Computes what one method returns in float32.

    Args:
        ability: the ability of the method.
        where: for which layers. By default for all.
    """

    def __init__(self, ability: Ability, where: Condition) -> None:
        super().__init__()
        method = METHODS[ability]
        right = getattr(self, method)

        def wrong(model: Model, *given: Any) -> Any:
            if not where(model):
                return right(model, *given)
            found = _as(model.params["gamma"].dtype, right(_narrow(model), *given))
            if ability != "spectral_norm":
                return found
            # The pass is in float32. The layer keeps its weights, and the state that the pass has given.
            model.params.update({name: found[name] for name in model.params if name[-2:] in (".u", ".v")})
            return found | self.params(model)

        setattr(self, method, wrong)


class CompiledInFloat32(KnowsItsForms):
    """Only the compiled form computes in float32."""

    def forward(self, model: Model, x: Array) -> Array:
        return np.asarray(_as(model.params["gamma"].dtype, super().forward(self._computing(model), x)))

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        found = super().vjp(self._computing(model), x, dy)
        return {name: array.astype(model.params["gamma"].dtype) for name, array in found.items()}

    def _computing(self, model: Model) -> Model:
        return _narrow(model) if self.is_compiled(model) else model


class LoadedInFloat32(Reference):
    """A loaded layer with the right weights, of which it keeps as many bits as float32 has."""

    def saved(self, model: Model, folder: str) -> Model:
        loaded = super().saved(model, folder)
        return replace(loaded, params=_as(model.params["gamma"].dtype, _narrow(loaded).params))


def _plain(model: Model) -> bool:
    return not model.config.spectral_norm


def _normalised(model: Model) -> bool:
    return model.config.spectral_norm


_TABLE: tuple[tuple[FamilyName, Ability, Condition, str], ...] = (
    ("map", "map", _plain, "the map"),
    ("vjp", "vjp", _plain, "the gradients"),
    ("r1", "r1", _plain, "R1"),
    ("mixed", "mixed", _plain, "the mixed second order"),
    ("mixed", "mixed", lambda model: not model.params["gamma"].any(), "the mixed second order at gamma 0"),
    ("per_sample", "per_sample", _plain, "the gradients of each sample"),
    ("spectral_norm", "map", _normalised, "the map with spectral norm"),
    ("spectral_norm", "vjp", _normalised, "the gradients with spectral norm"),
    ("spectral_norm", "r1", _normalised, "R1 with spectral norm"),
    ("spectral_norm", "mixed", _normalised, "the mixed second order with spectral norm"),
    ("spectral_norm", "spectral_norm", _normalised, "a training pass"),
    ("spectral_norm", "training_vjp", _normalised, "the gradients of a training pass"),
)

MUTANTS: tuple[Mutant, ...] = (
    *(
        named(f"float64 computed in float32 in {of}", family, partial(ComputesInFloat32, ability, where))
        for family, ability, where, of in _TABLE
    ),
    named("float64 computed in float32 in the compiled form", "compiled", CompiledInFloat32),
    named("float64 kept in float32 in a file", "saved", LoadedInFloat32),
)
"""One for each ability. `behaviour` has the one of the output."""
