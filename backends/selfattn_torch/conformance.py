"""The PyTorch layer as a backend of the conformance kit."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_torch.layer import SelfAttention2d
from selfattn_torch.weights import from_canonical, to_canonical

Array = NDArray[Any]
Model = tuple[SelfAttention2d, torch.memory_format]


class TorchBackend:
    """`SelfAttention2d`; "channels_last" is torch's memory format of that name, the axes are (B, C, H, W) in both."""

    name = "torch"

    def versions(self) -> Mapping[str, str]:
        """The version of torch."""
        return {"torch": torch.__version__}

    def claims(self) -> frozenset[str]:
        """Everything the kit asks for."""
        return frozenset({"forward", "map", "vjp", "r1", "params"})

    def layouts(self) -> tuple[str, ...]:
        """Both memory formats."""
        return ("channels_first", "channels_last")

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """The layer, and the memory format its inputs come in."""
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        # The specification is the function in evaluation.
        return from_canonical(config, params, dtype=getattr(torch, dtype)).eval(), memory_format

    def forward(self, model: Model, x: Array) -> Array:
        """The output y."""
        with torch.no_grad():
            return _to_numpy(model[0](_to_torch(x, model)))

    def attention_map(self, model: Model, x: Array) -> Array:
        """The map A."""
        with torch.no_grad():
            attention: Array = model[0](_to_torch(x, model), need_weights=True)[1].numpy()
        return attention

    def vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode."""
        inputs = self._inputs(model, x)
        y = model[0](inputs["x"])
        return _gradients(y, inputs, _to_torch(dy, model))

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """The penalty by double backward."""
        inputs = self._inputs(model, x)
        y = model[0](inputs["x"])
        (dx,) = torch.autograd.grad(y, inputs["x"], _to_torch(w, model), create_graph=True)
        penalty = dx.square().sum()
        return penalty.item(), _gradients(penalty, inputs, None)

    def params(self, model: Model) -> Mapping[str, Array]:
        """The weights as the adapter exports them."""
        return to_canonical(model[0])

    def _inputs(self, model: Model, x: Array) -> dict[str, torch.Tensor]:
        layer = model[0]
        names = parameter_table(layer.config)
        inputs = {name: layer.get_parameter(name.replace("kernel", "weight")) for name in names}
        return {"x": _to_torch(x, model).requires_grad_()} | inputs


backend = TorchBackend()


def _to_torch(x: Array, model: Model) -> torch.Tensor:
    maps = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
    return maps.contiguous(memory_format=model[1])


def _to_numpy(maps: torch.Tensor) -> Array:
    return np.ascontiguousarray(maps.detach().permute(0, 2, 3, 1).numpy())


def _gradients(
    output: torch.Tensor, inputs: dict[str, torch.Tensor], cotangent: torch.Tensor | None
) -> dict[str, Array]:
    # A layer whose penalty does not depend on a bias has no gradient there, which is a gradient of zero.
    found = torch.autograd.grad(
        output, list(inputs.values()), cotangent, allow_unused=True, materialize_grads=True
    )
    gradients = {}
    for name, gradient in zip(inputs, found, strict=True):
        if name == "x":
            gradients[name] = _to_numpy(gradient)
        elif name.endswith("kernel"):
            gradients[name] = np.ascontiguousarray(gradient[:, :, 0, 0].T.numpy())
        else:
            gradients[name] = gradient.numpy()
    return gradients
