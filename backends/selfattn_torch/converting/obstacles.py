"""What stands against replacing a layer of a model: said before anything is read or changed."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

__all__ = ["of_layer", "of_model", "referring"]

_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DISTRIBUTED = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def of_model(model: nn.Module, names: Collection[str]) -> Iterator[str]:
    """Why layers at these places cannot be replaced, whatever they hold.

    Args:
        model: the whole.
        names: of places in it, as `named_modules` gives them.
    """
    for name, module in model.named_modules():
        concerned = not name or any(
            f"{one}.".startswith(f"{name}.") or name.startswith(f"{one}.") for one in names
        )
        if not concerned:
            continue
        where = f"{name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            yield f"{where} is compiled; convert the module that it was made from, and compile the result"
        elif isinstance(module, torch.jit.ScriptModule):
            yield f"{where} is scripted or traced; convert the module that it was made from"
        elif any(kind.__name__ in _DISTRIBUTED for kind in type(module).__mro__):
            yield f"{where} is distributed over processes; convert the module inside it before it is wrapped"


def of_layer(name: str, layer: nn.Module, others: Collection[int]) -> Iterator[str]:
    """Why a layer cannot be replaced by another with the same weights.

    Args:
        name: of its place.
        layer: the layer.
        others: `id` of every parameter that a module outside of it has.
    """
    where = f"{name or 'the model'} ({type(layer).__name__})"
    for key, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            yield f"{where}: {key} has no shape yet; run the model once"
        elif tensor.is_meta:
            yield f"{where}: {key} is on the meta device and has no numbers; load the weights first"
        elif hasattr(tensor, "full_tensor"):
            yield f"{where}: {key} is sharded over devices; convert before the model is sharded"
    for key, parameter in layer.named_parameters():
        if id(parameter) in others:
            yield f"{where}: {key} is also a parameter of another module, and the two would part; untie them"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):  # noqa: SLF001 - torch has no other way to ask
            yield f"{where}: {key} has a hook, which has no place in the new layer; remove it and register it there"
    for inner, module in layer.named_modules():
        if "quantized" in type(module).__module__ or any(
            tensor.is_quantized for tensor in itertools.chain(module.parameters(False), module.buffers(False))
        ):
            yield f"{where}: {inner or 'it'} is quantised; convert the floating-point model"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:  # noqa: SLF001 - their common class
            yield f"{where}: {inner} drops out a share of {module.p}, which the new layer would not; set its p to 0 if you can do without"
        hooks = [hook for kind in _CALLED for hook in getattr(module, kind).values()]
        foreign = [hook for hook in hooks if not isinstance(hook, SpectralNorm)]
        if foreign:
            names = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in foreign)
            yield (
                f"{where}: {inner or 'it'} has the hooks {names}, which the new layer would not call; remove them, and register "
                "them on the new layer"
            )


def referring(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[str]:
    """Where modules hold a layer in a plain attribute, which replacing it in place would miss.

    Args:
        model: the whole.
        layers: that would be replaced.
    """
    wanted = {id(layer) for layer in layers}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key != "_modules" and any(id(one) in wanted for one in _held(value)):
                yield (
                    f"{name or 'the model'}.{key} holds a layer that would be replaced, and is no submodule; with inplace=False "
                    "the copy has the new layer there too"
                )


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _held(each)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from _held(each)
