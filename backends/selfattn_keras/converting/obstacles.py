"""What stands against replacing a layer of a model: said before anything is read or changed."""

from collections.abc import Collection, Iterator
from typing import Any

import keras

from selfattn_keras.converting.asking import everything_in
from selfattn_keras.converting.places import Place, is_graph, places

__all__ = ["in_graphs", "of_layer", "of_model"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def of_model(model: Any) -> Iterator[str]:
    """Why no layer of it can be replaced.

    Args:
        model: what was given.
    """
    if not isinstance(model, keras.layers.Layer):
        yield (
            f"got a {type(model).__module__}.{type(model).__qualname__}; expected a model or a layer of Keras 3. A model of Keras 2, of "
            "tf_keras too, goes through a file: `selfattn inspect` and `selfattn port` read it"
        )
    elif keras.distribution.distribution() is not None:
        yield "keras.distribution.set_distribution is in force; convert before the model is distributed"


def of_layer(model: Any, place: Place, *, keep_spectral_norm: bool) -> Iterator[str]:
    """Why a layer cannot be replaced by another with the same weights.

    Args:
        model: the whole.
        place: of the layer.
        keep_spectral_norm: as in `convert`.
    """
    layer = place.layer
    where = f"{place.name or 'the model'} ({type(layer).__name__})"
    if not layer.built or not layer.variables:
        yield f"{where}: has no weights yet; build it, or call the model once on an input"
        return
    inside = everything_in(layer)
    policies = [each.dtype_policy for each in inside]
    if isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
        yield f"{where}: has a table of dtype policies; give it the one that its layers have"
    for each, policy in zip(inside, policies, strict=True):
        own = "it" if each is layer else each.name
        if each.quantization_mode is not None or policy.quantization_mode is not None:
            yield f"{where}: {own} is quantised ({each.quantization_mode}); convert the floating-point model"
        if getattr(each, "lora_enabled", False):
            yield f"{where}: {own} has a low-rank adapter (LoRA); save the model and load it again, which merges it"
        if each.activity_regularizer is not None and each is not layer:
            yield f"{where}: {own} has an activity_regularizer, for which the new layer has no place; remove it"
        if keep_spectral_norm and isinstance(each, keras.layers.SpectralNormalization):
            yield (
                f"{where}: {own} is a SpectralNormalization, which overwrites the kernel in training, as no layer of ours does; with "
                "keep_spectral_norm=False the kernels stay as they are, and training goes on without it"
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


def _shared(model: Any, layer: Any, where: str) -> Iterator[str]:
    """What is inside of the layer, and outside too."""
    inside = {id(each) for each in everything_in(layer)}
    variables = {id(each): each for each in layer.variables}
    for each in everything_in(model):
        if id(each) in inside:
            continue
        below = everything_in(each)
        children = [child for child in each._layers if id(child) in inside and child is not layer]  # noqa: SLF001
        for child in children:
            yield f"{where}: {child.name} is a layer of {each.name} too, and the two would part; give each its own"
        nested = {id(one) for child in below[1:] for one in child.variables}
        for one in each.variables:
            if id(one) in variables and id(one) not in nested:
                yield f"{where}: {one.path} is a variable of {each.name} too, and the two would part; give each its own"


def in_graphs(model: Any, layers: Collection[int]) -> Iterator[str]:
    """Why layers cannot be replaced in place.

    Args:
        model: the whole.
        layers: `id` of each.
    """
    if id(model) in layers:
        yield "the model itself is the layer, and cannot be replaced in place; take the result's `model`"
    for place in places(model):
        if id(place.layer) in layers and is_graph(place.parent):
            graph = place.above[-1]
            owner = place.name.rpartition("/")[0]
            whose = f"{owner} ({type(graph).__name__})" if owner else f"the model ({type(graph).__name__})"
            instead = f", for {owner} alone, and give the result's `model` to what holds it" if owner else ""
            yield (
                f"{place.name} is in the graph of {whose}, which Keras cannot change any more; convert with inplace=False{instead}"
            )
