"""Reasons why a layer of a model cannot be replaced, found before anything is changed."""

import functools
import itertools
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

__all__ = ["inner_parts_elsewhere", "of_layer", "of_model", "referring"]

_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DISTRIBUTED = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def of_model(model: nn.Module, names: Collection[str]) -> Iterator[str]:
    """Reasons why layers at these places cannot be replaced, whatever the layers are.

    Args:
        model: the whole model.
        names: names of the places, from `named_modules`.
    """
    for name, module in model.named_modules():
        concerned = not name or any(
            f"{one}.".startswith(f"{name}.") or name.startswith(f"{one}.") for one in names
        )
        if not concerned:
            continue
        where = f"{name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            yield f"{where} is compiled; convert the module inside it, and compile the result"
        elif isinstance(module, torch.jit.ScriptModule):
            yield f"{where} is scripted or traced; convert the module that it was made from"
        elif "forward" in vars(module):
            yield f"{where} has a function in the place of its forward, and a copy would share it; delete it before convert"
        elif hasattr(module, "_checkpoint_wrapped_module"):
            yield f"{where} is wrapped for activation checkpointing; convert the inner module before wrapping it"
        elif any(kind.__name__ in _DISTRIBUTED for kind in type(module).__mro__):
            yield f"{where} is distributed over processes; convert the inner module before wrapping it"


def of_layer(name: str, layer: nn.Module, others: Collection[int]) -> Iterator[str]:
    """Reasons why a layer cannot be replaced by another with the same weights.

    Args:
        name: name of its place.
        layer: the layer.
        others: `id` of every parameter that a module outside the layer has.
    """
    where = f"{name or 'the model'} ({type(layer).__name__})"
    yield from _of_tensors(where, layer, others)
    yield from _of_parts(where, layer)


def _of_tensors(where: str, layer: nn.Module, others: Collection[int]) -> Iterator[str]:
    dtypes = {str(each.dtype).removeprefix("torch.") for each in layer.parameters()}
    if len(dtypes) > 1:
        yield f"{where}: its parameters are {' and '.join(sorted(dtypes))}; the new layer has one dtype, so use layer.to(dtype)"
    places: dict[int, list[str]] = {}
    for key, parameter in layer.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(key)
    for keys in places.values():
        if len(keys) > 1:
            yield f"{where}: {' and '.join(keys)} are one parameter, and would become several; untie them"
    for key, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            yield f"{where}: {key} has no shape yet; run the model once"
        elif tensor.is_meta:
            yield f"{where}: {key} is on the meta device and has no numbers; load the weights first"
        elif hasattr(tensor, "full_tensor"):
            yield f"{where}: {key} is sharded over devices; convert before the model is sharded"
    for key, parameter in layer.named_parameters():
        if id(parameter) in others:
            yield f"{where}: {key} is also a parameter of another module, and would no longer be shared; untie them"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):  # noqa: SLF001 - torch has no other way to ask
            yield f"{where}: {key} has a hook, which the new layer would lose; remove it, and register it on the new layer"


def _of_parts(where: str, layer: nn.Module) -> Iterator[str]:
    if any(module.training != layer.training for module in layer.modules()):
        yield f"{where}: some of its parts are in another mode than the layer; call train() or eval() on the layer"
    for inner, module in layer.named_modules():
        if "quantized" in type(module).__module__ or any(
            tensor.is_quantized for tensor in itertools.chain(module.parameters(False), module.buffers(False))
        ):
            yield f"{where}: {inner or 'it'} is quantised; convert the floating-point model"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:  # noqa: SLF001 - their common class
            yield f"{where}: {inner} drops out a share of {module.p}, and the new layer has no dropout; set its p to 0"
        hooks = [hook for kind in _CALLED for hook in getattr(module, kind).values()]
        foreign = [hook for hook in hooks if not isinstance(hook, SpectralNorm)]
        if foreign:
            names = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in foreign)
            yield (
                f"{where}: {inner or 'it'} has the hooks {names}, which the new layer would not call; remove them, and register "
                "them on the new layer"
            )


def inner_parts_elsewhere(model: nn.Module, layer: nn.Module, names: Sequence[str]) -> Iterator[str]:
    """Places outside a layer that also hold a part of it, and would keep the old weights.

    Args:
        model: the whole model.
        layer: the layer to be replaced.
        names: names of its places.
    """
    parts = {module: name for name, module in layer.named_modules() if module is not layer}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{place}." if place else place) for place in names)
        if module in parts and not inside:
            yield f"{names[0] or 'the model'} ({type(layer).__name__}): its {parts[module]} is also {name}, and would no longer be shared"


def referring(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[str]:
    """Plain attributes that hold a layer, which a replacement in place would miss.

    Args:
        model: the whole model.
        layers: the layers to be replaced.
    """
    parts = itertools.chain.from_iterable((*layer.modules(), *layer.parameters()) for layer in layers)
    wanted = {id(part) for part in parts}
    inside = {id(module) for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        for key, value in vars(module).items():
            if key not in ("_modules", "_parameters") and any(id(one) in wanted for one in _held(value)):
                yield (
                    f"{name or 'the model'}.{key} holds a layer to be replaced, or a part of it, but is not a submodule; use "
                    "inplace=False, which puts the new layer there too"
                )


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, nn.Module | nn.Parameter):
        yield value
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from _held([value.func, value.args, value.keywords])
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _held(each)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from _held(each)
