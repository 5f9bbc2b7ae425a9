"""The Keras layer as a backend of the conformance kit, on the framework that Keras runs on."""

import importlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.conformance.backend import ABILITIES
from selfattn_core.conformance.cases import DTYPES
from selfattn_core.params import widen
from selfattn_keras.layer import SelfAttention2D, Tensor
from selfattn_keras.weights import from_canonical, to_canonical, variable

Array = NDArray[Any]

_FRAMEWORK = keras.backend.backend()


@dataclass(frozen=True)
class Model:
    """A layer, and how functions of it are called.

    Args:
        layer: the layer.
        compiled: whether they are compiled.
        kept: what has been compiled for this layer, if it is called many times; None if it is not.
    """

    layer: SelfAttention2D
    compiled: bool = False
    kept: dict[str, Callable[..., Any]] | None = None

    @property
    def names(self) -> list[str]:
        """The canonical names of its parameters."""
        return list(parameter_table(self.layer.config))

    @property
    def values(self) -> list[Tensor]:
        """Its parameters, in that order."""
        return [variable(self.layer, name).value for name in self.names]

    def given(self, x: Array) -> Tensor:
        """(B, H, W, C) as the layer takes it."""
        maps = x if self.layer.data_format == "channels_last" else x.transpose(0, 3, 1, 2)
        return keras.ops.convert_to_tensor(np.array(maps, order="C"), dtype=self.layer.compute_dtype)

    def like(self, name: str, array: Array) -> Tensor:
        """An array of canonical shape in the shape of the framework's own."""
        if name == "x":
            return self.given(array)
        own = np.array(array, order="C").reshape(variable(self.layer, name).shape)
        return keras.ops.convert_to_tensor(own, dtype=self.layer.variable_dtype)

    def maps(self, maps: Tensor) -> Array:
        """What the layer gives, as (B, H, W, C)."""
        array = _array(maps)
        return (
            array
            if self.layer.data_format == "channels_last"
            else np.array(array.transpose(0, 2, 3, 1), order="C")
        )

    def named(self, gradients: list[Tensor]) -> dict[str, Array]:
        """The gradients of x and of the parameters."""
        rows = parameter_table(self.layer.config).values()
        parameters = {
            row.name: _array(gradient).reshape(row.shape)
            for row, gradient in zip(rows, gradients[1:], strict=True)
        }
        return {"x": self.maps(gradients[0])} | parameters


