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


def project(maps: torch.Tensor, *children: nn.Module) -> tuple[torch.Tensor, ...]:
    """The output (B, D, H, W) of each child, where D is the child's own number of channels.

    If all children are plain 1×1 convolutions, one product computes them and reads the maps once. If any child is hooked,
    parametrised, wrapped or replaced, each child is called.

    Args:
        maps: feature maps (B, C, H, W).
        children: `query`, `key` and `value` of a layer.
    """
    if not all(_is_plain(child) for child in children):
        return tuple(child(maps) for child in children)
    convolutions: tuple[nn.Conv2d, ...] = children
    if len({conv.bias is None for conv in convolutions}) > 1:
        return tuple(child(maps) for child in children)
    weight = torch.cat([conv.weight for conv in convolutions])
    bias = None if convolutions[0].bias is None else torch.cat([conv.bias for conv in convolutions])
    together = nn.functional.conv2d(maps, weight, bias)
    return together.split([conv.out_channels for conv in convolutions], dim=1)


def _is_plain(child: nn.Module) -> bool:
    """Whether a call of the child is only a 1×1 convolution, and joining it saves time."""
    return (
        # A parametrised module, for example by torch's spectral_norm, has a different class.
        type(child) in (Projection, nn.Conv2d)
        and type(child.weight) in (nn.Parameter, torch.Tensor)
        and child.weight.shape[2:] == (1, 1)
        and child.stride == (1, 1)
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
