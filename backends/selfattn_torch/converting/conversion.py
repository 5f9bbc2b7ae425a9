"""`convert`: replace the attention layers of a model by ours."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from selfattn_core.porting.blocks.find import index_of
from selfattn_core.porting.blocks.keys import normal
from selfattn_core.porting.blocks.match import prefixes
from selfattn_core.porting.dialects.catalogue import dialect as dialect_named
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.networks.conversion import Conversion, check_arguments, nested, no_match, refuse
from selfattn_core.porting.networks.foreign_layer import Options, convert_all
from selfattn_torch.converting import obstacles
from selfattn_torch.converting.foreign import ForeignLayer
from selfattn_torch.converting.tensors import detached, tensors_of
from selfattn_torch.layer import SelfAttention2d

__all__ = ["Match", "convert"]

Match = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]


def convert(
    model: nn.Module,
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
) -> Conversion[nn.Module]:
    """Replace the attention layers of a model by `SelfAttention2d`, with the same weights.

    `convert` compares the output and gradients of each old layer and its replacement with the definition, in evaluation
    mode, on the CPU, in float32 or float64. Both must stay within the limits of the conformance kit. In training mode the
    two must agree with each other. Unless every layer passes, nothing is replaced.

    A new layer keeps the device, dtype, training mode and `requires_grad` of the old one, and its spectral norm with the
    state. Its parameters are named `query`, `key`, `value` and `gamma`. So create the optimiser after `convert`, and send a
    state dict of the old model through `selfattn port --whole`. The old `.grad` values are lost.

    Args:
        model: the network, or a foreign layer itself, in any mode and on any device.
        dialect: dialect of the layers: a name that `selfattn dialects` lists, or your own `.toml` file. None finds the
            dialect by the keys, which must fit only one, and requires `match`.
        match: modules to replace: a class, several classes, a name with * for any text, or a function of name and module.
            By default, all modules that have the keys of the dialect.
        settings: facts that the tensors do not show, as in `selfattn_core.porting.port`.
        keep_spectral_norm: whether layers with spectral norm keep it. False divides the kernels by it once.
        returns: "same" replaces a layer that returns (y, A) by one that does too, `SelfAttention2dWithMap`, at N·M numbers
            of memory in each call. "output" makes every new layer return y alone.
        block_size: see `SelfAttention2d`.
        size: (H, W) of the input for the comparison. By default two sizes; pooling windows do not divide one of them.
        inplace: whether `model` itself is changed. Otherwise the result is a copy.
        dry_run: whether to do everything except replace.

    Returns:
        The model, and for each layer its old class, its new one and the errors of both against the definition.

    Raises:
        ConversionError: if a layer does not compute what its dialect describes. It is a PortError whose `report` names
            the layer.
        PortError: if no layer is found, or one cannot be replaced. It lists every reason.
        TypeError: if the model is not a module.
        ValueError: if arguments are invalid. It lists all of them.

    Example:
        >>> class Attention(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        ...         self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        ...         self.value_conv = nn.Conv2d(channels, channels, 1)
        ...         self.gamma = nn.Parameter(torch.zeros(1))
        ...
        ...     def forward(self, x):
        ...         q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        ...         return self.gamma * (v @ (q.mT @ k).softmax(-1).mT).view_as(x) + x
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Attention(16))
        >>> report = convert(model, dialect="heykeetae", match=Attention)
        >>> report.passed, report.layers[0].names, type(report.model[2]).__name__
        (True, ('2',), 'SelfAttention2d')
    """
    check_arguments(
        match=match,
        kind=nn.Module,
        settings=settings,
        size=size,
        returns=returns,
        dialect=dialect,
        block_size=block_size,
    )
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: got a {type(model).__name__}; expected an nn.Module with its weights.")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        options = Options(settings or {}, keep_spectral_norm, returns, block_size, size)
        return _converted(model, dialect, match, options, inplace=inplace, dry_run=dry_run)


def _converted(
    model: nn.Module,
    dialect: str | None,
    match: Match | None,
    options: Options,
    *,
    inplace: bool,
    dry_run: bool,
) -> Conversion[nn.Module]:
    layers = _found(model, dialect, match)
    places = {name for names in layers.values() for name in names}
    refuse([*obstacles.of_model(model, places), *nested(places)])
    problems: list[str] = []
    for layer, names in layers.items():
        problems += obstacles.of_layer(names[0], layer, _parameters_elsewhere(model, layer))
        problems += obstacles.inner_parts_elsewhere(model, layer, names)
    if inplace:
        problems += obstacles.referring(model, layers)
        if model in layers:
            problems.append(
                "the model itself is the layer, and cannot be replaced in place; take the result's `model`"
            )
    refuse(problems)
    foreign = {layer: partial(ForeignLayer, layer, names, options) for layer, names in layers.items()}
    new, done = convert_all(foreign, dialect)
    if dry_run and inplace:
        return done
    replaced = _replaced(model, layers, new, inplace=inplace)
    return done if dry_run else replace(done, model=replaced)


def _found(model: nn.Module, dialect: str | None, match: Match | None) -> dict[nn.Module, tuple[str, ...]]:
    """The layers to replace, each once, with the names of all its places."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if match is None:
        there = set(prefixes(dialect_named(dialect or ""), index_of(tensors_of(model, ""))))
        names = [name for name in modules if (f"{normal(name)}/" if name else "") in there]
    elif isinstance(match, str):
        names = [name for name in modules if fnmatchcase(name, match)]
    elif isinstance(match, type | tuple):
        names = [name for name, module in modules.items() if isinstance(module, match)]
    else:
        names = [name for name, module in modules.items() if match(name, module)]
    # Our own layers fit a dialect too, so they are left out.
    wanted = {modules[name] for name in names if not isinstance(modules[name], SelfAttention2d)}
    found: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in modules.items():
        if module in wanted:
            found[module] = (*found.get(module, ()), name)
    if not found:
        raise no_match("module", match, dialect, map(type, modules.values()))
    return found


def _parameters_elsewhere(model: nn.Module, layer: nn.Module) -> set[int]:
    inside = set(layer.modules())
    return {
        id(parameter)
        for module in model.modules()
        if module not in inside
        for parameter in module.parameters(recurse=False)
    }


def _replaced(
    model: nn.Module,
    layers: Mapping[nn.Module, tuple[str, ...]],
    new: Mapping[nn.Module, SelfAttention2d],
    *,
    inplace: bool,
) -> nn.Module:
    if not inplace:
        # Wherever `deepcopy` finds an old layer, it takes the new one.
        known: dict[int, Any] = {id(layer): new[layer] for layer in layers}
        try:
            return copy.deepcopy(model, detached(model) | known)
        except Exception as error:
            raise PortError(
                f"the model cannot be copied: {type(error).__name__}: {error}. It is unchanged. inplace=True needs no copy."
            ) from error
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for layer, names in layers.items():
            for name in names:
                parent, _, child = name.rpartition(".")
                done.append((model.get_submodule(parent), child, layer))
                setattr(model.get_submodule(parent), child, new[layer])
    except Exception as error:
        for holder, child, layer in done:
            # Restore the holder directly, past the `__setattr__` that refused.
            holder._modules[child] = layer  # noqa: SLF001
        raise PortError(
            f"{name} could not be replaced: {type(error).__name__}: {error}. The model is unchanged."
        ) from error
    return model
