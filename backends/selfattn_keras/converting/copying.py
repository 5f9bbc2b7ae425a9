"""A copy of a Keras model with some layers replaced."""

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import keras
import numpy as np

from selfattn_core.porting.errors import PortError
from selfattn_keras.converting.answers import everything_in
from selfattn_keras.converting.places import children, in_place, is_graph, places, settled
from selfattn_keras.weights import undrawn

__all__ = ["copied"]


def copied(model: Any, new: Mapping[int, Any]) -> Any:
    """A copy of a model with its weights and with some layers replaced. It is not compiled.

    Functional and sequential models are copied by `keras.models.clone_model`, all other layers by their config.

    Args:
        model: the built model.
        new: the replacements, by `id` of the old layers.

    Raises:
        PortError: if the copy would differ from the model. It lists every reason. The model is unchanged.
    """
    copier = _Copier(new)
    try:
        with undrawn():
            copy = copier.copy(model)
    except PortError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise PortError(
            f"the model cannot be copied: {copier.at}: {type(error).__name__}: {text[:400]}. {_ADVICE}"
        ) from error
    problems = list(_alike(model, copy, new))
    if problems:
        raise PortError(f"the model cannot be copied: {'; '.join(problems[:8])}. {_ADVICE}")
    settled(copy, list(new.values()))
    return copy


_ADVICE = (
    "Keras copies a layer by its config: give the class a get_config that contains all its options. Or save the weights and "
    "convert with inplace=True, which copies nothing and changes the attributes that hold the layers"
)


class _Copier:
    def __init__(self, new: Mapping[int, Any]) -> None:
        self.known = dict(new)
        self.at = ""

    def copy(self, layer: Any) -> Any:
        """The copy of a layer. Further calls return the same copy."""
        if id(layer) not in self.known:
            self.known[id(layer)] = self._graph(layer) if is_graph(layer) else self._by_config(layer)
        return self.known[id(layer)]

    def _graph(self, model: Any) -> Any:
        # Keras would compile the copy from a config that some losses do not have.
        compiled, model.compiled = model.compiled, False
        try:
            inputs = None if isinstance(model, keras.Sequential) else _inputs(model)
            copy = keras.models.clone_model(model, input_tensors=inputs, clone_function=self.copy)
        finally:
            model.compiled = compiled
        if type(copy) is not type(model):
            self.at = f"{model.name} ({type(model).__name__})"
            raise TypeError(f"clone_model made a {type(copy).__name__} of it")
        if isinstance(model, keras.Sequential) and model.built and not copy.built:
            _build_like(copy, model)
        return copy

    def _by_config(self, layer: Any) -> Any:
        self.at = f"{layer.name} ({type(layer).__name__})"
        if type(layer) is keras.layers.Lambda:
            # The config contains the code of a function, but not the values that it refers to.
            return keras.layers.Lambda(
                layer.function,
                layer._output_shape,  # noqa: SLF001 - what the constructor was given
                layer.mask,
                layer.arguments,
                name=layer.name,
                dtype=layer.dtype_policy,
                trainable=layer.trainable,
            )
        copy = type(layer).from_config(layer.get_config())
        if not isinstance(layer, keras.layers.Layer):
            return copy
        if layer.built and not copy.built:
            _build_like(copy, layer)
        inside = {keys: child for _, keys, child in children(copy)}
        for _, keys, child in children(layer):
            if any(id(each) in self.known for each in everything_in(child)) and keys in inside:
                in_place(copy, keys, self.copy(child))
        return copy


def _inputs(model: Any) -> Any:
    """New inputs with the same names, including optional inputs, which `clone_model` would not keep."""

    def like(tensor: Any) -> Any:
        source = tensor._keras_history.operation  # noqa: SLF001 - Keras has no other way from a tensor to its input
        if isinstance(source, keras.layers.InputLayer):
            return keras.layers.InputLayer.from_config(source.get_config()).output
        return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)

    return keras.tree.map_structure(like, model.input)


def _build_like(copy: Any, layer: Any) -> None:
    """Create the variables of a copy by repeating the first call of the original."""
    config = layer.get_build_config() or {}
    shape = config.get("input_shape")
    if isinstance(shape, tuple | list) and all(side is None or isinstance(side, int) for side in shape):
        # A call, because a layer with its own `build` may leave the layers inside to the first call.
        copy(keras.KerasTensor((None, *shape[1:]), dtype=layer.compute_dtype))
    else:
        copy.build_from_config(config)


