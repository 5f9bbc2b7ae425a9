"""A `PlainLayer` as a backend of the kit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from selfattn_core import SelfAttentionConfig, parameter_table, spec
from selfattn_core.arrays import Array
from selfattn_core.conformance.protocol import Backend
from selfattn_core.conformance.right.implementation import RightImplementation
from selfattn_torch.conformance.model import to_array
from selfattn_torch.conformance.right.layer import PlainLayer

__all__ = ["DifferentiatedByTorch", "differentiated"]


@dataclass(frozen=True)
class _Model:
    config: SelfAttentionConfig
    weights: dict[str, Array]
    dtype: torch.dtype

    def tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self.dtype)


class DifferentiatedByTorch:
    """A layer whose derivatives torch computes from its operations, by reverse mode and by reverse mode over it.

    Args:
        layer: the layer.
    """

    name = "differentiated by torch"

    def __init__(self, layer: type[PlainLayer]) -> None:
        self.layer = layer

    def versions(self) -> Mapping[str, str]:
        """The version of torch."""
        return {"torch": torch.__version__}

    def claims(self) -> frozenset[str]:
        """What the calibration asks for."""
        return frozenset({"forward", "map", "vjp", "r1", "mixed", "spectral_norm", "training_vjp"})

    def layouts(self) -> tuple[str, ...]:
        """One layout."""
        return ("channels_last",)

    def dtypes(self) -> tuple[str, ...]:
        """Those of the layer."""
        return self.layer.dtypes

    def declines(self, config: SelfAttentionConfig) -> str:
        """The configurations that this way of computing does not have."""
        return self.layer.declines(config)

    def build(
        self,
        config: SelfAttentionConfig,
        params: Mapping[str, Array],
        dtype: str,
        layout: str,  # noqa: ARG002 - there is only one
    ) -> _Model:
        """The weights."""
        return _Model(config, dict(params), getattr(torch, dtype))

    def forward(self, model: _Model, x: Array) -> Array:
        """The output y."""
        with torch.no_grad():
            return to_array(self._layer(model).output(model.tensor(x)))

    def attention_map(self, model: _Model, x: Array) -> Array:
        """The map A."""
        with torch.no_grad():
            return to_array(self._layer(model).attention_map(model.tensor(x)))

    def vjp(self, model: _Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode."""
        inputs = self._inputs(model, x)
        return self._gradients(self._output(model, inputs), inputs, model.tensor(dy))

    def training_pass(self, model: _Model, x: Array) -> Mapping[str, Array]:
        """A power iteration, after which the model holds the new state, then the output."""
        moved = self._moved(model).weights
        model.weights.update(moved)
        return {"y": self.forward(model, x), **moved}

    def training_vjp(self, model: _Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """A power iteration, then gradients."""
        return self.vjp(self._moved(model), x, dy)

    def r1(self, model: _Model, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """The penalty by double backward."""
        inputs = self._inputs(model, x)
        (dx,) = torch.autograd.grad(
            self._output(model, inputs), inputs["x"], model.tensor(w), create_graph=True
        )
        penalty = dx.square().sum()
        return penalty.item(), self._gradients(penalty, inputs, None)

    def vjp_of_vjp(
        self, model: _Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Second derivatives by double backward."""
        inputs = self._inputs(model, x)
        cotangent = model.tensor(dy).requires_grad_()
        first = torch.autograd.grad(
            self._output(model, inputs),
            list(inputs.values()),
            cotangent,
            create_graph=True,
            materialize_grads=True,
        )
        terms = [
            (gradient * model.tensor(cotangents[name])).sum()
            for name, gradient in zip(inputs, first, strict=True)
        ]
        return self._gradients(torch.stack(terms).sum(), {"dy": cotangent} | inputs, None)

    def _layer(self, model: _Model, parameters: Mapping[str, torch.Tensor] | None = None) -> PlainLayer:
        weights = {name: model.tensor(array) for name, array in model.weights.items()}
        return self.layer(model.config, weights | dict(parameters or {}))

    def _inputs(self, model: _Model, x: Array) -> dict[str, torch.Tensor]:
        named = {"x": x} | {name: model.weights[name] for name in parameter_table(model.config)}
        return {name: model.tensor(array).requires_grad_() for name, array in named.items()}

    def _output(self, model: _Model, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._layer(model, inputs).output(inputs["x"])

    def _moved(self, model: _Model) -> _Model:
        weights = {name: to_array(model.tensor(array)) for name, array in model.weights.items()}
        return _Model(model.config, spec.power_iteration(model.config, weights), model.dtype)

    def _gradients(
        self, value: torch.Tensor, inputs: Mapping[str, torch.Tensor], cotangent: torch.Tensor | None
    ) -> dict[str, Array]:
        grads: Any = torch.autograd.grad(value, list(inputs.values()), cotangent, materialize_grads=True)
        return {name: to_array(gradient) for name, gradient in zip(inputs, grads, strict=True)}


def differentiated(name: str, why: str, layer: type[PlainLayer]) -> RightImplementation:
    """A right implementation that torch differentiates.

    Args:
        name: how it computes.
        why: why this is the function of the definition.
        layer: the layer.
    """

    def make() -> Backend:
        backend: Any = DifferentiatedByTorch(layer)
        backend.name = name
        made: Backend = backend
        return made

    return RightImplementation(name, why, make)
