"""Layers for the tests of the PyTorch adapter, with the weights and maps of the conformance kit's cases."""

import torch
from torch import nn

from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_torch import from_canonical

CASE = {case.id: case for case in CASES}


def layer_of_case(
    case: Case, dtype: str = "float32", *, block_size: int | None = None
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The layer of a case, on which no term of the function vanishes, with its x and dy (B, C, H, W).

    Args:
        case: one of the kit's.
        dtype: of the layer and the maps.
        block_size: of the layer.
    """
    given = inputs(case, dtype)
    layer = from_canonical(case.config, given.params, block_size=block_size).eval()
    return layer, channels_first(given.x), channels_first(given.dy)


def channels_first(maps):
    """Maps (B, H, W, C) as a tensor (B, C, H, W)."""
    return torch.from_numpy(maps).permute(0, 3, 1, 2).contiguous()


def channels_last(maps):
    """A tensor (B, C, H, W) as maps (B, H, W, C)."""
    return maps.detach().permute(0, 2, 3, 1).numpy()
