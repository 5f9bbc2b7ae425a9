"""Reasons why a layer of a model cannot be replaced, found before anything is changed."""

import inspect
from collections.abc import Collection, Iterator
from typing import Any

import keras

from selfattn_keras.converting.answers import everything_in
from selfattn_keras.converting.places import Place, is_graph, places

__all__ = ["in_graphs", "of_callers", "of_layer", "of_model"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def of_model(model: Any) -> Iterator[str]:
    """Reasons why no layer of the model can be replaced.

    Args:
        model: the argument of `convert`.
    """
    if not isinstance(model, keras.layers.Layer):
        yield (
            f"got a {type(model).__module__}.{type(model).__qualname__}; expected a model or a layer of Keras 3. Save a model of Keras 2 "
            "or tf_keras to a file, and use `selfattn inspect` and `selfattn port`"
        )
    elif keras.distribution.distribution() is not None:
        yield "keras.distribution.set_distribution is in force; convert before the model is distributed"


def of_layer(model: Any, place: Place, *, keep_spectral_norm: bool) -> Iterator[str]:
    """Reasons why a layer cannot be replaced by another with the same weights.

    Args:
        model: the whole model.
        place: place of the layer.
        keep_spectral_norm: see `convert`.
    """
    layer = place.layer
    where = f"{place.name or 'the model'} ({type(layer).__name__})"
    if not layer.built or not layer.variables:
        yield f"{where}: has no weights yet; build it, or call the model once on an input"
        return
    inside = everything_in(layer)
    policies = [each.dtype_policy for each in inside]
    if isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
        yield f"{where}: has a table of dtype policies; give it the single policy of its layers"
    for each, policy in zip(inside, policies, strict=True):
        own = "it" if each is layer else each.name
        if each.quantization_mode is not None or policy.quantization_mode is not None:
            yield f"{where}: {own} is quantised ({each.quantization_mode}); convert the floating-point model"
        elif policy.name != layer.dtype_policy.name:
            yield (
                f"{where}: {own} has the dtype policy {policy.name}, and the layer {layer.dtype_policy.name}; the new layer has only "
                "one, so set the same policy on all parts"
            )
        if getattr(each, "lora_enabled", False):
            yield f"{where}: {own} has a low-rank adapter (LoRA); save the model and load it again, which merges it"
        if each.activity_regularizer is not None and each is not layer:
            yield f"{where}: {own} has an activity_regularizer, which the new layer cannot have; remove it"
        if keep_spectral_norm and isinstance(each, keras.layers.SpectralNormalization):
            yield (
                f"{where}: {own} is a SpectralNormalization, which overwrites the kernel in training, and our layer does not; use "
                "keep_spectral_norm=False to keep the kernels and train on without spectral norm"
            )
        hooks = [hook for kind in _HOOKS for hook in getattr(each, kind, {}).values()]
        if hooks:
            names = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in hooks)
            yield (
                f"{where}: {own} has the hooks {names}, which the new layer would not call; remove them, and register them on the "
                "new layer"
            )
    for each in layer.variables:
        if "meta" in str(getattr(each.value, "device", "")):
            yield f"{where}: {each.path} is on the meta device and has no numbers; load the weights first"
    yield from _shared(model, layer, where)


def of_callers(standing: Collection[Place]) -> Iterator[str]:
    """Reasons why the callers of a layer cannot call another in its place.

    Args:
        standing: every place of the layer.
    """
    for place in standing:
        layer = place.layer
        where = f"{place.name or 'the model'} ({type(layer).__name__})"
        nodes = getattr(place.parent, "_nodes", ()) if place.parent is not None else ()
        for index, node in enumerate(layer._inbound_nodes):  # noqa: SLF001 - Keras has no other way to what a call was given
            # Keras names the nodes of a graph in this form.
            if f"{id(layer)}_ib-{index}" in nodes:
                names = list(inspect.signature(layer.call).parameters)
                given = [*names[1 : len(node.arguments.args)], *node.arguments.kwargs]
                more = [each for each in given if each not in (names[0], "training")]
                if more:
                    yield (
                        f"{where}: the graph of {place.parent.name} calls it with x and {', '.join(more)}, but the new layer takes only x; "
                        "call it with x alone"
                    )
        for each in place.above:
            for name in _compiled(each):
                yield (
                    f"{where}: {name} of {each.name} ({type(each).__name__}) is compiled (tf.function, jit or torch.compile), and would "
                    "keep the old layer; convert it uncompiled, and compile the code that calls the converted model"
                )


def _compiled(layer: Any) -> Iterator[str]:
    """The compiled functions among the methods of a layer's own class and its attributes."""
    kinds = [kind for kind in type(layer).__mro__ if kind.__module__.partition(".")[0] not in _FRAMEWORKS]
    named = {name: value for kind in reversed(kinds) for name, value in vars(kind).items()}
    # Keras makes its own functions again.
    mine = {
        name: value
        for name, value in vars(layer).items()
        if name not in ("train_function", "test_function", "predict_function")
    }
    for name, value in (named | mine).items():
        function = value
        while (
            function is not None
            and callable(function)
            and not isinstance(function, type | keras.layers.Layer)
        ):
            if any(hasattr(function, mark) for mark in _COMPILED):
                yield name
                break
            function = getattr(function, "__wrapped__", None)


_FRAMEWORKS = {"keras", "tensorflow", "torch", "builtins"}

# Attributes of functions compiled by tf.function, by jax.jit and by torch.compile.
_COMPILED = ("python_function", "lower", "_torchdynamo_orig_callable")


def _shared(model: Any, layer: Any, where: str) -> Iterator[str]:
    """Layers and variables that the layer shares with others."""
    inside = {id(each) for each in everything_in(layer)}
    variables = {id(each): each for each in layer.variables}
    for each in everything_in(model):
        if id(each) in inside:
            continue
        below = everything_in(each)
        children = [child for child in each._layers if id(child) in inside and child is not layer]  # noqa: SLF001
        for child in children:
            yield f"{where}: {child.name} is a layer of {each.name} too, and would no longer be shared; give each its own"
        nested = {id(one) for child in below[1:] for one in child.variables}
        for one in each.variables:
            if id(one) in variables and id(one) not in nested:
                yield f"{where}: {one.path} is a variable of {each.name} too, and would no longer be shared; give each its own"


def in_graphs(model: Any, layers: Collection[int]) -> Iterator[str]:
    """Reasons why layers cannot be replaced in place.

    Args:
        model: the whole model.
        layers: `id` of each layer.
    """
    if id(model) in layers:
        yield "the model itself is the layer, and cannot be replaced in place; take the result's `model`"
    for place in places(model):
        if id(place.layer) in layers and is_graph(place.parent):
            graph = place.above[-1]
            owner = place.name.rpartition("/")[0]
            whose = f"{owner} ({type(graph).__name__})" if owner else f"the model ({type(graph).__name__})"
            instead = f", for {owner} alone, and put the result's `model` in its place" if owner else ""
            yield (
                f"{place.name} is in the graph of {whose}, which Keras cannot change any more; convert with inplace=False{instead}"
            )
