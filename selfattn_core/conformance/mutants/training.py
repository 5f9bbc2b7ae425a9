"""Mutants of training: bugs that show over many steps."""

from collections.abc import Mapping

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.mutants.mutant import Mutant
from selfattn_core.conformance.reference import Model, Reference

__all__ = ["MUTANTS"]


class KeepsItsWeights(Reference):
    """Ignores new weights, as a function that was compiled with the weights as constants."""

    def update(self, model: Model, _: Mapping[str, Array]) -> Model:
        return model


class GammaPlain(Reference):
    """Never updates gamma, as if gamma were a plain tensor that no optimiser knows."""

    gamma: Array | None = None

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        self.gamma = params["gamma"] if self.gamma is None else self.gamma
        return super().build(config, {**params, "gamma": self.gamma}, dtype, layout)


class AddsUp(Reference):
    """Gradients that are never reset to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.total: dict[str, Array] = {}

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        gradients = super().vjp(model, x, dy)
        self.total = {
            name: value + self.total[name] if name in self.total and name != "x" else value
            for name, value in gradients.items()
        }
        return self.total


class LateByOne(Reference):
    """The gradients of the previous step."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, Array] | None = None

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        gradients = super().vjp(model, x, dy)
        before, self.last = self.last or gradients, gradients
        return before


class OffByAThousandth(Reference):
    """The gradient of one kernel, times 1.001."""

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        gradients = super().vjp(model, x, dy)
        kernel = gradients["query.kernel"]
        return gradients | {"query.kernel": kernel * kernel.dtype.type(1.001)}


class FirstOfTheBatch(Reference):
    """The gradient of the first feature map of each batch, times the batch size."""

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        gradients = super().vjp(model, x[:1], dy[:1])
        return {name: value * value.dtype.type(len(x)) for name, value in gradients.items()}


class HalfPrecision(Reference):
    """Gradients that pass through float16."""

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        gradients = super().vjp(model, x, dy)
        return {name: value.astype(np.float16).astype(value.dtype) for name, value in gradients.items()}


MUTANTS = (
    Mutant("weights of the first step kept for ever", "trajectory", KeepsItsWeights),
    Mutant("gamma never updated", "trajectory", GammaPlain, "DANet-style PAModule, and other plain tensors"),
    Mutant("gradients added up over the steps", "trajectory", AddsUp),
    Mutant("gradients late by one step", "trajectory", LateByOne),
    Mutant("query gradient off by a thousandth", "trajectory", OffByAThousandth),
    Mutant("gradient of the first map of the batch alone", "trajectory", FirstOfTheBatch),
    Mutant("gradients rounded to float16", "trajectory", HalfPrecision),
)
