"""`convert`: replace the attention layers of a model by ours."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import keras

from selfattn_core.porting.blocks.find import index_of
from selfattn_core.porting.blocks.match import prefixes
from selfattn_core.porting.dialects.catalogue import dialect as dialect_named
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.networks.conversion import Conversion, check_arguments, no_match, refuse
from selfattn_core.porting.networks.foreign_layer import Options, convert_all
from selfattn_keras.converting import obstacles
from selfattn_keras.converting.answers import everything_in
from selfattn_keras.converting.copying import copied
from selfattn_keras.converting.foreign import ForeignLayer
from selfattn_keras.converting.places import Place, in_place, places, settled
from selfattn_keras.converting.tensors import stored
from selfattn_keras.layer import SelfAttention2D

__all__ = ["Match", "convert"]

Match = (
    type[keras.layers.Layer]
    | tuple[type[keras.layers.Layer], ...]
    | str
    | Callable[[str, keras.layers.Layer], bool]
)


def convert(
    model: Any,
    *,
    dialect: str | None = None,
    match: Match | None = None,
    settings: Mapping[str, str | bool | float] | None = None,
    keep_spectral_norm: bool = True,
    returns: Literal["same", "output"] = "same",
    block_size: int | None = None,
    size: tuple[int, int] | None = None,
    inplace: bool = False,
    dry_run: bool = False,
) -> Conversion[Any]:
    """Replace the attention layers of a model by `SelfAttention2D`, with the same weights.

    `convert` compares the output and gradients of each old layer and its replacement with the definition, in evaluation, on
    the CPU, in float32 or float64. Both must stay within the limits of the conformance kit. In training the two must agree
    with each other. Unless every layer passes, nothing is replaced.

    A new layer keeps the name, dtype policy, device, data format and trainable flags of the old one, the constraints and
    regularizers of its variables, and its spectral norm with the state. Its parameters are named `query`, `key`, `value` and
    `gamma`, so load a weights file of the old model before `convert`. The result is not compiled, because an optimizer has
    no state for the new variables.

    The copy is made as Keras makes one, with all weights: by `keras.models.clone_model` for a functional or sequential
    model, and by `get_config` for any other layer. If the copy would differ from the model, nothing is done.

    Args:
        model: the network, or a foreign layer itself, built.
        dialect: dialect of the layers: a name that `selfattn dialects` lists, or your own `.toml` file. Its keys are those of
            a `.weights.h5` file of the layer alone. None finds the dialect by the keys, which must fit only one, and
            requires `match`.
        match: layers to replace: a class, several classes, a name like "generator/attention_*" with * for any text, or a
            function of name and layer. By default, all layers that have the keys of the dialect.
        settings: facts that the tensors do not show, as in `selfattn_core.porting.port`.
        keep_spectral_norm: whether layers with spectral norm keep it. False divides the kernels by it once, and leaves
            those of `keras.layers.SpectralNormalization` as evaluation applies them.
        returns: "same" replaces a layer that returns (y, A) by one that does too, `SelfAttention2DWithMap`, at N·M numbers
            of memory in each call. "output" makes every new layer return y alone.
        block_size: see `SelfAttention2D`.
        size: (H, W) of the input for the comparison. By default two sizes, and the size that the layer was built for if it
            has at most 1024 positions. Both layers must be right at every size at which the old one runs.
        inplace: whether `model` itself is changed. This works for layers in attributes and in lists of them, but not in the
            graph of a functional or sequential model. Otherwise the result is a copy.
        dry_run: whether to do everything except replace.

    Returns:
        The model, and for each layer its old class, its new one and the errors of both against the definition.

    Raises:
        ConversionError: if a layer does not compute what its dialect describes. It is a PortError whose `report` names
            the layer.
        PortError: if no layer is found, one cannot be replaced, or the model cannot be copied. It lists every reason.
        ValueError: if an argument is invalid, or neither `dialect` nor `match` is given.

    Example:
        >>> class Attention(keras.layers.Layer):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.conv_theta = keras.layers.Conv2D(channels // 8, 1)
        ...         self.conv_phi = keras.layers.Conv2D(channels // 8, 1)
        ...         self.conv_g = keras.layers.Conv2D(channels // 2, 1)
        ...         self.conv_attn_g = keras.layers.Conv2D(channels, 1)
        ...         self.sigma = self.add_weight(shape=(1,), initializer="zeros", name="sigma")
        ...
        ...     def call(self, x):
        ...         maps = self.conv_theta(x), *(keras.ops.max_pool(f(x), 2, 2) for f in (self.conv_phi, self.conv_g))
        ...         q, k, v = (keras.ops.reshape(m, (-1, m.shape[1] * m.shape[2], m.shape[3])) for m in maps)
        ...         attended = keras.ops.softmax(q @ keras.ops.transpose(k, (0, 2, 1))) @ v
        ...         maps = keras.ops.reshape(attended, (-1, *x.shape[1:3], v.shape[-1]))
        ...         return x + self.sigma * self.conv_attn_g(maps)
        >>> layers = keras.Input((8, 12, 3)), keras.layers.Conv2D(16, 3, padding="same"), Attention(16)
        >>> report = convert(keras.Sequential(layers), dialect="keras-book", match=Attention)
        >>> report.passed, type(report.model.layers[1]).__name__
        (True, 'SelfAttention2D')
    """
    check_arguments(
        match=match,
        kind=keras.layers.Layer,
        settings=settings,
        size=size,
        returns=returns,
        dialect=dialect,
        block_size=block_size,
    )
    refuse(list(obstacles.of_model(model)))
    layers = _found(model, dialect, match)
    refuse(_nested(layers))
    problems: list[str] = []
    for standing in layers:
        problems += obstacles.of_layer(model, standing[0], keep_spectral_norm=keep_spectral_norm)
        problems += obstacles.of_callers(standing)
    if inplace:
        problems += obstacles.in_graphs(model, {id(standing[0].layer) for standing in layers})
    refuse(problems)
    options = Options(settings or {}, keep_spectral_norm, returns, block_size, size)
    foreign = {
        id(standing[0].layer): partial(
            ForeignLayer, standing[0].layer, tuple(place.name for place in standing), options
        )
        for standing in layers
    }
    new, done = convert_all(foreign, dialect)
    if any(isinstance(each, keras.Model) and each.compiled for each in everything_in(model)):
        note = "the model was compiled, and its optimizer is not carried over: call compile again"
        first, *others = done.layers
        done = replace(done, layers=(replace(first, notes=(*first.notes, note)), *others))
    if inplace:
        return done if dry_run else replace(done, model=_replaced(model, layers, new))
    copy = copied(model, new)
    return done if dry_run else replace(done, model=copy)


def _found(model: Any, dialect: str | None, match: Match | None) -> list[list[Place]]:
    """The layers to replace, each with all its places."""
    everywhere = list(places(model))
    if match is None:
        chosen = dialect_named(dialect or "")
        fits = {id(each) for each in everything_in(model) if _fits(each, chosen)}
        taken = [place for place in everywhere if id(place.layer) in fits]
    elif isinstance(match, str):
        taken = [place for place in everywhere if fnmatchcase(place.name, match)]
    elif isinstance(match, type | tuple):
        taken = [place for place in everywhere if isinstance(place.layer, match)]
    else:
        taken = [place for place in everywhere if match(place.name, place.layer)]
    found: dict[int, list[Place]] = {}
    for place in taken:
        # Our own layers fit a dialect too, so they are left out.
        if not isinstance(place.layer, SelfAttention2D):
            found.setdefault(id(place.layer), [])
    for place in everywhere:
        if id(place.layer) in found:
            found[id(place.layer)].append(place)
    if not found:
        unbuilt = ", and some have no weights until the model is called" if not model.built else ""
        raise no_match("layer", match, dialect, (type(place.layer) for place in everywhere), unbuilt)
    return list(found.values())


def _fits(layer: Any, dialect: Dialect) -> bool:
    """Whether a layer's own keys are those of the dialect."""
    if not layer.built or len(layer.variables) < len(dialect.variants[0].roles):
        return False
    tensors, _ = stored(layer, f"{layer.name} ({type(layer).__name__})")
    return "" in prefixes(dialect, index_of(tensors))


def _nested(layers: list[list[Place]]) -> list[str]:
    matched = {id(standing[0].layer): standing[0].name or "the model" for standing in layers}
    return [
        f"{place.name} lies inside {matched[id(outer)]}, and both match; narrow match="
        for standing in layers
        for place in standing
        for outer in place.above
        if id(outer) in matched
    ]


def _replaced(model: Any, layers: list[list[Place]], new: Mapping[int, SelfAttention2D]) -> Any:
    done: list[Place] = []
    try:
        for standing in layers:
            for place in standing:
                in_place(place.parent, place.keys, new[id(place.layer)])
                done.append(place)
    except Exception as error:
        for each in reversed(done):
            in_place(each.parent, each.keys, each.layer)
        refuse([f"{place.name} cannot be set: {type(error).__name__}: {error}"])
    settled(model, list(new.values()))
    return model
