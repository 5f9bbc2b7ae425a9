"""`convert`: replace the attention layers of an NNX model by ours."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import flax.linen
from flax import nnx

from selfattn_core.porting.blocks.find import index_of
from selfattn_core.porting.blocks.keys import normal
from selfattn_core.porting.blocks.match import prefixes
from selfattn_core.porting.dialects.catalogue import dialect as dialect_named
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.networks.conversion import Conversion, check_arguments, nested, no_match, refuse
from selfattn_core.porting.networks.foreign_layer import Options, convert_all
from selfattn_flax.converting import obstacles
from selfattn_flax.converting.foreign import ForeignLayer
from selfattn_flax.converting.places import copied, places, put
from selfattn_flax.converting.tensors import forms_of
from selfattn_flax.nnx.layer import SelfAttention2D

__all__ = ["Match", "convert"]

Match = type[nnx.Module] | tuple[type[nnx.Module], ...] | str | Callable[[str, nnx.Module], bool]
Found = dict[int, tuple[nnx.Module, tuple[str, ...]]]


def convert(
    model: nnx.Module,
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
) -> Conversion[nnx.Module]:
    """Replace the attention layers of an NNX model by `SelfAttention2D`, with the same weights.

    `convert` compares the output and gradients of each old layer and its replacement with the definition, in evaluation
    mode, on the CPU, in float32 or float64. Both must stay within the limits of the conformance kit. In training mode the
    two must agree with each other. Unless every layer passes, nothing is replaced.

    A new layer keeps the devices, dtypes, precision and training mode of the old one, the types and metadata of its
    variables, and its spectral norm with the state. Its parameters are named `query`, `key`, `value` and `gamma`. So create
    the optimiser after `convert`, and restore a checkpoint of the old model before. Random streams of the model do not
    advance.

    Linen modules hold no weights. Convert their parameters with `selfattn port`, and use
    `selfattn_flax.linen.SelfAttention2D` in the code of the model.

    Args:
        model: the network, or a foreign layer itself, on maps (…, H, W, C), in any mode and on any device.
        dialect: dialect of the layers: a name that `selfattn dialects` lists, or your own `.toml` file. Its keys are those of
            a checkpoint of the NNX model. None finds the dialect by the keys, which must fit only one, and requires `match`.
        match: modules to replace: a class, several classes, a name such as "blocks.*.attention" with * for any text, or a
            function of name and module. By default, all modules that have the keys of the dialect.
        settings: facts that the tensors do not show, as in `selfattn_core.porting.port`.
        keep_spectral_norm: whether layers with spectral norm keep it. False divides the kernels by it once.
        returns: "same" replaces a layer that returns (y, A) by one that does too, `SelfAttention2DWithMap`, at N·M numbers
            of memory in each call. "output" makes every new layer return y alone.
        block_size: see `SelfAttention2D`.
        size: (H, W) of the input for the comparison. By default two sizes; pooling windows do not divide one of them.
        inplace: whether `model` itself is changed. Otherwise the result is a copy that shares no array with it.
        dry_run: whether to do everything except replace. Without `inplace` the copy is still made, and dropped.

    Returns:
        The model, and for each layer its old class, its new one and the errors of both against the definition.

    Raises:
        ConversionError: if a layer does not compute what its dialect describes. It is a PortError whose `report` names
            the layer.
        PortError: if no layer is found, one cannot be replaced, or the model cannot be copied or changed. It lists every
            reason.
        TypeError: if the model is not an `nnx.Module`. A Linen module is not one.
        ValueError: if other arguments are invalid. It lists all of them.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> class Attention(nnx.Module):
        ...     def __init__(self, channels, rngs):
        ...         self.query = nnx.Conv(channels, channels // 8, (1, 1), rngs=rngs)
        ...         self.key = nnx.Conv(channels, channels // 8, (1, 1), rngs=rngs)
        ...         self.value = nnx.Conv(channels, channels, (1, 1), rngs=rngs)
        ...         self.gamma = nnx.Param(jnp.zeros(1))
        ...
        ...     def __call__(self, x):
        ...         q, k, v = (conv(x).reshape(len(x), -1, conv.out_features) for conv in (self.query, self.key, self.value))
        ...         return self.gamma[...] * (jax.nn.softmax(q @ k.mT) @ v).reshape(x.shape) + x
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Conv(3, 16, (3, 3), rngs=rngs), nnx.relu, Attention(16, rngs))
        >>> report = convert(model, dialect="flax", match=Attention)
        >>> report.passed, report.layers[0].names, type(report.model.layers[2]).__name__
        (True, ('layers.2',), 'SelfAttention2D')
    """
    check_arguments(
        match=match,
        kind=nnx.Module,
        settings=settings,
        size=size,
        returns=returns,
        dialect=dialect,
        block_size=block_size,
    )
    _check_model(model)
    chosen = None if dialect is None else dialect_named(dialect)
    refuse(list(obstacles.of_model(model)))
    found = _found(model, chosen, match)
    names = {name for _, each in found.values() for name in each}
    refuse(nested(names))
    problems: list[str] = []
    for layer, each in found.values():
        problems += obstacles.of_layer(each[0], layer, model)
    problems += obstacles.referring(model, [layer for layer, _ in found.values()], inplace=inplace)
    if inplace and id(model) in found:
        problems.append(
            "the model itself is the layer, and cannot be replaced in place; take the result's `model`"
        )
    refuse(problems)
    options = Options(settings or {}, keep_spectral_norm, returns, block_size, size)
    foreign = {number: partial(ForeignLayer, layer, each, options) for number, (layer, each) in found.items()}
    new, done = convert_all(foreign, dialect)
    if dry_run and inplace:
        return done
    changed = _replaced(model, found, new, inplace=inplace)
    return done if dry_run else replace(done, model=changed)


def _check_model(model: Any) -> None:
    if isinstance(model, nnx.Module):
        return
    kind = f"a {type(model).__module__.partition('.')[0]} {type(model).__name__}"
    advice = "expected an nnx.Module."
    if isinstance(model, flax.linen.Module):
        kind = f"the Linen module {type(model).__name__}"
        advice = (
            "which describes a model and holds no weights. Convert its parameters with `selfattn port`, and use "
            "selfattn_flax.linen.SelfAttention2D in the code of the model."
        )
    elif hasattr(model, "__wrapped__"):
        advice = "expected an nnx.Module: convert the module that it was made from, and compile the result."
    raise TypeError(f"convert: got {kind}, {advice}")


def _found(model: nnx.Module, chosen: Dialect | None, match: Match | None) -> Found:
    """The layers to replace by their `id`, each once, with the names of all its places."""
    modules = [(name, node) for name, node in places(model) if isinstance(node, nnx.Module)]
    if match is None:
        forms = forms_of(model, "")
        # `check_arguments` requires `dialect` or `match`.
        there = {prefix for tensors in forms for prefix in prefixes(chosen, index_of(tensors))}  # type: ignore[arg-type]
        # A shared layer has its keys only at the first of its places.
        wanted = {id(node) for name, node in modules if (f"{normal(name)}/" if name else "") in there}
        matched = [(name, node) for name, node in modules if id(node) in wanted]
    elif isinstance(match, str):
        pattern = match.replace("/", ".")
        matched = [(name, node) for name, node in modules if fnmatchcase(name, pattern)]
    elif isinstance(match, type | tuple):
        matched = [(name, node) for name, node in modules if isinstance(node, match)]
    else:
        matched = [(name, node) for name, node in modules if match(name, node)]
    found: Found = {}
    for name, node in matched:
        # Our own layers fit a dialect too, so they are left out.
        if not isinstance(node, SelfAttention2D):
            _, names = found.get(id(node), (node, ()))
            found[id(node)] = (node, (*names, name))
    if not found:
        raise no_match("module", match, chosen.name if chosen else None, (type(node) for _, node in modules))
    everywhere: dict[int, list[str]] = {}
    for name, node in modules:
        everywhere.setdefault(id(node), []).append(name)
    return {number: (node, tuple(everywhere[number])) for number, (node, _) in found.items()}


def _replaced(model: nnx.Module, found: Found, new: Mapping[int, nnx.Module], *, inplace: bool) -> nnx.Module:
    if id(model) in found:
        return new[id(model)]
    if inplace:
        put(model, new)
        return model
    try:
        twin = copied(model)
    except Exception as error:
        raise PortError(
            f"nothing was replaced, because the model cannot be copied ({type(error).__name__}: {error}); convert with inplace=True"
        ) from error
    # The model and its copy have their modules at the same paths.
    paths = {path: id(node) for path, node in nnx.iter_graph(model) if id(node) in found}
    put(twin, {id(node): new[paths[path]] for path, node in nnx.iter_graph(twin) if path in paths})
    return twin
