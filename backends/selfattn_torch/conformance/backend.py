"""The PyTorch layer as a backend of the conformance kit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import DTYPES
from selfattn_core.conformance.protocol import ABILITIES
from selfattn_ops.devices.torch import OnDevices
from selfattn_torch.conformance.model import Model, like, maps_to_array, to_array
from selfattn_torch.layer import SelfAttention2d
from selfattn_torch.weights import from_canonical, to_canonical


class TorchBackend(OnDevices):
    """`SelfAttention2d`. "channels_last" is torch's memory format; the axes are (B, C, H, W) in both layouts."""

    name = "torch"

    def versions(self) -> Mapping[str, str]:
        """The version of torch."""
        return {"torch": torch.__version__}

    def claims(self) -> frozenset[str]:
        """Everything the kit asks for."""
        return frozenset(ABILITIES)

    def layouts(self) -> tuple[str, ...]:
        """Both memory formats."""
        return ("channels_first", "channels_last")

    def dtypes(self) -> tuple[str, ...]:
        """All dtypes of the kit that the device has."""
        return tuple(dtype for dtype in DTYPES if dtype != "float64" or not self.device.startswith("mps"))

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """The layer, and the memory format of its inputs."""
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        # The definition is the function in evaluation mode.
        layer = from_canonical(config, params, device=self.device, dtype=getattr(torch, dtype)).eval()
        return Model(layer, layer, memory_format)

    def update(self, model: Model, params: Mapping[str, Array]) -> Model:
        """The same layer, with its weights overwritten as when a checkpoint is loaded."""
        model.layer.load_state_dict(from_canonical(model.layer.config, params).state_dict())
        return model

    def forward(self, model: Model, x: Array) -> Array:
        """The output y."""
        with torch.no_grad():
            return maps_to_array(self.noted(model.call(model.given(x))))

    def attention_map(self, model: Model, x: Array) -> Array:
        """The map A."""
        with torch.no_grad():
            return to_array(self.noted(model.call(model.given(x), need_weights=True)[1]))

    def vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode."""
        inputs = model.inputs(x)
        return self._gradients(model.call(inputs["x"]), inputs, model.given(dy))

    def params(self, model: Model) -> Mapping[str, Array]:
        """The weights as the adapter exports them."""
        for parameter in model.layer.parameters():
            self.noted(parameter)
        return to_canonical(model.layer)

    def initial(self, config: SelfAttentionConfig, seed: int) -> Mapping[str, Array]:
        """A new layer."""
        kind, _, index = self.device.partition(":")
        forked: dict[str, Any] = (
            {"devices": []} if kind in ("cpu", "mps") else {"devices": [int(index)], "device_type": kind}
        )
        with torch.random.fork_rng(**forked):
            torch.manual_seed(seed)
            layer = SelfAttention2d.from_config(config, device=self.device)
        self.noted(layer.gamma)
        return to_canonical(layer)

    def training_pass(self, model: Model, x: Array) -> Mapping[str, Array]:
        """The output in training mode, and the state dict after it."""
        model.layer.train()
        y = model.call(model.given(x))
        model.layer.eval()
        return {"y": maps_to_array(self.noted(y)), **to_canonical(model.layer)}

    def training_vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode, in training mode."""
        model.layer.train()
        gradients = self.vjp(model, x, dy)
        model.layer.eval()
        return gradients

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """The penalty by double backward."""
        inputs = model.inputs(x)
        y = model.call(inputs["x"])
        (dx,) = torch.autograd.grad(y, inputs["x"], model.given(w), create_graph=True)
        penalty = dx.square().sum()
        return penalty.item(), self._gradients(penalty, inputs, None)

    def vjp_of_vjp(
        self, model: Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Second derivatives by double backward."""
        inputs = model.inputs(x)
        cotangent = model.given(dy).requires_grad_()
        y = model.call(inputs["x"])
        first = torch.autograd.grad(
            y, list(inputs.values()), cotangent, create_graph=True, materialize_grads=True
        )
        terms = [
            (gradient * like(gradient, name, cotangents[name])).sum()
            for name, gradient in zip(inputs, first, strict=True)
        ]
        return self._gradients(torch.stack(terms).sum(), {"dy": cotangent} | inputs, None)

    def compiled(self, model: Model) -> Model:
        """The layer compiled by `torch.compile` as one graph."""
        # All layers share the code of one method, of which torch keeps eight compiled forms and refuses a ninth.
        torch.compiler.reset()
        return replace(model, call=torch.compile(model.layer, fullgraph=True))

    def saved(self, model: Model, folder: str) -> Model:
        """The layer after `torch.save` and `torch.load` of the state dict."""
        path = Path(folder) / "layer.pt"
        torch.save(model.layer.state_dict(), path)
        layer = SelfAttention2d.from_config(model.layer.config, device=self.device, dtype=model.dtype)
        layer.load_state_dict(torch.load(path, weights_only=True))
        return replace(model, layer=layer.eval(), call=layer)

    def per_sample_vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients per sample, by `torch.func.vmap` over the gradient."""
        names = list(parameter_table(model.layer.config))
        parameters = {key: tensor.detach() for key, tensor in model.layer.named_parameters()}

        def inner(x: torch.Tensor, parameters: dict[str, torch.Tensor], dy: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.func.functional_call(model.layer, parameters, (x,))
            return (y * dy).sum()

        gradient = torch.func.vmap(torch.func.grad(inner, argnums=(0, 1)), in_dims=(0, None, 0))
        by_x, by_parameters = gradient(model.given(x), parameters, model.given(dy))
        found = {"x": maps_to_array(self.noted(by_x))}
        for name in names:
            tensor = by_parameters[name.replace("kernel", "weight")]
            found[name] = to_array(tensor[..., 0, 0].mT if name.endswith("kernel") else tensor)
        return found

    def _gradients(
        self, output: torch.Tensor, inputs: dict[str, torch.Tensor], cotangent: torch.Tensor | None
    ) -> dict[str, Array]:
        grads = torch.autograd.grad(output, list(inputs.values()), cotangent, materialize_grads=True)
        found = {}
        for name, gradient in zip(inputs, grads, strict=True):
            self.noted(gradient)
            if name in ("x", "dy"):
                found[name] = maps_to_array(gradient)
            else:
                found[name] = to_array(gradient[:, :, 0, 0].mT if name.endswith("kernel") else gradient)
        return found


backend = TorchBackend()
