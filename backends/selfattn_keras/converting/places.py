"""The places of layers in a Keras model: in the graph of a functional or sequential model, or in an attribute."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras

from selfattn_keras.converting.answers import everything_in

__all__ = ["Place", "children", "in_place", "is_graph", "places", "settled"]

Keys = tuple[Any, ...]

# Keras keeps its own lists of the contents of attributes and graphs here.
_BOOKS = {"_layers", "_functional", "_operations", "_operations_by_depth", "_metrics", "_modules"}


@dataclass(frozen=True)
class Place:
    """One place of a layer.

    Args:
        name: the path to it through names of layers and attributes, "generator/blocks/0". "" is the model itself.
        layer: the layer at this place.
        parent: the layer that holds it, or None for the model itself.
        keys: the attribute of the parent, and the keys of the lists and dicts inside it. Empty in a graph.
        above: every layer on the path, the model first.
    """

    name: str
    layer: Any
    parent: Any
    keys: Keys
    above: tuple[Any, ...]


def places(model: Any) -> Iterator[Place]:
    """Every place of a layer in a model, the model itself first. A shared layer has several places.

    Example:
        >>> model = keras.Sequential([keras.layers.ReLU(name="a"), keras.layers.ReLU(name="b")])
        >>> [place.name for place in places(model)]
        ['', 'a', 'b']
    """
    yield from _within(Place("", model, None, (), ()))


def _within(place: Place) -> Iterator[Place]:
    yield place
    if any(place.layer is each for each in place.above):
        return
    above = (*place.above, place.layer)
    for name, keys, child in children(place.layer):
        yield from _within(
            Place(f"{place.name}/{name}" if place.name else name, child, place.layer, keys, above)
        )


def is_graph(layer: Any) -> bool:
    """Whether a layer is a functional or sequential model, whose layers are the nodes of a graph."""
    return isinstance(layer, keras.Sequential) or (
        isinstance(layer, keras.Model) and hasattr(layer, "_operations_by_depth")
    )


def children(layer: Any) -> Iterator[tuple[str, Keys, Any]]:
    """The name, the keys and the layer of each place directly inside a layer."""
    if is_graph(layer):
        for child in layer.layers:
            if not isinstance(child, keras.layers.InputLayer):
                yield child.name, (), child
    attributes = vars(layer)
    # PyTorch keeps its own modules in a separate attribute.
    for name, value in [*attributes.items(), *attributes.get("_modules", {}).items()]:
        # Attributes that TensorFlow uses itself begin with `_self_`.
        if name not in _BOOKS and not name.startswith("_self_"):
            for keys, child in _held(value, (name,)):
                yield "/".join(map(str, keys)), keys, child


def _held(value: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    if isinstance(value, keras.layers.Layer):
        yield keys, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _held(each, (*keys, key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _held(each, (*keys, index))


def in_place(parent: Any, keys: Keys, new: Any) -> None:
    """Replace a layer in an attribute, and in its position among the layers of the parent.

    Args:
        parent: the layer that has the attribute.
        keys: keys of the place.
        new: the new layer. It must be built, because a built parent does not build it.
    """
    name, *rest = keys
    held = getattr(parent, name)
    old = held
    for key in rest:
        old = old[key]
    if old is new:
        return
    tracker = parent._tracker  # noqa: SLF001 - Keras has no other way to a layer that is built
    if tracker.is_in_store("layers", old):
        tracker.replace_tracked_value("layers", old, new)
    try:
        changed = _exchanged(held, rest, new)
        if changed is not held:
            setattr(parent, name, changed)
    except Exception:
        if tracker.is_in_store("layers", new):
            tracker.replace_tracked_value("layers", new, old)
        _exchanged(held, rest, old)
        raise


def _exchanged(held: Any, keys: list[Any], new: Any) -> Any:
    if not keys:
        return new
    key, *rest = keys
    inner = _exchanged(held[key], rest, new)
    if not isinstance(held, tuple):
        held[key] = inner
        return held
    parts = [*held[:key], inner, *held[key + 1 :]]
    return type(held)(*parts) if hasattr(held, "_fields") else tuple(parts)


def settled(model: Any, new: Collection[Any]) -> None:
    """Clear what layers made for a layer that was replaced: torch's parameters, compiled functions, the optimizer.

    Args:
        model: the whole model.
        new: the new layers. Only layers that hold one of them are cleared.
    """
    come = {id(layer) for layer in new}
    for layer in everything_in(model):
        if id(layer) in come or not come.intersection(map(id, everything_in(layer))):
            continue
        if layer.built:
            layer._post_build()  # noqa: SLF001 - by which Keras on torch registers parameters
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
            if layer.compiled:
                layer.compiled = False
                layer.optimizer = None
