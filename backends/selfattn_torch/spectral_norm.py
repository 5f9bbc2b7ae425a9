"""A 1×1 convolution divided by its spectral norm; the numerics are those of `selfattn_core.spectral_norm`."""

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

    `weight` is the raw kernel, which is what is trained. A call in training mode first moves the buffers `u` and `v` by
    one power iteration, a call in evaluation mode does not; both are constants to the gradient, which goes through W
    in sigma. Where uᵀ W v is 0, as for a weight of zeros, sigma is the constant 1. A call that repeats an earlier one,
    as activation checkpointing does while it goes backward, does not move them again. It takes them as they are then: a checkpointed call needs its backward pass before the next call in
    training mode, or its gradient is that of the later state. A loss of real and fake images takes both in one batch,
    or a backward pass after each.

    Under `torch.func.grad`, `vjp` and `jvp` a call in training mode needs the buffers as arguments, which then move:
    `functional_call(layer, (parameters, buffers), (x,))` with `buffers` cloned inside the function that is
    differentiated. Captured buffers cannot be written there, and torch raises. In evaluation mode nothing is
    written, and captured buffers work.

    This is `torch.nn.utils.parametrizations.spectral_norm`, except that reading `weight` moves nothing, that a weight of
    zeros gives numbers instead of NaN, and that the layer can be pickled and initialised late. A state dict of
    `torch.nn.utils.spectral_norm` or of the parametrization loads.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: 1; there for the sake of the signature of `nn.Conv2d`.
        bias: whether there is a bias.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

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
        """Draw new parameters, and the state that belongs to them."""
        super().reset_parameters()
        # The constructor of nn.Conv2d comes here before there are buffers.
        if hasattr(self, "u"):
            self.reset_state()

    @torch.no_grad()
    def reset_state(self) -> None:
        """Draw u and v for the present weight: 15 power iterations from a standard normal v."""
        if self.weight.is_meta:
            # There is nothing to compute, and torch would take milliseconds for each step of it.
            return
        weight = _matrix(self.weight)
        v = torch.randn_like(self.v, dtype=weight.dtype)
        for _ in range(WARM_UP):
            u, v = _power_iteration(weight, v)
        self.u.copy_(u)
        self.v.copy_(v)

    @torch.no_grad()
    def refresh_state(self) -> None:
        """Make u and v those of the present weight, as power iterations without end would; see `refresh_spectral_norm`."""
        found = converged(self.weight[:, :, 0, 0].T.double().cpu().numpy())
        for name, vector in zip(("u", "v"), found, strict=True):
            new = torch.from_numpy(vector.copy()).to(self.weight)
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
        # No warning: torch says here that every load is strict, and itself names what is missing.
        if absent and prefix + "weight" in state_dict and not self.weight.is_meta:
            self.refresh_state()

    def normalised_weight(self) -> torch.Tensor:
        """The kernel that is applied, (C_out, C_in, 1, 1); in training mode, after one power iteration."""
        weight = _matrix(self.weight)
        if self.training and not _is_repeating():
            with torch.no_grad():
                u, v = _power_iteration(weight, self.v.to(weight.dtype))
                self.u.copy_(u)
                self.v.copy_(v)
        # A tensor of its own: the buffers may move again before the gradient is computed.
        direction = torch.outer(self.u.to(weight.dtype), self.v.to(weight.dtype))
        sigma = (weight * direction).sum()
        return (weight / torch.where(sigma != 0, sigma, 1)).to(self.weight.dtype)[:, :, None, None]

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Conv2d's name
        """The convolution of the input (B, C_in, H, W)."""
        return self._conv_forward(input, self.normalised_weight(), self.bias)


def refresh_spectral_norm(module: nn.Module) -> None:
    """Make every estimate of a spectral norm in a module that of its present weight.

    To be called after weights came from outside the training: drawn anew, copied, averaged, or loaded without u and v.
    The state belongs to other weights then, and the first outputs in evaluation are off by any factor.
    `load_state_dict(strict=False)` does it by itself where the state dict has weights without u and v, which it returns
    among its `missing_keys`.

    Args:
        module: a layer or a whole model. Modules other than `SpectralConv2d`, PyTorch's own parametrization too, are left
            as they are.

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


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    """(C_out, C_in), in at least float32."""
    return weight[:, :, 0, 0].to(torch.promote_types(weight.dtype, torch.float32))


def _power_iteration(weight: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state after one more iteration. Products and sums: a matrix product would be rounded under autocast."""
    u = _unit((weight * v).sum(1))
    return u, _unit((weight * u[:, None]).sum(0))


def _unit(vector: torch.Tensor) -> torch.Tensor:
    # `selfattn_core.spectral_norm.fallback`, on the vector's device.
    cubes = torch.arange(1, vector.shape[0] + 1, device=vector.device) ** 3
    vector = torch.where((vector != 0).any(), vector, (2 * (cubes % 101) - 101).to(vector.dtype))
    return nn.functional.normalize(vector, dim=0, eps=EPS)


def _is_repeating() -> bool:
    """Whether this call is inside a backward pass, that is, computes once more what has been computed before."""
    # A compiled graph repeats operations, never a call.
    return not torch.compiler.is_compiling() and _TRACKER.is_bw


def _rename_foreign_keys(_: SpectralConv2d, state_dict: dict[str, Any], prefix: str, *_rest: object) -> None:
    """Read what PyTorch's own two spectral norms wrote, whose vectors mean the same."""
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