class KerasBackend:
    """`SelfAttention2D` in both data formats; derivatives are the framework's own."""

    name = f"keras-{_FRAMEWORK}"

    def versions(self) -> Mapping[str, str]:
        """The versions of Keras and of the framework underneath."""
        framework = importlib.import_module(_FRAMEWORK)
        return {"keras": keras.__version__, _FRAMEWORK: framework.__version__}

    def claims(self) -> frozenset[str]:
        """What Keras offers on this framework: it compiles nothing on torch, and has no gradients per sample but JAX's."""
        lacking = {"tensorflow": {"per_sample"}, "jax": set(), "torch": {"compiled", "per_sample"}}
        return frozenset(ABILITIES) - lacking[_FRAMEWORK]

    def layouts(self) -> tuple[str, ...]:
        """Both data formats."""
        return ("channels_last", "channels_first")

    def dtypes(self) -> tuple[str, ...]:
        """All that the kit knows."""
        return DTYPES

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """The layer, with the dtype policy of that name."""
        return Model(from_canonical(config, params, data_format=layout, dtype=dtype))

    def update(self, model: Model, params: Mapping[str, Array]) -> Model:
        """The same layer with other values in its variables; what is compiled from now on is kept."""
        for name, value in params.items():
            variable(model.layer, name).assign(model.like(name, value))
        return model if model.kept is not None else replace(model, kept={})

    def forward(self, model: Model, x: Array) -> Array:
        """The output y."""
        return model.maps(_forward(model, model.given(x)))

    def attention_map(self, model: Model, x: Array) -> Array:
        """The map A."""
        return _array(model.layer(model.given(x), return_attention_scores=True)[1])

    def vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode."""
        return model.named(_vjp(model, model.given(x), model.given(dy)))

    def params(self, model: Model) -> Mapping[str, Array]:
        """The weights as the adapter exports them."""
        return to_canonical(model.layer)

    def initial(self, config: SelfAttentionConfig, seed: int) -> Mapping[str, Array]:
        """A new layer; initializers without a seed of their own draw one from Python's random state."""
        state = random.getstate()
        try:
            random.seed(seed)
            return to_canonical(SelfAttention2D.from_spec(config))
        finally:
            random.setstate(state)

    def training_pass(self, model: Model, x: Array) -> Mapping[str, Array]:
        """The output with `training=True`, and the weights after it."""
        y = model.maps(model.layer(model.given(x), training=True))
        return {"y": y, **to_canonical(model.layer)}

    def training_vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode, with `training=True`."""
        return model.named(_vjp(model, model.given(x), model.given(dy), training=True))

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """The penalty by reverse mode over reverse mode."""
        penalty, gradients = _r1(model, model.given(x), model.given(w))
        return float(penalty), model.named(gradients)

    def vjp_of_vjp(
        self, model: Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Second derivatives by reverse mode over reverse mode."""
        given = [model.like(name, cotangents[name]) for name in ("x", *model.names)]
        by_dy, *gradients = _vjp_of_vjp(model, model.given(x), model.given(dy), given)
        return {"dy": model.maps(by_dy)} | model.named(gradients)

    def compiled(self, model: Model) -> Model:
        """By XLA."""
        return replace(model, compiled=True)

    def saved(self, model: Model, folder: str) -> Model:
        """By way of a model in a `.keras` file."""
        channels = model.layer.config.channels
        sizes = (
            (None, None, channels) if model.layer.data_format == "channels_last" else (channels, None, None)
        )
        path = Path(folder) / "model.keras"
        whole = keras.Sequential([keras.Input(sizes, dtype=model.layer.compute_dtype), model.layer])
        whole.save(path)
        return replace(model, layer=keras.saving.load_model(path).layers[-1])

    def per_sample_vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """`jax.vmap` over the gradient."""
        by_x, *gradients = _per_sample(model, model.given(x), model.given(dy))
        found = {"x": model.maps(by_x)}
        for row, gradient in zip(parameter_table(model.layer.config).values(), gradients, strict=True):
            found[row.name] = _array(gradient).reshape(x.shape[0], *row.shape)
        return found


backend = KerasBackend()


def _array(tensor: Tensor) -> Array:
    """A new array; bfloat16 is widened."""
    return np.array(widen(np.asarray(keras.ops.convert_to_numpy(tensor))))


# `_vjp` gives the gradients of sum(dy∘y) for x and each parameter, `_r1` the penalty ‖d sum(w∘y)/dx‖² and its gradients,
# `_vjp_of_vjp` those of sum(cotangent∘gradient) for dy, x and each parameter. What the result does not depend on has a
# gradient of zero.

