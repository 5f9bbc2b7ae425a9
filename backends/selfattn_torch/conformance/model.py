"""A PyTorch layer with the way it is called, and conversions between arrays and tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from selfattn_core import parameter_table
from selfattn_core.arrays import Array
from selfattn_torch.layer import SelfAttention2d

__all__ = ["Model", "like", "maps_to_array", "to_array"]


@dataclass(frozen=True)
class Model:
    """A layer, and the way it is called.

    Args:
        layer: the layer.
        call: the layer, or its compiled form.
        memory_format: memory format of its inputs.
    """

    layer: SelfAttention2d
    call: Callable[..., Any]
    memory_format: torch.memory_format

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.layer.gamma.dtype

    def given(self, x: Array) -> torch.Tensor:
        """Maps (B, H, W, C) as the layer's input."""
        maps = torch.from_numpy(np.array(x)).to(self.layer.gamma.device, self.dtype).permute(0, 3, 1, 2)
        return maps.contiguous(memory_format=self.memory_format)

    def inputs(self, x: Array) -> dict[str, torch.Tensor]:
        """The tensors to differentiate by: x, and the parameters by canonical name."""
        names = parameter_table(self.layer.config)
        parameters = {name: self.layer.get_parameter(name.replace("kernel", "weight")) for name in names}
        return {"x": self.given(x).requires_grad_()} | parameters


def to_array(tensor: torch.Tensor) -> Array:
    """The tensor as a new array. bfloat16 is widened."""
    wide = tensor.detach()
    wide = wide.float() if wide.dtype == torch.bfloat16 else wide
    return np.array(wide.cpu().numpy(), order="C")


def maps_to_array(maps: torch.Tensor) -> Array:
    """(B, C, H, W) as (B, H, W, C)."""
    return to_array(maps.permute(0, 2, 3, 1))


def like(tensor: torch.Tensor, name: str, array: Array) -> torch.Tensor:
    """An array of canonical shape, as a tensor in the shape that torch uses."""
    given = torch.from_numpy(np.array(array)).to(tensor.device, tensor.dtype)
    if name == "x":
        return given.permute(0, 3, 1, 2)
    return (given.mT if name.endswith("kernel") else given).reshape(tensor.shape)
