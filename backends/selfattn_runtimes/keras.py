"""`.keras` files, on the framework that KERAS_BACKEND names."""

from importlib.metadata import version
from typing import Any

import keras
from numpy.typing import NDArray

# This import registers the layer under its name in files.
import selfattn_keras  # noqa: F401
from selfattn_core.verifying.artifact import Artifact, Tensor

__all__ = ["open_artifact"]


def open_artifact(path: str, *, input_name: str | None, output_names: tuple[str, ...]) -> Artifact:
    """Open a model, or one of its layers.

    Args:
        path: path of the file.
        input_name: name of the layer whose input is fed; by default the model's own input.
        output_names: name of the layer whose output is read; by default the model's own outputs.

    Raises:
        ValueError: if the model does not have these layers.
    """
    model = keras.saving.load_model(path, compile=False)
    own = {each.name for each in model.inputs}
    own |= {layer.name for layer in model.layers if isinstance(layer, keras.layers.InputLayer)}
    start = None if input_name in own else input_name
    if start is not None or not set(_names(model, ())).issuperset(output_names):
        model = _part(model, start, output_names)
        named = _names(model, output_names)
    else:
        named = _names(model, ())
    inputs = [_tensor(input_name or each.name, each) for each in model.inputs]
    outputs = [_tensor(name, each) for name, each in zip(named, model.outputs, strict=True)]

    def run(x: NDArray[Any], _: str, names: tuple[str, ...]) -> list[NDArray[Any]]:
        answered = keras.tree.flatten(model(keras.ops.convert_to_tensor(x), training=False))
        by_name = dict(zip(named, answered, strict=True))
        return [keras.ops.convert_to_numpy(by_name[name]) for name in names]

    computed = {layer.compute_dtype for layer in model.layers if layer.weights}
    framework = keras.backend.backend()
    return Artifact(
        tuple(inputs),
        tuple(outputs),
        run,
        {"keras": keras.__version__, framework: version(framework)},
        frozenset(computed),
    )


def _part(model: Any, input_name: str | None, output_names: tuple[str, ...]) -> Any:
    named = [name for name in (input_name, *output_names) if name is not None]
    layers = {layer.name: layer for layer in model.layers}
    if missing := [name for name in named if name not in layers]:
        raise ValueError(f"it has no layer {', '.join(missing)}; it has {', '.join(layers)}.")
    start = model.inputs if input_name is None else layers[input_name].input
    end = keras.tree.flatten([layers[name].output for name in output_names]) or model.outputs
    return keras.Model(start, end[0] if len(end) == 1 else end)


def _names(model: Any, layers: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the outputs. The outputs of one layer have its name, with numbers from the second on."""
    count = len(model.outputs)
    if len(layers) == 1:
        return (layers[0], *(f"{layers[0]} {number}" for number in range(1, count)))
    return layers if len(layers) == count else tuple(f"output {number}" for number in range(count))


def _tensor(name: str, symbolic: Any) -> Tensor:
    return Tensor(name, keras.backend.standardize_dtype(symbolic.dtype), tuple(symbolic.shape))