def _alike(model: Any, copy: Any, new: Mapping[int, Any]) -> Iterator[str]:
    """Give the copy the values and flags of the model, or explain why it differs."""
    gone = {
        id(each) for place in places(model) if id(place.layer) in new for each in everything_in(place.layer)
    }
    come = {id(each) for layer in new.values() for each in everything_in(layer)}
    old_layers = [each for each in everything_in(model) if id(each) not in gone]
    new_layers = [each for each in everything_in(copy) if id(each) not in come]
    if [type(each) for each in old_layers] != [type(each) for each in new_layers]:
        yield f"it has {len(old_layers)} other layers, and its copy {len(new_layers)}, of other classes or in another order"
        return
    pairs = list(zip(old_layers, new_layers, strict=True))
    for old, other in pairs:
        yield from _differences(old, other)
    old_variables = _variables(model, [place.layer for place in places(model) if id(place.layer) in new])
    new_variables = _variables(copy, list(new.values()))
    if [_kind(each) for each in old_variables] != [_kind(each) for each in new_variables]:
        yield (
            f"it has {len(old_variables)} variables, and its copy {len(new_variables)}, or they have other names, shapes or dtypes"
        )
        return
    for old, other in pairs:
        # Keras numbers the layers that a constructor made without a name.
        other.name = old.name
        # The setter would set it for all layers inside.
        other._trainable = old.trainable  # noqa: SLF001
    for old, other in zip(old_variables, new_variables, strict=True):
        # A copy, because JAX reuses the memory of the arrays that it trains.
        other.assign(keras.ops.copy(old.value))
        other.trainable = old.trainable


def _variables(model: Any, without: list[Any]) -> list[Any]:
    left_out = {id(each) for layer in without for each in layer.variables}
    left_out |= {id(each) for each in model.metrics_variables}
    return [each for each in model.variables if id(each) not in left_out]


def _kind(variable: Any) -> tuple[Any, ...]:
    return variable.name, tuple(variable.shape), variable.dtype


def _differences(old: Any, other: Any) -> Iterator[str]:
    """Attributes that the config does not contain."""
    # The configs of Keras' own classes contain what Keras sets in them. Some of these values are random.
    of_keras = type(old).__module__.partition(".")[0] == "keras"
    books = _books()
    for name, value in vars(old).items():
        plain = isinstance(value, bool | int | float | str | np.ndarray) and not name.startswith("_")
        if name in books or name.startswith("_self_") or (of_keras and not plain):
            continue
        found = vars(other).get(name)
        if not _same(value, found):
            yield (
                f"{name} of {old.name} ({type(old).__name__}) is {repr(value)[:200]}, but a copy by its config has {repr(found)[:200]}"
            )


def _books() -> set[str]:
    """The attributes that Keras and the framework use for themselves."""
    blank = (keras.layers.Layer(name="blank"), keras.Sequential(name="blank"))
    return _LATER.union(*(vars(each) for each in blank))


# Attributes that exist only once a model is built, compiled or called.
_LATER = {
    "_compile_config",
    "_compiled_trainable_state",
    "_functional",
    "_inputs",
    "_inputs_struct",
    "_jax_state",
    "_nodes",
    "_nodes_by_depth",
    "_operations",
    "_operations_by_depth",
    "_outputs",
    "_outputs_struct",
    "_parent_path",
    "optimizer",
    "output_names",
    "stop_predicting",
    "stop_training",
}


def _same(value: Any, found: Any, above: tuple[int, ...] = ()) -> bool:
    """Whether two attributes are equal. Layers, variables and objects of unknown types count as equal."""
    if value is found or id(value) in above:
        return True
    above = (*above, id(value))
    same = True
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | np.ndarray() | np.generic():
            same = type(found) is type(value) and np.array_equal(np.asarray(value), np.asarray(found))
        case Mapping():
            same = isinstance(found, Mapping) and list(value) == list(found)
            same = same and all(_same(value[key], found[key], above) for key in value)
        case list() | tuple():
            same = isinstance(found, list | tuple) and len(value) == len(found)
            same = same and all(_same(one, each, above) for one, each in zip(value, found, strict=True))
        case FunctionType() | MethodType() | partial():
            same = type(found) is type(value) and _same(_function(value), _function(found), above)
        case set() | frozenset() | type() | BuiltinFunctionType() | CodeType() | np.ufunc():
            same = bool(value == found)
        case (
            keras.initializers.Initializer()
            | keras.regularizers.Regularizer()
            | keras.constraints.Constraint()
        ):
            same = type(found) is type(value) and value.get_config() == found.get_config()
    return same


def _function(function: Any) -> tuple[Any, ...]:
    """The parts of a function that determine its results."""
    if isinstance(function, partial):
        return function.func, function.args, function.keywords
    if isinstance(function, MethodType):
        return (function.__func__,)
    values = inspect.getclosurevars(function).nonlocals
    return function.__code__, function.__defaults__, function.__kwdefaults__, values