if _FRAMEWORK == "tensorflow":
    import tensorflow as tf

    def _as_claimed(model: Model, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if model.compiled:
            return tf.function(function, jit_compile=True)
        if model.kept is None:
            return function
        if name not in model.kept:
            model.kept[name] = tf.function(function)
        return model.kept[name]

    def _forward(model: Model, x: Tensor) -> Tensor:
        return _as_claimed(model, "forward", model.layer)(x)

    def _vjp(model: Model, x: Tensor, dy: Tensor, training: bool = False) -> list[Tensor]:
        def gradients(x: Tensor, dy: Tensor) -> list[Tensor]:
            sources = [x, *model.values]
            with tf.GradientTape() as tape:
                tape.watch(sources)
                y = model.layer(x, training=training)
            found: list[Tensor] = tape.gradient(y, sources, dy, unconnected_gradients="zero")
            return found

        found: list[Tensor] = _as_claimed(model, f"vjp {training}", gradients)(x, dy)
        return found

    def _r1(model: Model, x: Tensor, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        sources = [x, *model.values]
        with tf.GradientTape() as outer:
            outer.watch(sources)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = model.layer(x)
            penalty = tf.reduce_sum(tf.square(inner.gradient(y, x, w)))
        return penalty, outer.gradient(penalty, sources, unconnected_gradients="zero")

    def _vjp_of_vjp(model: Model, x: Tensor, dy: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
        sources = [x, *model.values]
        with tf.GradientTape() as outer:
            outer.watch([dy, *sources])
            gradients = _vjp(model, x, dy)
            total = tf.add_n([tf.reduce_sum(c * g) for c, g in zip(cotangents, gradients, strict=True)])
        found: list[Tensor] = outer.gradient(total, [dy, *sources], unconnected_gradients="zero")
        return found

elif _FRAMEWORK == "jax":
    import jax

    def _call(model: Model, x: Tensor, *values: Tensor, training: bool = False) -> Tensor:
        given = {
            variable(model.layer, name).path: value for name, value in zip(model.names, values, strict=True)
        }
        trainable = [given[each.path] for each in model.layer.trainable_variables]
        state = [each.value for each in model.layer.non_trainable_variables]
        return model.layer.stateless_call(trainable, state, x, training=training)[0]

    def _compiled(model: Model, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if model.kept is None:
            return jax.jit(function)
        if name not in model.kept:
            model.kept[name] = jax.jit(function)
        return model.kept[name]

    def _forward(model: Model, x: Tensor) -> Tensor:
        if not model.compiled and model.kept is None:
            return model.layer(x)
        return _compiled(model, "forward", lambda *given: _call(model, *given))(x, *model.values)

    def _gradients(model: Model, dy: Tensor, *inputs: Tensor, training: bool = False) -> tuple[Tensor, ...]:
        _, pullback = jax.vjp(lambda *inputs: _call(model, *inputs, training=training), *inputs)
        return tuple(pullback(dy))

    def _vjp(model: Model, x: Tensor, dy: Tensor, training: bool = False) -> list[Tensor]:
        # Compiled as a whole: operation by operation takes many times as long at these sizes.
        gradients = _compiled(
            model, f"vjp {training}", lambda *given: _gradients(model, *given, training=training)
        )
        return list(gradients(dy, x, *model.values))

    def _r1(model: Model, x: Tensor, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        def penalised(w: Tensor, *inputs: Tensor) -> Any:
            def penalty(x: Tensor, *values: Tensor) -> Tensor:
                dx = jax.grad(lambda x: (w * _call(model, x, *values)).sum())(x)
                return (dx * dx).sum()

            return jax.value_and_grad(penalty, range(len(inputs)))(*inputs)

        value, gradients = _compiled(model, "r1", penalised)(w, x, *model.values)
        return value, list(gradients)

    def _vjp_of_vjp(model: Model, x: Tensor, dy: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
        def second(cotangents: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
            _, pullback = jax.vjp(lambda *inputs: _gradients(model, *inputs), *inputs)
            return tuple(pullback(cotangents))

        return list(_compiled(model, "mixed", second)(tuple(cotangents), dy, x, *model.values))

    def _per_sample(model: Model, x: Tensor, dy: Tensor) -> list[Tensor]:
        def one(x: Tensor, dy: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            by_x, *by_values = _gradients(model, dy[None], x[None], *values)
            return by_x[0], *by_values

        values = model.values
        return list(jax.jit(jax.vmap(one, (0, 0, *[None] * len(values))))(x, dy, *values))

else:
    import torch

    def _forward(model: Model, x: Tensor) -> Tensor:
        return model.layer(x)

    def _sources(model: Model, x: Tensor) -> list[Tensor]:
        return [x.requires_grad_(), *model.values]

    def _vjp(model: Model, x: Tensor, dy: Tensor, training: bool = False) -> list[Tensor]:
        sources = _sources(model, x)
        y = model.layer(x, training=training)
        return list(torch.autograd.grad(y, sources, dy, materialize_grads=True))

    def _r1(model: Model, x: Tensor, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        sources = _sources(model, x)
        (dx,) = torch.autograd.grad(model.layer(x), x, w, create_graph=True)
        penalty = dx.square().sum()
        return penalty.detach(), list(torch.autograd.grad(penalty, sources, materialize_grads=True))

    def _vjp_of_vjp(model: Model, x: Tensor, dy: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
        sources = _sources(model, x)
        dy.requires_grad_()
        first = torch.autograd.grad(model.layer(x), sources, dy, create_graph=True, materialize_grads=True)
        total = torch.stack([(c * g).sum() for c, g in zip(cotangents, first, strict=True)]).sum()
        return list(torch.autograd.grad(total, [dy, *sources], materialize_grads=True))
