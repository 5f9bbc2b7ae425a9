"""The 1×1 convolutions of the layer: their initial parameters, and a product that computes three of them at once."""

import torch
from torch import nn
from torch.nn.modules import module as hooks

__all__ = ["Projection", "project"]

_WIDEST = 256
"""Input channels up to which one product was faster in measurements on a CPU. Above, three products are as fast."""


class Projection(nn.Conv2d):
    """`nn.Conv2d` whose `reset_parameters` draws a Glorot-uniform kernel and a zero bias.

    To fill a model made on the meta device, a caller runs `reset_parameters` of all its `modules()`, children after their
    parents. A plain convolution would then replace the layer's initial parameters by its own.

    Example:
        >>> projection = Projection(16, 2, 1)
        >>> projection.bias.detach()
        tensor([0., 0.])
    """

    def reset_parameters(self) -> None:
        """Draw new parameters."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def project(maps: torch.Tensor, *children: nn.Module, flat: bool) -> tuple[torch.Tensor, ...]:
    """The output (B, D, H, W) of each child, where D is the child's own number of channels, or (B, D, H·W) if `flat`.

    If all children are plain 1×1 convolutions, one product computes them and reads the maps once. If any child is hooked,
    parametrised, wrapped or replaced, each child is called.

    Args:
        maps: feature maps (B, C, H, W).
        children: `query`, `key` and `value` of a layer.
        flat: whether positions are one axis, in row-major order.
    """
    weights, biases = [], []
    for child in children:
        weight, bias = _plain_parameters(child)
        if weight is None:
            break
        weights.append(weight)
        if bias is not None:
            biases.append(bias)
    if len(weights) < len(children) or 0 < len(biases) < len(children):
        outputs = tuple(child(maps) for child in children)
        return tuple(output.flatten(2) for output in outputs) if flat else outputs
    together = nn.functional.conv2d(maps, torch.cat(weights), torch.cat(biases) if biases else None)
    # Flattened before it is split: three operations and their derivatives would count on a small map.
    return (together.flatten(2) if flat else together).split([child.out_channels for child in children], 1)


def _plain_parameters(child: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias of a child whose call is only a 1×1 convolution, if joining it saves time; else (None, None).

    Each is read once, because on a small map every attribute of a module counts.
    """
    # A parametrised module, for example by torch's spectral_norm, has a different class.
    if type(child) not in (Projection, nn.Conv2d) or not isinstance(child, nn.Conv2d):
        return None, None
    weight, bias = child._parameters.get("weight"), child._parameters.get("bias")  # noqa: SLF001
    plain = (
        type(weight) in (nn.Parameter, torch.Tensor)
        and child.kernel_size == child.stride == (1, 1)
        and child.padding == (0, 0)
        and child.groups == 1
        and child.in_channels <= _WIDEST
        and "forward" not in vars(child)
        # `Module.__call__` runs these hooks.
        and not (
            child._forward_hooks  # noqa: SLF001
            or child._forward_pre_hooks  # noqa: SLF001
            or child._backward_hooks  # noqa: SLF001
            or child._backward_pre_hooks  # noqa: SLF001
            or hooks._global_forward_hooks  # noqa: SLF001
            or hooks._global_forward_pre_hooks  # noqa: SLF001
            or hooks._global_backward_hooks  # noqa: SLF001
            or hooks._global_backward_pre_hooks  # noqa: SLF001
        )
    )
    return (weight, bias) if plain else (None, None)
