"""A 1×1 convolution divided by its spectral norm, with the numerics of `selfattn_core.spectral_norm`."""

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.module_tracker import ModuleTracker

from selfattn_core.spectral_norm import EPS, WARM_UP, converged
from selfattn_torch.projection import Projection

__all__ = ["SpectralConv2d", "refresh_spectral_norm"]

_TRACKER = ModuleTracker()


class SpectralConv2d(Projection):
    """A 1×1 `nn.Conv2d` that applies weight / sigma, sigma = uᵀ W v, where W is `weight` as (C_out, C_in).

    `weight` is the raw kernel, and it is trained. A call in training mode first moves the buffers `u` and `v` by one power
    iteration. A call in evaluation mode does not. The gradient treats u and v as constants and goes through W in sigma. If
    uᵀ W v is 0, as for a weight of zeros, sigma is the constant 1.

    Activation checkpointing repeats a call during the backward pass. The repeated call does not move u and v, and uses
    their current values. So run the backward pass of a checkpointed call before the next call in training mode; otherwise
    the gradient belongs to the later state. For a loss of real and fake images, put both into one batch, or run a backward
    pass after each.

    Under `torch.func.grad`, `vjp` and `jvp`, a call in training mode needs the buffers as arguments:
    `functional_call(layer, (parameters, buffers), (x,))`. Clone `buffers` inside the differentiated function, because the
    call moves them. torch raises an error for captured buffers, which cannot be written there. In evaluation mode captured
    buffers work, because nothing is written.

    The differences from `torch.nn.utils.parametrizations.spectral_norm`: reading `weight` moves nothing, a weight of zeros
    gives numbers instead of NaN, and the layer can be pickled and initialised late. A state dict of the parametrization or
    of `torch.nn.utils.spectral_norm` loads.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: always 1. It exists because `nn.Conv2d` has it.
        bias: whether there is a bias.
        device: device of parameters and buffers.
        dtype: dtype of parameters and buffers.

    Example:
        >>> conv = SpectralConv2d(6, 3, bias=False)
        >>> _ = [conv(torch.randn(1, 6, 2, 2)) for _ in range(100)]
        >>> round(torch.linalg.matrix_norm(conv.normalised_weight()[:, :, 0, 0], 2).item(), 3)
        1.0
    """

    u: torch.Tensor
    v: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Literal[1] = 1,
        *,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, device=device, dtype=dtype)
        self.register_buffer("u", torch.empty(out_channels, device=device, dtype=dtype))
        self.register_buffer("v", torch.empty(in_channels, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_rename_foreign_keys)
        self.reset_state()

    def reset_parameters(self) -> None:
        """Draw new parameters and the state for them."""
        super().reset_parameters()
        # The constructor of nn.Conv2d calls this method before the buffers exist.
        if hasattr(self, "u"):
            self.reset_state()

    @torch.no_grad()
    def reset_state(self) -> None:
        """Set u and v for the current weight: 15 power iterations from a standard normal v.

        If the weight is sharded, as FSDP2 has it, every process of its mesh has to call this. u and v are the same in all.
        """
        if self.weight.is_meta:
            # The meta device has no numbers, and torch would take milliseconds for each step.
            return
        weight = _matrix(_whole(self.weight))
        v = _shared(torch.randn_like(self.v, dtype=weight.dtype), self.weight)
        for _ in range(WARM_UP):
            u, v = _power_iteration(weight, v)
        self.u.copy_(u)
        self.v.copy_(v)

    @torch.no_grad()
    def refresh_state(self) -> None:
        """Set u and v to the limit of power iterations on the current weight; see `refresh_spectral_norm`."""
        found = converged(_whole(self.weight)[:, :, 0, 0].T.double().cpu().numpy())
        for name, vector in zip(("u", "v"), found, strict=True):
            new = torch.from_numpy(vector.copy()).to(self.weight.device, self.weight.dtype)
            if getattr(self, name).is_meta:
                setattr(self, name, new)
            else:
                getattr(self, name).copy_(new)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)
        absent = any(prefix + name not in state_dict for name in ("u", "v"))
        # No warning: torch reports every load as strict here, and lists missing keys itself.
        if absent and prefix + "weight" in state_dict and not self.weight.is_meta:
            self.refresh_state()

    def normalised_weight(self) -> torch.Tensor:
        """The divided kernel (C_out, C_in, 1, 1). In training mode, one power iteration runs first."""
        weight = _matrix(self.weight)
        if self.training and not _is_repeating():
            with torch.no_grad():
                u, v = _power_iteration(weight, self.v.to(weight.dtype))
                self.u.copy_(u)
                self.v.copy_(v)
        # New tensors, because the buffers may move again before the gradient is computed.
        direction = torch.outer(self.u.to(weight.dtype), self.v.to(weight.dtype))
        sigma = (weight * direction).sum()
        return (weight / torch.where(sigma != 0, sigma, 1)).to(self.weight.dtype)[:, :, None, None]

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Conv2d's name
        """The convolution of the input (B, C_in, H, W)."""
        return self._conv_forward(input, self.normalised_weight(), self.bias)


