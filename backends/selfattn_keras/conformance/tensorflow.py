"""The layer's functions on TensorFlow."""

from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf

from selfattn_keras.conformance.model import Model
from selfattn_keras.layer import Tensor

__all__ = ["attention", "forward", "r1", "vjp", "vjp_of_vjp"]


def _in_its_way(model: Model, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if model.way == "eager":
        return function
    if name not in model.kept:
        model.kept[name] = tf.function(function, jit_compile=model.way == "compiled")
    return model.kept[name]


def forward(model: Model, x: Tensor) -> Tensor:
    """The output y."""
    return _in_its_way(model, "forward", model.layer)(x)


def attention(model: Model, x: Tensor) -> Tensor:
    """The map A."""
    return _in_its_way(model, "map", partial(model.layer, return_attention_scores=True))(x)[1]


def vjp(model: Model, x: Tensor, dy: Tensor, training: bool = False) -> list[Tensor]:
    """The gradients of sum(dy∘y) for x and each parameter."""

    def gradients(x: Tensor, dy: Tensor) -> list[Tensor]:
        sources = [x, *model.values]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            y = model.layer(x, training=training)
        found: list[Tensor] = tape.gradient(y, sources, dy, unconnected_gradients="zero")
        return found

    found: list[Tensor] = _in_its_way(model, f"vjp {training}", gradients)(x, dy)
    return found


def r1(model: Model, x: Tensor, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The penalty ‖d sum(w∘y)/dx‖² and its gradients for x and each parameter."""

    def penalised(x: Tensor, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        sources = [x, *model.values]
        with tf.GradientTape() as outer:
            outer.watch(sources)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = model.layer(x)
            penalty = tf.reduce_sum(tf.square(inner.gradient(y, x, w)))
        return penalty, outer.gradient(penalty, sources, unconnected_gradients="zero")

    found: tuple[Tensor, list[Tensor]] = _in_its_way(model, "r1", penalised)(x, w)
    return found


def vjp_of_vjp(model: Model, x: Tensor, dy: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
    """The gradients of Σ sum(cotangent∘gradient) for dy, x and each parameter."""

    def second(x: Tensor, dy: Tensor, *cotangents: Tensor) -> list[Tensor]:
        sources = [x, *model.values]
        with tf.GradientTape() as outer:
            outer.watch([dy, *sources])
            gradients = vjp(model, x, dy)
            total = tf.add_n([tf.reduce_sum(c * g) for c, g in zip(cotangents, gradients, strict=True)])
        found: list[Tensor] = outer.gradient(total, [dy, *sources], unconnected_gradients="zero")
        return found

    found: list[Tensor] = _in_its_way(model, "mixed", second)(x, dy, *cotangents)
    return found
