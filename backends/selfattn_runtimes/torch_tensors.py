"""Conversion between numpy and PyTorch, including ml_dtypes' bfloat16, which `torch.from_numpy` does not accept."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["from_numpy", "to_numpy"]


def from_numpy(array: NDArray[Any]) -> torch.Tensor:
    """The array as a tensor of the same dtype."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A copy of the tensor as an array. bfloat16 becomes float32."""
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
    return array