def refresh_spectral_norm(module: nn.Module) -> None:
    """Recompute the state of every spectral norm in a module for its current weights.

    Call it after you set weights outside training: reinitialised, copied, averaged, or loaded without u and v. The old
    state belongs to other weights, and the first outputs in evaluation mode could be wrong by any factor.
    `load_state_dict(strict=False)` does it automatically for weights without u and v, and lists u and v in its
    `missing_keys`.

    Args:
        module: a layer or a whole model. Only `SpectralConv2d` modules change; PyTorch's own parametrization does not.

    Example:
        >>> conv = SpectralConv2d(6, 3, bias=False)
        >>> _ = nn.init.orthogonal_(conv.weight, gain=7)
        >>> refresh_spectral_norm(conv)
        >>> round(torch.linalg.matrix_norm(conv.eval().normalised_weight()[:, :, 0, 0], 2).item(), 3)
        1.0
    """
    for each in module.modules():
        if isinstance(each, SpectralConv2d):
            each.refresh_state()


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a tensor. Outside of a forward pass, FSDP2 has it as a DTensor."""
    whole: torch.Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole


def _shared(vector: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The vector of one process in all processes that have a part of the weight."""
    if not hasattr(weight, "device_mesh"):
        return vector
    # Most programs need no DTensor, and its module takes time to import.
    from torch.distributed.tensor import Replicate, distribute_tensor  # noqa: PLC0415

    mesh = weight.device_mesh
    return distribute_tensor(vector, mesh, [Replicate()] * mesh.ndim).to_local()


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a matrix (C_out, C_in), in at least float32."""
    return weight[:, :, 0, 0].to(torch.promote_types(weight.dtype, torch.float32))


def _power_iteration(weight: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state after one more iteration. It uses products and sums, because autocast would round a matrix product."""
    u = _unit((weight * v).sum(1))
    return u, _unit((weight * u[:, None]).sum(0))


def _unit(vector: torch.Tensor) -> torch.Tensor:
    # The same as `selfattn_core.spectral_norm.fallback`, on the vector's device.
    cubes = torch.arange(1, vector.shape[0] + 1, device=vector.device) ** 3
    vector = torch.where((vector != 0).any(), vector, (2 * (cubes % 101) - 101).to(vector.dtype))
    return nn.functional.normalize(vector, dim=0, eps=EPS)


def _is_repeating() -> bool:
    """Whether this call is inside a backward pass, which means that it repeats an earlier call."""
    # A compiled graph repeats operations, but never a call.
    return not torch.compiler.is_compiling() and _TRACKER.is_bw


def _rename_foreign_keys(_: SpectralConv2d, state_dict: dict[str, Any], prefix: str, *_rest: object) -> None:
    """Read the state of PyTorch's own two spectral norms. Their vectors have the same meaning."""
    foreign = {
        "weight_orig": "weight",
        "weight_u": "u",
        "weight_v": "v",
        "parametrizations.weight.original": "weight",
        "parametrizations.weight.0._u": "u",
        "parametrizations.weight.0._v": "v",
    }
    for theirs, ours in foreign.items():
        if prefix + theirs in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
