"""The 1×1 convolutions of the layer: how they draw their parameters, and three of them computed as one."""

import torch
from torch import nn
from torch.nn.modules import module as hooks

__all__ = ["Projection", "project"]

_WIDEST = 256
"""Input channels up to which one product was seen to be the faster, on a CPU; above, its three are as fast."""


class Projection(nn.Conv2d):
    """`nn.Conv2d` whose `reset_parameters` draws a Glorot-uniform kernel and a zero bias.

    A model made on the meta device is filled by calling `reset_parameters` of each of its `modules()`, children after
    their parents: a plain convolution would then replace the layer's initial parameters with its own.

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
    """What each child makes of the maps: (B, D, H, W), D channels of its own.

    Children that are plain 1×1 convolutions are computed in one product, which reads the maps once. A child that is
    hooked, parametrised, wrapped or replaced is called, and then all of them are.

    Args:
        maps: (B, C, H, W).
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
    """Whether calling the child would be a 1×1 convolution and nothing else, and one that is worth joining."""
    return (
        # A parametrised module, such as one of torch's spectral_norm, has a class of its own.
        type(child) in (Projection, nn.Conv2d)
        and type(child.weight) in (nn.Parameter, torch.Tensor)
        and child.weight.shape[2:] == (1, 1)
        and child.stride == (1, 1)
        and child.padding == (0, 0)
        and child.groups == 1
        and child.in_channels <= _WIDEST
        and "forward" not in vars(child)
        # What `Module.__call__` looks at.
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
