"""The Keras layer as a backend of the conformance kit, on the framework that Keras runs on."""

import importlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_keras.layer import SelfAttention2D, Tensor
from selfattn_keras.weights import from_canonical, to_canonical, variable

Array = NDArray[Any]

_FRAMEWORK = keras.backend.backend()


class KerasBackend:
    """`SelfAttention2D` in both data formats; derivatives are the framework's own."""

    name = f"keras-{_FRAMEWORK}"

    def versions(self) -> Mapping[str, str]:
        """The versions of Keras and of the framework underneath."""
        framework = importlib.import_module(_FRAMEWORK)
        return {"keras": keras.__version__, _FRAMEWORK: framework.__version__}

    def claims(self) -> frozenset[str]:
        """Everything the kit asks for."""
        return frozenset({"forward", "map", "vjp", "r1", "params"})

    def layouts(self) -> tuple[str, ...]:
        """Both data formats."""
        return ("channels_last", "channels_first")

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> SelfAttention2D:
        """The layer, with the dtype policy of that name."""
        return from_canonical(config, params, data_format=layout, dtype=dtype)

    def forward(self, model: SelfAttention2D, x: Array) -> Array:
        """The output y."""
        return _to_numpy(model(_to_native(x, model)), model)

    def attention_map(self, model: SelfAttention2D, x: Array) -> Array:
        """The map A."""
        _, attention = model(_to_native(x, model), return_attention_scores=True)
        return np.array(keras.ops.convert_to_numpy(attention))

    def vjp(self, model: SelfAttention2D, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode."""
        return _named(model, _vjp(model, _variables(model), _to_native(x, model), _to_native(dy, model)))

    def r1(self, model: SelfAttention2D, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """The penalty by reverse mode over reverse mode."""
        penalty, gradients = _r1(model, _variables(model), _to_native(x, model), _to_native(w, model))
        return float(penalty), _named(model, gradients)

    def params(self, model: SelfAttention2D) -> Mapping[str, Array]:
        """The weights as the adapter exports them."""
        return to_canonical(model)


backend = KerasBackend()


def _variables(model: SelfAttention2D) -> list[Any]:
    return [variable(model, name) for name in parameter_table(model.config)]


def _named(model: SelfAttention2D, gradients: list[Tensor]) -> dict[str, Array]:
    named = {"x": _to_numpy(gradients[0], model)}
    for row, gradient in zip(parameter_table(model.config).values(), gradients[1:], strict=True):
        named[row.name] = np.array(keras.ops.convert_to_numpy(gradient)).reshape(row.shape)
    return named


def _to_native(x: Array, model: SelfAttention2D) -> Tensor:
    maps = x if model.data_format == "channels_last" else x.transpose(0, 3, 1, 2)
    return keras.ops.convert_to_tensor(np.array(maps, order="C"))


def _to_numpy(maps: Tensor, model: SelfAttention2D) -> Array:
    array = np.array(keras.ops.convert_to_numpy(maps))
    return array if model.data_format == "channels_last" else np.array(array.transpose(0, 2, 3, 1), order="C")


# `_vjp` gives the gradients of sum(dy∘y) for x and each variable, `_r1` the penalty ‖d sum(w∘y)/dx‖² and its gradients.
# A variable that the penalty does not depend on has a gradient of zero.

if _FRAMEWORK == "tensorflow":
    import tensorflow as tf

    def _vjp(model: SelfAttention2D, variables: list[Any], x: Tensor, dy: Tensor) -> list[Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x)
        sources = [x, *(each.value for each in variables)]
        gradients: list[Tensor] = tape.gradient(y, sources, dy, unconnected_gradients="zero")
        return gradients

    def _r1(
        model: SelfAttention2D, variables: list[Any], x: Tensor, w: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = model(x)
            penalty = tf.reduce_sum(tf.square(inner.gradient(y, x, w)))
        sources = [x, *(each.value for each in variables)]
        return penalty, outer.gradient(penalty, sources, unconnected_gradients="zero")

elif _FRAMEWORK == "jax":
    import jax

    def _call(model: SelfAttention2D, variables: list[Any], x: Tensor, *values: Tensor) -> Tensor:
        given = {each.path: value for each, value in zip(variables, values, strict=True)}
        return model.stateless_call([given[each.path] for each in model.trainable_variables], [], x)[0]

    def _vjp(model: SelfAttention2D, variables: list[Any], x: Tensor, dy: Tensor) -> list[Tensor]:
        values = [each.value for each in variables]

        def gradients(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            _, pullback = jax.vjp(lambda *inputs: _call(model, variables, *inputs), *inputs)
            return tuple(pullback(dy))

        # Compiled as a whole: operation by operation takes many times as long at these sizes.
        return list(jax.jit(gradients)(dy, x, *values))

    def _r1(
        model: SelfAttention2D, variables: list[Any], x: Tensor, w: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        values = [each.value for each in variables]

        def penalty(x: Tensor, *values: Tensor) -> Tensor:
            dx = jax.grad(lambda x: (w * _call(model, variables, x, *values)).sum())(x)
            return (dx * dx).sum()

        value, gradients = jax.jit(jax.value_and_grad(penalty, range(1 + len(values))))(x, *values)
        return value, list(gradients)

else:
    import torch

    def _vjp(model: SelfAttention2D, variables: list[Any], x: Tensor, dy: Tensor) -> list[Tensor]:
        sources = [x.requires_grad_(), *(each.value for each in variables)]
        return list(torch.autograd.grad(model(x), sources, dy, materialize_grads=True))

    def _r1(
        model: SelfAttention2D, variables: list[Any], x: Tensor, w: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        sources = [x.requires_grad_(), *(each.value for each in variables)]
        (dx,) = torch.autograd.grad(model(x), x, w, create_graph=True)
        penalty = dx.square().sum()
        return penalty.detach(), list(torch.autograd.grad(penalty, sources, materialize_grads=True))
