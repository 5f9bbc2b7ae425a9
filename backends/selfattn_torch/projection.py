"""The 1×1 convolutions of the layer: their initial parameters, and a product that computes three of them at once."""

import torch
from torch import nn
from torch.nn.modules import module as hooks

__all__ = ["Projection", "project"]

_WIDEST = 256
"""Input channels up to which one convolution was faster than three in measurements on a CPU."""

_TINY = 2**14
"""Numbers of the maps up to which the operators' own work hardly counted in measurements on a CPU."""


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

    If all children are plain 1×1 convolutions, one operator computes them and reads the maps once. If any child is hooked,
    parametrised, wrapped or replaced, each child is called.

    Args:
        maps: feature maps (B, C, H, W).
        children: `query`, `key` and `value` of a layer, or `out` alone.
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
    separate = None
    if len(weights) == len(children) and len(biases) in (0, len(children)) and not _are_all_hooked():
        # An exported graph should have the operator that every converter knows, at any size.
        eager = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        widths = [weight.shape[0] for weight in weights]
        if eager and _are_tiny(maps) and not (flat and torch.is_grad_enabled()):
            # Without derivatives, or where pooling would copy its part, joining takes longer than two more calls.
            pairs = zip(weights, biases or [None] * len(weights), strict=True)
            separate = tuple(nn.functional.conv2d(maps, *pair) for pair in pairs)
        # One axis of positions before the split: three more operations and their derivatives would count on a small map.
        elif eager and _multiplies(maps, sum(widths)):
            positions = _product(maps.flatten(2), *_joined(weights, biases))  # (B, D, N)
            return _split(positions if flat else positions.unflatten(2, maps.shape[2:]), widths)
        elif maps.shape[1] <= _WIDEST:
            together = nn.functional.conv2d(maps, *_joined(weights, biases))  # (B, D, H, W)
            return _split(together.flatten(2) if flat else together, widths)
    if separate is None:
        separate = tuple(child(maps) for child in children)
    return tuple(output.flatten(2) for output in separate) if flat else separate


def _are_tiny(maps: torch.Tensor) -> bool:
    """Whether the time of a projection is mostly that of calling its operators. In 16 bits it never is."""
    return maps.numel() <= _TINY and maps.itemsize > 2


def _multiplies(maps: torch.Tensor, width: int) -> bool:
    """Whether a batch of matrix products takes the place of the convolution.

    On a CPU it takes half the time, and in 16 bits down to a tenth. Its derivative is a kernel for each sample, and their
    sum: they should take no more than two inputs. On other devices a convolution has settings of its own for its precision.
    """
    batch, _, *grid = maps.shape
    return maps.is_cpu and not _are_tiny(maps) and (batch == 1 or width <= 2 * grid[0] * grid[1])


def _product(positions: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The kernel (D, C, 1, 1) times each position of (B, C, N), plus the bias: (B, D, N)."""
    kernels = weight.flatten(1).expand(positions.shape[0], -1, -1)
    return torch.bmm(kernels, positions) if bias is None else torch.baddbmm(bias[:, None], kernels, positions)


def _joined(
    weights: list[torch.Tensor], biases: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if len(weights) == 1:
        return weights[0], biases[0] if biases else None
    return torch.cat(weights), torch.cat(biases) if biases else None


def _split(together: torch.Tensor, widths: list[int]) -> tuple[torch.Tensor, ...]:
    # The split of one part would be one more node of the backward pass.
    return together.split(widths, 1) if len(widths) > 1 else (together,)


def _plain_parameters(child: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias of a child whose call is only a 1×1 convolution, or (None, None).

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
        and "forward" not in child.__dict__
        # `Module.__call__` runs these hooks.
        and not (
            child._forward_hooks  # noqa: SLF001
            or child._forward_pre_hooks  # noqa: SLF001
            or child._backward_hooks  # noqa: SLF001
            or child._backward_pre_hooks  # noqa: SLF001
        )
    )
    return (weight, bias) if plain else (None, None)


def _are_all_hooked() -> bool:
    """Whether `Module.__call__` runs hooks for every module there is."""
    return bool(
        hooks._global_forward_hooks  # noqa: SLF001
        or hooks._global_forward_pre_hooks  # noqa: SLF001
        or hooks._global_backward_hooks  # noqa: SLF001
        or hooks._global_backward_pre_hooks  # noqa: SLF001
    )
