"""The spec as a backend of the kit, and variants of it that compute some steps in another arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from selfattn_core import spec
from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.protocol import ABILITIES
from selfattn_core.params import init_params
from selfattn_core.spec import FirstOrder, Layer, SecondOrder

__all__ = ["FusedLayer", "LayerReference", "Model", "NarrowFusedLayer", "Reference"]


@dataclass(frozen=True)
class Model:
    """A layer of the reference.

    Args:
        config: the configuration.
        params: the weights, in the dtype that the layer computes in.
        layout: the layout of its feature maps.
    """

    config: SelfAttentionConfig
    params: dict[str, Array]
    layout: str


class Reference:
    """The spec as a backend, with every ability except "memory" and without bfloat16, which numpy does not have.

    Args:
        function: `selfattn_core.spec`, or a module with the same functions.

    Example:
        >>> config = SelfAttentionConfig(8)
        >>> reference = Reference()
        >>> model = reference.build(config, init_params(config, seed=0), "float32", "channels_last")
        >>> reference.forward(model, np.ones((2, 3, 5, 8), np.float32)).shape
        (2, 3, 5, 8)
    """

    name = "spec"

    def __init__(self, function: ModuleType = spec) -> None:
        self.function = function

    def versions(self) -> Mapping[str, str]:
        """The version of numpy."""
        return {"numpy": np.__version__}

    def claims(self) -> frozenset[str]:
        """Every ability except "memory"."""
        return frozenset(ABILITIES) - {"memory"}

    def layouts(self) -> tuple[str, ...]:
        """Both layouts."""
        return ("channels_last", "channels_first")

    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that numpy has."""
        return ("float32", "float64", "float16")

    def expected_failures(self) -> Mapping[str, tuple[str, str]]:
        """No expected failures."""
        return {}

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """A layer with the weights cast to the dtype."""
        return Model(config, {name: array.astype(dtype) for name, array in params.items()}, layout)

    def native(self, maps: Array, model: Model) -> Array:
        """The feature maps in the layout and dtype of the model."""
        maps = maps.astype(model.params["gamma"].dtype)
        return maps if model.layout == "channels_last" else np.moveaxis(maps, 3, 1)

    def canonical(self, maps: Array, model: Model) -> Array:
        """The feature maps in channels-last."""
        return maps if model.layout == "channels_last" else np.moveaxis(maps, 1, 3)

    def arguments(self, model: Model, *maps: Array) -> tuple[Any, ...]:
        """The arguments for a function of the spec."""
        given = (self.canonical(self.native(each, model), model) for each in maps)
        return (model.config, model.params, *given)

    def forward(self, model: Model, x: Array) -> Array:
        """The output y."""
        y: Array = self.function.forward(*self.arguments(model, x))
        return y

    def attention_map(self, model: Model, x: Array) -> Array:
        """The map A."""
        attention: Array = self.function.attention_map(*self.arguments(model, x))
        return attention

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        """First derivatives."""
        gradients: dict[str, Array] = self.function.vjp(*self.arguments(model, x, dy))
        return gradients

    def params(self, model: Model) -> dict[str, Array]:
        """The weights of the layer, as copies."""
        return {name: array.copy() for name, array in model.params.items()}

    def initial(self, config: SelfAttentionConfig, seed: int) -> dict[str, Array]:
        """New weights."""
        return init_params(config, seed)

    def update(self, model: Model, params: Mapping[str, Array]) -> Model:
        """A layer with other weights."""
        return self.build(model.config, params, str(model.params["gamma"].dtype), model.layout)

    def default_products(self, left: Array, right: Array) -> dict[str, Array]:
        """The matrix product of numpy."""
        return {"matrix product": left @ right}

    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        """A power iteration, after which the model holds the new state, then the output."""
        model.params.update(self.function.power_iteration(model.config, model.params))
        return {"y": self.forward(model, x), **self.params(model)}

    def training_vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        """A power iteration, then first derivatives."""
        moved = self.function.power_iteration(model.config, model.params)
        return self.vjp(Model(model.config, moved, model.layout), x, dy)

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, dict[str, Array]]:
        """The penalty and its gradient."""
        penalty: tuple[float, dict[str, Array]] = self.function.r1(*self.arguments(model, x, w))
        return penalty

    def vjp_of_vjp(
        self, model: Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Second derivatives."""
        given = {name: array.astype(model.params["gamma"].dtype) for name, array in cotangents.items()}
        gradients: dict[str, Array] = self.function.vjp_of_vjp(*self.arguments(model, x, dy), given)
        return gradients

    def compiled(self, model: Model) -> Model:
        """The same model, because numpy does not compile."""
        return model

    def saved(self, model: Model, folder: str) -> Model:
        """A model that was saved to a file of numpy and loaded."""
        path = Path(folder) / "weights.npz"
        np.savez(path, **dict(model.params))  # type: ignore[arg-type]
        with np.load(path) as file:
            return Model(model.config, dict(file), model.layout)

    def per_sample_vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        """The derivatives of each sample."""
        each = [self.vjp(model, x[b : b + 1], dy[b : b + 1]) for b in range(x.shape[0])]
        gathered = {name: np.stack([gradients[name] for gradients in each]) for name in each[0]}
        return gathered | {"x": gathered["x"][:, 0]}


class LayerReference(Reference):
    """The spec with another layer: a subclass that computes some steps in another arithmetic.

    Args:
        layer: a subclass of `selfattn_core.spec.Layer`.

    Example:
        >>> config = SelfAttentionConfig(8)
        >>> reference = LayerReference(FusedLayer)
        >>> model = reference.build(config, init_params(config, seed=0), "float32", "channels_last")
        >>> reference.attention_map(model, np.zeros((1, 1, 2, 8), np.float32))
        array([[[0.5, 0.5],
                [0.5, 0.5]]], dtype=float32)
    """

    def __init__(self, layer: type[Layer]) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, model: Model, x: Array) -> Array:
        """The output y."""
        layer = self.layer(*self.arguments(model, x))
        return layer.unflatten(layer.store(layer.gamma * layer.z + layer.x))

    def attention_map(self, model: Model, x: Array) -> Array:
        """The map A."""
        layer = self.layer(*self.arguments(model, x))
        return layer.A.astype(layer.dtype)

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        """First derivatives."""
        return self._first_order(model, x, dy).gradients()

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, dict[str, Array]]:
        """The penalty and its gradient."""
        first = self._first_order(model, x, w)
        gradients = SecondOrder(first.layer, first, {"x": first.layer.unflatten(2 * first.dx)}).gradients()
        del gradients["dy"]
        return float(np.sum(first.dx * first.dx)), gradients

    def vjp_of_vjp(
        self, model: Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Second derivatives."""
        given = {name: array.astype(model.params["gamma"].dtype) for name, array in cotangents.items()}
        first = self._first_order(model, x, dy)
        return SecondOrder(first.layer, first, given).gradients()

    def _first_order(self, model: Model, x: Array, dy: Array) -> FirstOrder:
        config, params, maps, gradient = self.arguments(model, x, dy)
        return FirstOrder(self.layer(config, params, maps), gradient)


class _FromOutput(Layer):
    """The spec's layer with D from the output, as in fused kernels."""

    def row_sums(self, dA: Array, G: Array) -> Array:  # noqa: ARG002 - this is the other way
        """D."""
        return np.asarray((G * self.o).sum(axis=-1, keepdims=True))


class FusedLayer(_FromOutput):
    """The spec's layer as fused kernels compute it: exp(s − log Σ exp s), and D from the output. Both are correct."""

    def attend(self, config: SelfAttentionConfig) -> None:
        """A, o and z."""
        scores = self.q @ self.k.mT
        largest = scores.max(axis=-1, keepdims=True)
        self.A = np.asarray(
            np.exp(scores - (largest + np.log(np.exp(scores - largest).sum(axis=-1, keepdims=True))))
        )
        self.o = self.store(self.A @ self.v)
        self.z = self.project("out", self.o) if config.out_projection else self.o


class NarrowFusedLayer(_FromOutput):
    """The spec's layer as fused kernels compute it in 16 bits. They round the map for its product with v, and D comes from o.

    o is rounded, and A∘dA is not. So D differs from the sum that it stands for by a rounding of 16 bits.
    """

    def attend(self, config: SelfAttentionConfig) -> None:
        """A, o and z."""
        super().attend(config)
        self.o = self.store(self.store(self.A) @ self.v)
        self.z = self.project("out", self.o) if config.out_projection else self.o
