"""The Keras layer as a backend of the conformance kit, on the framework that Keras runs on."""

import importlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import DTYPES
from selfattn_core.conformance.protocol import ABILITIES
from selfattn_keras.conformance.model import Model, to_array
from selfattn_keras.layer import SelfAttention2D, Tensor
from selfattn_keras.weights import from_canonical, to_canonical, variable

_FRAMEWORK = keras.backend.backend()

_devices: Any = importlib.import_module(f"selfattn_ops.devices.{_FRAMEWORK}")

# These functions take tensors of the framework. An input that does not affect a result has a gradient of zero.
_functions: Any = importlib.import_module(f"selfattn_keras.conformance.{_FRAMEWORK}")


class KerasBackend(_devices.OnDevices):
    """`SelfAttention2D` in both data formats. The framework computes the derivatives."""

    name = f"keras-{_FRAMEWORK}"

    @contextmanager
    def on(self, device: str) -> Iterator[Mapping[str, str]]:
        """Also set the default device of Keras on torch, which is a card if there is one."""
        own = keras.device(device.removesuffix(":0")) if _FRAMEWORK == "torch" else nullcontext()
        with super().on(device) as about, own:
            yield about

    def versions(self) -> Mapping[str, str]:
        """The versions of Keras and of the framework underneath."""
        framework = importlib.import_module(_FRAMEWORK)
        return {"keras": keras.__version__, _FRAMEWORK: framework.__version__}

    def claims(self) -> frozenset[str]:
        """All abilities, except compilation on torch, and gradients per sample on torch and TensorFlow."""
        lacking = {"tensorflow": {"per_sample"}, "jax": set(), "torch": {"compiled", "per_sample"}}
        return frozenset(ABILITIES) - lacking[_FRAMEWORK]

    def layouts(self) -> tuple[str, ...]:
        """Both data formats."""
        return ("channels_last", "channels_first")

    def dtypes(self) -> tuple[str, ...]:
        """All dtypes of the kit that the device has."""
        return tuple(dtype for dtype in DTYPES if dtype != "float64" or not self.device.startswith("mps"))

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """The layer, with the dtype policy of that name. On JAX its functions are compiled."""
        layer = from_canonical(config, params, data_format=layout, dtype=dtype)
        return Model(layer, "compiled" if _FRAMEWORK == "jax" else "eager")

    def update(self, model: Model, params: Mapping[str, Array]) -> Model:
        """The same layer with other values in its variables. On TensorFlow, later calls run as a graph."""
        for name, value in params.items():
            variable(model.layer, name).assign(model.like(name, value))
        return replace(model, way="graph") if model.way == "eager" else model

    def forward(self, model: Model, x: Array) -> Array:
        """The output y."""
        return model.maps(self.noted(_functions.forward(model, model.given(x))))

    def attention_map(self, model: Model, x: Array) -> Array:
        """The map A."""
        return to_array(self.noted(_functions.attention(model, model.given(x))))

    def vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode."""
        return self._named(model, _functions.vjp(model, model.given(x), model.given(dy)))

    def params(self, model: Model) -> Mapping[str, Array]:
        """The weights as the adapter exports them."""
        for value in model.values:
            self.noted(value)
        return to_canonical(model.layer)

    def initial(self, config: SelfAttentionConfig, seed: int) -> Mapping[str, Array]:
        """The weights of a new layer. Initializers without a seed draw one from Python's random state."""
        state = random.getstate()
        try:
            random.seed(seed)
            layer = SelfAttention2D.from_spec(config)
            self.noted(layer.gamma.value)
            return to_canonical(layer)
        finally:
            random.setstate(state)

    def training_pass(self, model: Model, x: Array) -> Mapping[str, Array]:
        """The output with `training=True`, and the weights after it."""
        y = model.maps(self.noted(model.layer(model.given(x), training=True)))
        return {"y": y, **to_canonical(model.layer)}

    def training_vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode, with `training=True`."""
        return self._named(model, _functions.vjp(model, model.given(x), model.given(dy), training=True))

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """The penalty by reverse mode over reverse mode."""
        penalty, gradients = _functions.r1(model, model.given(x), model.given(w))
        return float(penalty), self._named(model, gradients)

    def vjp_of_vjp(
        self, model: Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Second derivatives by reverse mode over reverse mode."""
        given = [model.like(name, cotangents[name]) for name in ("x", *model.names)]
        by_dy, *gradients = _functions.vjp_of_vjp(model, model.given(x), model.given(dy), given)
        return {"dy": model.maps(self.noted(by_dy))} | self._named(model, gradients)

    def compiled(self, model: Model) -> Model:
        """By XLA."""
        return Model(model.layer, "compiled")

    def eager(self, model: Model) -> Model:
        """Operation by operation."""
        return Model(model.layer)

    def saved(self, model: Model, folder: str) -> Model:
        """The layer after its model was saved to a `.keras` file and loaded."""
        channels = model.layer.config.channels
        sizes = (
            (None, None, channels) if model.layer.data_format == "channels_last" else (channels, None, None)
        )
        path = Path(folder) / "model.keras"
        whole = keras.Sequential([keras.Input(sizes, dtype=model.layer.compute_dtype), model.layer])
        whole.save(path)
        return Model(keras.saving.load_model(path).layers[-1], model.way)

    def per_sample_vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients per sample, by `jax.vmap` over the gradient."""
        by_x, *gradients = _functions.per_sample(model, model.given(x), model.given(dy))
        found = {"x": model.maps(self.noted(by_x))}
        for row, gradient in zip(parameter_table(model.layer.config).values(), gradients, strict=True):
            found[row.name] = to_array(self.noted(gradient)).reshape(x.shape[0], *row.shape)
        return found

    def _named(self, model: Model, gradients: list[Tensor]) -> dict[str, Array]:
        for gradient in gradients:
            self.noted(gradient)
        return model.named(gradients)


backend = KerasBackend()
