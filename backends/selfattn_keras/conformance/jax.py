"""The layer's functions on JAX."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from selfattn_keras.conformance.model import Model
from selfattn_keras.layer import Tensor
from selfattn_keras.weights import variable

__all__ = ["attention", "forward", "per_sample", "r1", "vjp", "vjp_of_vjp"]


@dataclass(frozen=True)
class Pure:
    """The layer as a pure function of its variables.

    Args:
        model: the layer.
        state: the values of the non-trainable variables.
        training: whether it is called in training mode.
    """

    model: Model
    state: list[Tensor]
    training: bool = False

    def call(self, x: Tensor, *values: Tensor, with_map: bool = False) -> Any:
        """The output y, or y and the map."""
        return self.called(x, *values, with_map=with_map)[0]

    def called(self, x: Tensor, *values: Tensor, with_map: bool = False) -> Any:
        """The same, and the non-trainable variables after it."""
        layer = self.model.layer
        given = {
            variable(layer, name).path: value for name, value in zip(self.model.names, values, strict=True)
        }
        trainable = [given[each.path] for each in layer.trainable_variables]
        options = {"return_attention_scores": True} if with_map else {}
        return layer.stateless_call(trainable, self.state, x, training=self.training, **options)

    def gradients(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The gradients of sum(dy∘y) for x and each parameter."""
        return self.gradients_and_state(dy, *inputs)[0]

    def gradients_and_state(self, dy: Tensor, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The same, and the non-trainable variables after it."""
        _, pullback, state = jax.vjp(self.called, *inputs, has_aux=True)
        return tuple(pullback(dy)), state


def _in_its_way(
    model: Model, name: str, function: Callable[..., Any], *given: Any, training: bool = False
) -> Any:
    """The result of a function of `Pure` and the further arguments."""
    state = [each.value for each in model.layer.non_trainable_variables]
    if model.way == "eager":
        return function(Pure(model, state, training), *given)
    if name not in model.kept:

        def whole(state: list[Tensor], *given: Any) -> Any:
            return function(Pure(model, state, training), *given)

        model.kept[name] = jax.jit(whole)
    return model.kept[name](state, *given)


def forward(model: Model, x: Tensor) -> Tensor:
    """The output y."""
    y, state = _in_its_way(model, "forward", Pure.called, x, *model.values)
    _keep(model, state)
    return y


def _keep(model: Model, state: list[Tensor]) -> None:
    """Copy changes of the non-trainable variables back to the layer, so that unwanted changes show."""
    for each, value in zip(model.layer.non_trainable_variables, state, strict=True):
        each.assign(value)


def attention(model: Model, x: Tensor) -> Tensor:
    """The map A."""

    def mapped(pure: Pure, *inputs: Tensor) -> Tensor:
        return pure.call(*inputs, with_map=True)[1]

    return _in_its_way(model, "map", mapped, x, *model.values)


def vjp(model: Model, x: Tensor, dy: Tensor, training: bool = False) -> list[Tensor]:
    """The gradients of sum(dy∘y) for x and each parameter."""
    function, name = Pure.gradients_and_state, f"vjp {training}"
    gradients, state = _in_its_way(model, name, function, dy, x, *model.values, training=training)
    if not training:
        _keep(model, state)
    return list(gradients)


def r1(model: Model, x: Tensor, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The penalty ‖d sum(w∘y)/dx‖² and its gradients for x and each parameter."""

    def penalised(pure: Pure, w: Tensor, *inputs: Tensor) -> Any:
        def penalty(x: Tensor, *values: Tensor) -> Tensor:
            dx = jax.grad(lambda x: (w * pure.call(x, *values)).sum())(x)
            return (dx * dx).sum()

        return jax.value_and_grad(penalty, range(len(inputs)))(*inputs)

    value, gradients = _in_its_way(model, "r1", penalised, w, x, *model.values)
    return value, list(gradients)


def vjp_of_vjp(model: Model, x: Tensor, dy: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
    """The gradients of Σ sum(cotangent∘gradient) for dy, x and each parameter."""

    def second(pure: Pure, cotangents: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        _, pullback = jax.vjp(pure.gradients, *inputs)
        return tuple(pullback(cotangents))

    return list(_in_its_way(model, "mixed", second, tuple(cotangents), dy, x, *model.values))


def per_sample(model: Model, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The gradients of sum(dy∘y) of each sample for x and each parameter."""

    def each(pure: Pure, x: Tensor, dy: Tensor, *values: Tensor) -> Any:
        def one(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            by_x, *by_values = pure.gradients(dy[None], x[None], *values)
            return by_x[0], *by_values

        return jax.vmap(one)(x, dy)

    return list(_in_its_way(model, "per sample", each, x, dy, *model.values))
