"""Derivatives in bfloat16 with factors in bfloat16, as on processors with tiles, and with factors in float32."""

import contextlib

import pytest
import torch

from selfattn_ops.torch import attend, attend_transposed, kept, products
from selfattn_ops.torch.autograd import attend_in_blocks
from selfattn_ops.torch.kept import attend_kept

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
    right = gradients(dense, [operand.double() for operand in operands], weight)
    agree(gradients(lambda *qkv: attend_in_blocks(*qkv, block_size), operands, weight), right)
    agree(gradients(attend_kept, operands, weight), right)
    agree(first_gradients(attend_kept, operands, weight), right[:3])


def first_gradients(function, operands, weight):
    """The gradients of the output, without a graph of their own: from the map that was kept."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    return torch.autograd.grad(function(*leaves), leaves, weight)


def agree(found, right):
    for answer, want in zip(found, right, strict=True):
        assert answer.dtype == torch.bfloat16
        # A cancelling sum of 2⁻⁸ roundings, also where nothing is left of it.
        largest = max(float(want.abs().max()), 1e-3)
        assert float((answer.double() - want).abs().max()) <= 0.04 * largest


def draw(*shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiles", [True, False])
def test_the_map_of_a_small_map_is_kept_in_the_dtype_of_the_factors(monkeypatch, dtype, autocast, tiles):
    """Where no standard operators do: under autocast, and for bfloat16 on tiles from some size on."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: tiles)
    monkeypatch.setattr(kept, "_FEW", 0)
    query, key, value = (
        operand.requires_grad_() for operand in draw((2, 6, 3), (2, 5, 3), (2, 5, 4), dtype=dtype)
    )
    saved = []

    def packed(tensor):
        saved.append(tensor)
        return tensor

    inside = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
    with inside, torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
        out = attend(query, key, value)
        transposed = attend_transposed(query.mT, key.mT, value.mT).mT
    assert torch.equal(out, transposed) or (autocast is None and dtype == torch.float32)
    maps = {tensor.dtype for tensor in saved if tensor.shape == (2, 6, 5)}
    narrow = torch.bfloat16 if tiles and dtype == torch.bfloat16 else torch.float32
    if autocast is not None or narrow != torch.float32:
        assert type(out.grad_fn).__name__ == "_AttendKeptBackward"
        assert maps == {narrow}
    else:
        assert "Bmm" in type(out.grad_fn).__name__


def test_a_gradient_of_a_kept_map_can_be_one_of_a_batch():
    operands = draw((2, 6, 3), (2, 5, 3), (2, 5, 4), dtype=torch.bfloat16)
    leaves = [operand.requires_grad_() for operand in operands]
    (weights,) = draw((7, 2, 6, 4), dtype=torch.bfloat16)
    out = attend_kept(*leaves)
    one_by_one = [torch.autograd.grad(out, leaves, weight, retain_graph=True) for weight in weights]

    def gradient(weight):
        return torch.autograd.grad(out, leaves, weight, retain_graph=True)

    batched = torch.autograd.grad(out, leaves, weights, retain_graph=True, is_grads_batched=True)
    for found in (batched, torch.func.vmap(gradient)(weights)):
        for answers, singles in zip(found, zip(*one_by_one, strict=True), strict=True):
            assert float((answers - torch.stack(singles)).abs().max()) <= 0.04


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
