"""The outputs and gradients of a Keras layer, computed with other values in its variables, without changing it."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np

from selfattn_core.arrays import Array
from selfattn_keras.layer import Tensor

__all__ = ["Answer", "WrongResultError", "ask", "asked_in", "everything_in"]


class Answer(NamedTuple):
    """The outputs and gradients of one call of a layer.

    Args:
        result: the value that the layer returned.
        by_x: the gradient of x.
        by_variable: the gradients of its variables, in their order. They are 0 for variables without effect.
        losses: number of losses that the call added, including those of an `activity_regularizer`.
    """

    result: Any
    by_x: Array
    by_variable: list[Array]
    losses: int


def everything_in(layer: Any) -> list[Any]:
    """The layer and every layer inside it, each once. Keras has no public function for this.

    Example:
        >>> [each.name for each in everything_in(keras.Sequential([keras.layers.ReLU(name="a")], name="b"))]
        ['b', 'a']
    """
    found: list[Any] = layer._flatten_layers()  # noqa: SLF001
    return found


def ask(
    layer: Any, values: Mapping[int, Array], x: Array, dy: Array, *, training: bool = False, **options: Any
) -> Answer:
    """The result for x, the gradient of x, and the gradients of the variables with floating-point values.

    Args:
        layer: any built Keras layer.
        values: values for its variables, by their place in `layer.variables`.
        x: input of the layer.
        dy: the gradient of the result, or of its first part.
        training: whether the layer is called in training mode.
        **options: further arguments of the call.

    Raises:
        Exception: whatever the layer raises.
    """
    variables = layer.variables
    kinds = [np.issubdtype(values[place].dtype, np.floating) for place in range(len(variables))]
    given = [keras.ops.convert_to_tensor(values[place]) for place in range(len(variables))]
    fixed = [(v, tensor) for v, tensor, real in zip(variables, given, kinds, strict=True) if not real]
    moved = [(v, tensor) for v, tensor, real in zip(variables, given, kinds, strict=True) if real]

    losses: list[Any] = []

    def function(x: Tensor, *tensors: Tensor) -> Any:
        # Set by `add_update`, because the constructor would cast to the variable's own dtype.
        with keras.StatelessScope(collect_losses=True) as scope:
            for variable, tensor in fixed:
                scope.add_update((variable, tensor))
            for (variable, _), tensor in zip(moved, tensors, strict=True):
                scope.add_update((variable, tensor))
            result = layer(x, training=training, **options)
            losses.extend(scope.losses)
        first = result[0] if isinstance(result, tuple | list) and result else result
        if not keras.ops.is_tensor(first) or tuple(first.shape) != tuple(dy.shape):
            raise WrongResultError(result)
        return first, result

    inputs = [keras.ops.convert_to_tensor(x), *(tensor for _, tensor in moved)]
    gradients = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[keras.backend.backend()]
    result, found = gradients(function, inputs, keras.ops.convert_to_tensor(dy))
    by_x, *others = (keras.ops.convert_to_numpy(gradient) for gradient in found)
    by_variable = iter(others)
    return Answer(result, by_x, [next(by_variable) if real else np.zeros(0) for real in kinds], len(losses))


class WrongResultError(Exception):
    """A result whose shape differs from that of x.

    Args:
        result: the value that the layer returned.
    """

    def __init__(self, result: Any) -> None:
        super().__init__("the result has another shape than x")
        self.result = result


@contextmanager
def asked_in(layer: Any, dtype: str) -> Iterator[None]:
    """Make the layer and every layer inside it compute in this dtype, on the CPU, and restore them afterwards.

    Args:
        layer: any built Keras layer.
        dtype: "float32" or "float64".
    """
    inside = everything_in(layer)
    kept = [dict(vars(each)) for each in inside]
    policy = keras.dtype_policies.get(dtype)
    try:
        for each in inside:
            # Set past the setter, which would quantise, or write into a table that other layers share.
            each._dtype_policy = policy  # noqa: SLF001
        with keras.device("cpu"), _nothing_compiled():
            yield
    finally:
        # A call may leave attributes behind, such as the map for a picture.
        for each, attributes in zip(inside, kept, strict=True):
            vars(each).clear()
            vars(each).update(attributes)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """PyTorch with gradients and without autocast, whatever the caller has set."""
    if keras.backend.backend() != "torch":
        yield
        return
    torch = importlib.import_module("torch")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        yield


def _tensorflow(function: Any, inputs: list[Tensor], dy: Tensor) -> tuple[Any, list[Tensor]]:
    tf = importlib.import_module("tensorflow")
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        first, result = function(*inputs)
    gradients = tape.gradient(first, inputs, dy, unconnected_gradients="zero")
    return result, [tf.convert_to_tensor(gradient) for gradient in gradients]


def _jax(function: Any, inputs: list[Tensor], dy: Tensor) -> tuple[Any, list[Tensor]]:
    jax = importlib.import_module("jax")
    _, pullback, result = jax.vjp(function, *inputs, has_aux=True)
    return result, list(pullback(dy))


def _torch(function: Any, inputs: list[Tensor], dy: Tensor) -> tuple[Any, list[Tensor]]:
    torch = importlib.import_module("torch")
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    first, result = function(*inputs)
    return result, list(torch.autograd.grad(first, inputs, dy, materialize_grads=True))
