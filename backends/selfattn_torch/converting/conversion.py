"""A model of somebody else's with our layer in the place of its attention layers."""

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
    """Replace the attention layers of a model by `SelfAttention2d`, each with the weights of the one that it replaces.

    Each foreign layer and the one that takes its place are asked for their output and gradients, in evaluation mode, on the
    CPU, in float32 or float64. Both must agree with the definition within the limits of the conformance kit, and with one
    another in training mode. Nothing is replaced unless all do.

    A new layer has the device, dtype, training mode and `requires_grad` of the old one, and its spectral norm with the
    state. It has `query`, `key`, `value` and `gamma` where the old one may have had other names, so an optimiser is made
    after this, and a state dict of the old model goes through `selfattn port --whole`. What the old layer's `.grad` held
    is gone.

    Args:
        model: the network, or a foreign layer itself. In training mode or not, on any device.
        dialect: what the layers are: a name of `selfattn dialects` or a `.toml` file of your own. None is for layers whose keys
            fit a single one, and needs `match`.
        match: which modules: a class or several, a name with * for any text, or a function of name and module; by default
            those that have the keys of the dialect.
        settings: what the tensors do not show, as in `selfattn_core.porting.port`.
        keep_spectral_norm: whether layers that have spectral norm keep it. False divides the kernels by it once.
        returns: "same": a layer that returned (y, A) is replaced by one that does, `SelfAttention2dWithMap`, at N·M numbers
            of memory in each call; "output": every new layer returns y alone.
        block_size: as in `SelfAttention2d`.
        size: (H, W) of the input that both layers are asked; by default two sizes, of which one cuts off windows of pooling.
        inplace: whether `model` itself is changed; otherwise it stays as it is, and the result is a copy.
        dry_run: do everything but replace.

    Returns:
        The model, and for each layer what it was, what it is and how far both are from the definition.

    Raises:
        ConversionError: a PortError whose `report` says which layer computes something else than its dialect says.
        PortError: if no layer is found, or one cannot be replaced; every reason.
        TypeError: if the model is no module.
        ValueError: if an argument cannot be; every one.

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
    """The layers to replace, each once, with all places where it stands."""
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
    # Ours have names that a dialect of ours fits.
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
        # Where `deepcopy` meets an old layer, in whatever holds it, it takes the new one.
        known: dict[int, Any] = {id(layer): new[layer] for layer in layers}
        try:
            return copy.deepcopy(model, detached(model) | known)
        except Exception as error:
            raise PortError(
                f"the model cannot be copied: {type(error).__name__}: {error}. It is as it was; inplace=True needs no copy."
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
            # Past what refused: the holder is to be as it was.
            holder._modules[child] = layer  # noqa: SLF001
        raise PortError(
            f"{name} could not be replaced, and the model is as it was: {type(error).__name__}: {error}."
        ) from error
    return model
