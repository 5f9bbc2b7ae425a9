"""A Keras layer with the way its functions are called, and conversions between arrays and tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import keras
import numpy as np

from selfattn_core import parameter_table
from selfattn_core.arrays import Array, widen
from selfattn_keras.layer import SelfAttention2D, Tensor
from selfattn_keras.weights import variable

__all__ = ["Model", "to_array"]


@dataclass(frozen=True)
class Model:
    """A layer, and the way its functions are called.

    Args:
        layer: the layer.
        way: "eager" runs each operation by itself, "graph" a function of the framework, "compiled" uses XLA.
        kept: functions already made for this layer in this way, by name.
    """

    layer: SelfAttention2D
    way: Literal["eager", "graph", "compiled"] = "eager"
    kept: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The canonical names of its parameters."""
        return list(parameter_table(self.layer.config))

    @property
    def values(self) -> list[Tensor]:
        """Its parameters, in that order."""
        return [variable(self.layer, name).value for name in self.names]

    def given(self, x: Array) -> Tensor:
        """Maps (B, H, W, C) as the layer's input."""
        maps = x if self.layer.data_format == "channels_last" else x.transpose(0, 3, 1, 2)
        return keras.ops.convert_to_tensor(np.array(maps, order="C"), dtype=self.layer.compute_dtype)

    def like(self, name: str, array: Array) -> Tensor:
        """An array of canonical shape, as a tensor in the shape that Keras uses."""
        if name == "x":
            return self.given(array)
        own = np.array(array, order="C").reshape(variable(self.layer, name).shape)
        return keras.ops.convert_to_tensor(own, dtype=self.layer.variable_dtype)

    def maps(self, maps: Tensor) -> Array:
        """The layer's output as (B, H, W, C)."""
        array = to_array(maps)
        return (
            array
            if self.layer.data_format == "channels_last"
            else np.array(array.transpose(0, 2, 3, 1), order="C")
        )

    def named(self, gradients: list[Tensor]) -> dict[str, Array]:
        """The gradients of x and of the parameters."""
        rows = parameter_table(self.layer.config).values()
        parameters = {
            row.name: to_array(gradient).reshape(row.shape)
            for row, gradient in zip(rows, gradients[1:], strict=True)
        }
        return {"x": self.maps(gradients[0])} | parameters


def to_array(tensor: Tensor) -> Array:
    """The tensor as a new array. bfloat16 is widened."""
    return np.array(widen(np.asarray(keras.ops.convert_to_numpy(tensor))))
