"""Derivatives in bfloat16 with factors in bfloat16, as on processors with tiles, and with factors in float32."""

import pytest
import torch

from selfattn_ops.torch import products
from selfattn_ops.torch.autograd import attend_in_blocks

# B, N, M, Dk, Dv and the block size. Odd sizes, single rows, single keys and the rest of a block.
SIZES = [
    (1, 5, 3, 2, 7, 3),
    (3, 5, 7, 2, 4, None),
    (5, 37, 41, 3, 9, 2),
    (3, 1500, 1501, 5, 6, None),
    (1, 1, 3, 2, 4, 1),
    (2, 6, 1, 3, 4, None),
    (7, 300, 1001, 3, 5, None),
    (2, 1, 2049, 4, 6, 1),
]


def gradients(function, operands, weight):
    """The gradients of the output, and those of their squared norm."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    first = torch.autograd.grad(function(*leaves), leaves, weight.to(leaves[0].dtype), create_graph=True)
    second = torch.autograd.grad(sum(each.square().sum() for each in first), leaves)
    return [each.detach() for each in (*first, *second)]


def dense(query, key, value):
    return torch.softmax(query @ key.mT, dim=-1) @ value


@pytest.mark.parametrize("tiles", [True, False], ids=["factors in bfloat16", "factors in float32"])
@pytest.mark.parametrize("deviation", [1.0, 25.0], ids=["diffuse", "peaked"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_derivatives_are_those_of_float64_rounded(monkeypatch, size, deviation, tiles):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: tiles)
    batch, rows, keys, narrow, wide, block_size = size
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, narrow), (keys, narrow), (keys, wide), (rows, wide))
    drawn = [torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[0] *= deviation / narrow**0.5
    *operands, weight = (each.bfloat16() for each in drawn)
    found = gradients(lambda *qkv: attend_in_blocks(*qkv, block_size), operands, weight)
    right = gradients(dense, [operand.double() for operand in operands], weight)
    for answer, want in zip(found, right, strict=True):
        assert answer.dtype == torch.bfloat16
        # A cancelling sum of 2⁻⁸ roundings, also where nothing is left of it.
        largest = max(float(want.abs().max()), 1e-3)
        assert float((answer.double() - want).abs().max()) <= 0.04 * largest


def test_the_dtype_of_factors_follows_operands_and_processor(monkeypatch):
    operands = {
        dtype: torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)
    }
    for tiles, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(products, "multiplies_bfloat16", lambda tiles=tiles: tiles)
        assert products.factor_of(operands[torch.bfloat16]) == wanted
        assert products.factor_of(operands[torch.float16]) == torch.float32
        assert products.factor_of(operands[torch.float64]) == torch.float64
        assert products.factor_of(operands[torch.bfloat16].to("meta")) == torch.float32
