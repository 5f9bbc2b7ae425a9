"""The tensors of a PyTorch module by the names of its state dict, and the tensors that it computed from its weights."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from selfattn_core.arrays import Array
from selfattn_core.porting.formats.tensors import Entry, TensorInfo, Tensors

__all__ = ["detached", "read", "tensors_of"]


def tensors_of(module: nn.Module, name: str) -> Tensors:
    """The tensors of the module's state dict, in the form of a checkpoint."""
    entries = {}
    left_out = {}
    for key, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not nn.parameter.is_lazy(tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries[key] = Entry(TensorInfo(tuple(tensor.shape), dtype), partial(read, tensor))
        else:
            left_out[key] = f"{key} is a {type(tensor).__name__}"
    where = f"{name or 'the model'} ({type(module).__name__})"
    return Tensors(Path(where), "module", entries, left_out=left_out)


def read(tensor: torch.Tensor) -> Array:
    """A tensor as a new array. bfloat16 is widened."""
    tensor = tensor.detach().cpu()
    return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), order="C")


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in attributes, including those inside lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple | set):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(each)


def detached(module: nn.Module) -> dict[int, Any]:
    """Detached tensors for `deepcopy`, in place of computed weights of the older spectral norm, which torch cannot copy."""
    computed = (
        tensor for each in module.modules() for tensor in _tensors_in(vars(each)) if not tensor.is_leaf
    )
    return {id(tensor): tensor.detach().clone() for tensor in computed}
