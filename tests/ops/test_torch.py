"""The torch core against formulas in numpy float64, and each trap that torch sets for it."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.tensor
from torch._dynamo.testing import CompileCounterWithBackend

import selfattn_ops.torch as ops
from selfattn_ops import blocks
from selfattn_ops.torch import attend, attend_with_map, compiled, derivatives, products
from selfattn_ops.torch.blocks import ready
from tests.ops.rounded_logits import shift_of_output

Operands = list[torch.Tensor]
ROOT = Path(__file__).parents[2]

# torch's own forward mode compiles its decompositions on first use.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script")
compiles = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script", "ignore:`isinstance.treespec", "ignore::DeprecationWarning:torch.*"
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def draw(
    lead: tuple[int, ...] = (2,),
    sizes: tuple[int, int, int, int] = (11, 7, 3, 5),
    *,
    dtype: torch.dtype = torch.float64,
    transposed: bool = False,
    scale: float = 1.0,
    seed: int = 0,
) -> Operands:
    """Query, key and value of N, M, Dk, Dv = sizes; transposed: as a channels-first layer views them."""
    generator = torch.Generator().manual_seed(seed)
    rows, keys, narrow, wide = sizes
    drawn = []
    for positions, width, factor in ((rows, narrow, scale), (keys, narrow, scale), (keys, wide, 1.0)):
        shape = (width, positions) if transposed else (positions, width)
        tensor = (torch.randn(*lead, *shape, generator=generator, dtype=torch.float64) * factor).to(dtype)
        drawn.append((tensor.mT if transposed else tensor).requires_grad_())
    return drawn


def like(tensors: Operands, seed: int = 1) -> Operands:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors]


def in_float64(tensors: Operands | tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    return [tensor.detach().to(torch.float64).numpy() for tensor in tensors]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query @ key.mT, dim=-1) @ value


def swap(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


def row_sum(array: np.ndarray) -> np.ndarray:
    return array.sum(-1, keepdims=True)


def attention_map(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    scores = q @ swap(k)
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / row_sum(exponentials)


def first_order(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
    a = attention_map(q, k)
    da = g @ swap(v)
    ds = a * (da - row_sum(a * da))
    return [ds @ k, swap(ds) @ q, swap(a) @ g]


def second_order(operands: list[np.ndarray], g: np.ndarray, dots: list[np.ndarray]) -> list[np.ndarray]:
    """The gradients by q, k, v and g of the inner product of (dq, dk, dv) and `dots`."""
    q, k, v = operands
    q_dot, k_dot, v_dot = dots
    a = attention_map(q, k)
    da = g @ swap(v)
    w = da - row_sum(a * da)
    u = q_dot @ swap(k) + q @ swap(k_dot)
    u = u - row_sum(a * u)
    x = u * w + g @ swap(v_dot)
    ds, ds_dot, a_dot = a * w, a * (x - row_sum(a * x)), a * u
    return [
        ds_dot @ k + ds @ k_dot,
        swap(ds_dot) @ q + swap(ds) @ q_dot,
        swap(a_dot) @ g,
        a_dot @ v + a @ v_dot,
    ]


def errors(
    got: Operands | tuple[torch.Tensor, ...], want: list[np.ndarray], dtype: torch.dtype
) -> list[float]:
    """Largest error of each in eps of `dtype` times the largest wanted magnitude."""
    eps = torch.finfo(dtype).eps
    return [
        float(np.abs(g - w).max() / (eps * np.abs(w).max()))
        for g, w in zip(in_float64(got), want, strict=True)
    ]


def penalty(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The squared norm of a gradient: R1."""

    def value(*operands: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(function(*operands).sin().sum(), operands, create_graph=True)
        return torch.stack([grad.square().sum() for grad in grads]).sum()

    return value


LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
BLOCKS = pytest.mark.parametrize("block_size", [None, 1, 4, 11, 100])


class TestValues:
    @pytest.mark.parametrize("rows", [6, 4096])
    def test_shapes_without_numbers(self, rows):
        """Small maps and large ones, as tools ask that count parameters and sizes."""
        query, key, value = (torch.zeros(2, rows, width, device="meta") for width in (3, 3, 5))
        assert attend(query, key, value).shape == (2, rows, 5)
        y, attention = attend_with_map(query, key, value)
        assert (y.shape, attention.shape) == ((2, rows, 5), (2, rows, rows))

    @LAYOUTS
    @BLOCKS
    @pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_partition_gives_the_formula(
        self, dtype: torch.dtype, lead: tuple[int, ...], block_size: int | None, transposed: bool
    ) -> None:
        operands = draw(lead, dtype=dtype, transposed=transposed)
        q, k, v = in_float64(operands)
        got = attend(*operands, block_size=block_size)
        assert got.shape == (*lead, 11, 5)
        assert got.dtype == dtype
        assert max(errors([got], [attention_map(q, k) @ v], dtype)) < 16

    @LAYOUTS
    @BLOCKS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_first_and_second_derivatives_are_the_formulas(
        self, dtype: torch.dtype, block_size: int | None, transposed: bool
    ) -> None:
        operands = draw(sizes=(11, 7, 3, 5), dtype=dtype, transposed=transposed)
        (weight,) = like([attend(*operands)])
        weight.requires_grad_()
        grads = torch.autograd.grad(
            attend(*operands, block_size=block_size), operands, weight, create_graph=True
        )
        arrays, g = in_float64(operands), weight.detach().to(torch.float64).numpy()
        assert max(errors(grads, first_order(*arrays, g), dtype)) < 128
        dots = like(operands, seed=2)
        seconds = torch.autograd.grad(grads, [*operands, weight], dots)
        assert max(errors(seconds, second_order(arrays, g, in_float64(dots)), dtype)) < 128

    def test_float32_noise_at_the_size_of_a_layer(self) -> None:
        # Logits of about 20. The caps are hard ones; that of the second order is 8 × what was measured.
        operands = draw((2,), (1024, 900, 8, 64), dtype=torch.float32, scale=1.5)
        (weight,) = like([operands[2].new_empty(2, 1024, 64)])
        weight.requires_grad_()
        out = attend(*operands, block_size=300)
        arrays, g = in_float64(operands), weight.detach().double().numpy()
        assert max(errors([out], [attention_map(*arrays[:2]) @ arrays[2]], torch.float32)) < 16
        grads = torch.autograd.grad(out, operands, weight, create_graph=True)
        assert max(errors(grads, first_order(*arrays, g), torch.float32)) < 128
        dots = like(operands, seed=2)
        seconds = torch.autograd.grad(grads, [*operands, weight], dots)
        assert max(errors(seconds, second_order(arrays, g, in_float64(dots)), torch.float32)) < 1000

    def test_a_batch_that_exceeds_the_budget_is_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        operands = draw((5,), (11, 7, 3, 5))
        whole = torch.autograd.grad(dense(*operands).square().sum(), operands)
        walked = []
        walk = derivatives.blocks

        def watched(*args: object) -> object:
            for block in walk(*args):
                walked.append(block.buffers[0].shape)
                yield block

        monkeypatch.setattr(derivatives, "blocks", watched)
        for elements, budget, shapes in (
            (2, 4 * 2 * 11 * 7, {(2, 11, 7), (1, 11, 7)}),
            (1, 4 * 11 * 7, {(11, 7)}),
            (1, 1, {(11, 7)}),
        ):
            walked.clear()
            for module in (blocks, ops):
                monkeypatch.setattr(module, "SCORE_BUDGET", budget)
            got = torch.autograd.grad(attend(*operands).square().sum(), operands)
            assert set(walked) == shapes, elements
            assert max(errors(got, in_float64(whole), torch.float64)) < 16

    @pytest.mark.parametrize("sizes", [(1, 5, 2, 3), (5, 1, 2, 3), (5, 3, 1, 1), (1, 1, 1, 1)])
    @pytest.mark.parametrize("block_size", [None, 4])
    def test_sizes_of_one(self, sizes: tuple[int, int, int, int], block_size: int | None) -> None:
        operands = draw(sizes=sizes)
        torch.autograd.gradgradcheck(lambda *qkv: attend(*qkv, block_size=block_size), operands)
        torch.testing.assert_close(attend(*operands, block_size=block_size), dense(*operands))

    @pytest.mark.parametrize(
        ("lead", "sizes"), [((0,), (11, 7, 3, 5)), ((2,), (0, 7, 3, 5)), ((2, 0), (4, 7, 3, 5))]
    )
    def test_nothing_in_nothing_out(self, lead: tuple[int, ...], sizes: tuple[int, int, int, int]) -> None:
        operands = draw(lead, sizes)
        out = attend(*operands, block_size=2)
        assert out.shape == (*lead, sizes[0], sizes[3])
        grads = torch.autograd.grad(out.sum(), operands)
        assert [grad.shape for grad in grads] == [operand.shape for operand in operands]

    def test_an_expanded_gradient_is_not_copied_for_every_block(self) -> None:
        operands = draw()
        grad = ready(torch.ones(1, dtype=torch.float64).expand(2, 11, 5), torch.float64)
        assert grad.is_contiguous()
        got = torch.autograd.grad(attend(*operands, block_size=3).sum(), operands)
        want = first_order(*in_float64(operands), np.ones((2, 11, 5)))
        # The gradient by q and k of a plain sum is not zero: v differs from key to key.
        assert max(errors(got, want, torch.float64)) < 128

    def test_views_are_taken_as_they_are(self) -> None:
        for operand in draw(transposed=True):
            assert ready(operand, torch.float64) is operand
        fused = torch.randn(2, 11, 16)
        for part in fused.split([3, 5, 8], dim=-1):
            assert ready(part, torch.float32) is part


class TestDerivatives:
    @forward_mode
    @LAYOUTS
    @pytest.mark.parametrize("block_size", [None, 3])
    def test_gradcheck(self, block_size: int | None, transposed: bool) -> None:
        operands = draw(sizes=(4, 3, 2, 1), transposed=transposed)

        def function(*qkv: torch.Tensor) -> torch.Tensor:
            return attend(*qkv, block_size=block_size)

        assert torch.autograd.gradcheck(function, operands, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(
            function, operands, check_fwd_over_rev=True, check_rev_over_rev=True
        )

    @pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
    def test_operands_that_need_no_gradient(self, wanted: tuple[int, ...]) -> None:
        operands = draw(sizes=(7, 5, 2, 3))
        want = torch.autograd.grad(penalty_of(dense, operands, wanted), [operands[i] for i in wanted])
        for index, operand in enumerate(operands):
            operand.requires_grad_(index in wanted)
        got = torch.autograd.grad(
            penalty_of(lambda *qkv: attend(*qkv, block_size=3), operands, wanted),
            [operands[i] for i in wanted],
        )
        assert max(errors(got, in_float64(want), torch.float64)) < 128

    def test_third_order(self) -> None:
        operands = draw((1,), (3, 2, 1, 2))

        def gradient(*qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(attend(*qkv, block_size=2).sin().sum(), qkv, create_graph=True)

        assert torch.autograd.gradgradcheck(gradient, operands)

    @forward_mode
    @pytest.mark.parametrize(
        "transform",
        [
            torch.func.grad,
            torch.func.jacfwd,
            lambda f: torch.func.jacfwd(torch.func.jacrev(f)),
            lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
            lambda f: torch.func.jacrev(torch.func.jacrev(f)),
            lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
            lambda f: torch.func.jacfwd(torch.func.jacrev(torch.func.grad(f))),
            lambda f: torch.func.jacrev(torch.func.jacrev(torch.func.grad(f))),
        ],
        ids=["grad", "jacfwd", "fwd-rev", "rev-fwd", "rev-rev", "fwd-fwd", "fwd-rev-rev", "rev-rev-rev"],
    )
    @pytest.mark.parametrize("argument", [0, 1, 2])
    def test_transforms(self, transform: Callable[..., Callable[..., torch.Tensor]], argument: int) -> None:
        operands = [operand.detach() for operand in draw((1,), (5, 4, 2, 3))]

        def of(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def scalar(x: torch.Tensor) -> torch.Tensor:
                return function(*operands[:argument], x, *operands[argument + 1 :]).sin().sum()

            return transform(scalar)

        want = of(dense)(operands[argument])
        assert want.abs().max() > 1e-2
        got = of(lambda *qkv: attend(*qkv, block_size=2))(operands[argument])
        assert max(errors([got], in_float64([want]), torch.float64)) < 1000

    @forward_mode
    def test_the_tangent_is_not_silently_zero(self) -> None:
        operands = [operand.detach() for operand in draw()]
        dots = like(operands)
        want = torch.func.jvp(dense, tuple(operands), tuple(dots))[1]
        for function in (attend, partial(attend, block_size=3)):
            got = torch.func.jvp(function, tuple(operands), tuple(dots))[1]
            assert max(errors([got], in_float64([want]), torch.float64)) < 128
        # One tangent alone: the others arrive as zeros.
        want = torch.func.jvp(lambda v: dense(*operands[:2], v), (operands[2],), (dots[2],))[1]
        got = torch.func.jvp(lambda v: attend(*operands[:2], v, block_size=3), (operands[2],), (dots[2],))[1]
        assert max(errors([got], in_float64([want]), torch.float64)) < 128

    @pytest.mark.parametrize("shared", [False, True], ids=["all mapped", "keys shared"])
    def test_vmap_and_per_sample_gradients(self, shared: bool) -> None:
        query, key, value = (operand.detach() for operand in draw((4, 2), (5, 3, 2, 6)))
        if shared:
            key, value = key[0], value[0]
        in_dims = (0, None, None) if shared else (0, 0, 0)
        # The mapped axis need not come first.
        query, in_dims = query.movedim(0, 1), (1, *in_dims[1:])

        def squared(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            return lambda *qkv: function(*qkv).square().sum()

        def ours(*qkv: torch.Tensor) -> torch.Tensor:
            return attend(*qkv, block_size=2)

        for transform in (lambda f: f, lambda f: torch.func.grad(squared(f), argnums=(0, 1, 2))):
            want = torch.func.vmap(transform(dense), in_dims)(query, key, value)
            got = torch.func.vmap(transform(ours), in_dims)(query, key, value)
            pairs = [(got, want)] if isinstance(got, torch.Tensor) else list(zip(got, want, strict=True))
            for one, other in pairs:
                assert max(errors([one], in_float64([other]), torch.float64)) < 128

    def test_only_the_operands_are_kept(self) -> None:
        operands = draw(sizes=(33, 29, 3, 5))
        kept: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = attend(*operands, block_size=8)
        assert {tensor.data_ptr() for tensor in kept} == {operand.data_ptr() for operand in operands}
        assert out.grad_fn is not None

    def test_small_maps_are_the_dense_computation(self) -> None:
        small = attend(*draw(sizes=(64, 48, 3, 5)))
        assert type(small.grad_fn).__name__ == "BmmBackward0"
        large = attend(*draw((3,), (1024, 1024, 1, 1), dtype=torch.float32))
        assert type(large.grad_fn).__name__ == "_AttendBackward"


def penalty_of(
    function: Callable[..., torch.Tensor], operands: Operands, wanted: tuple[int, ...]
) -> torch.Tensor:
    inputs = [operands[index] for index in wanted]
    grads = torch.autograd.grad(function(*operands).sin().sum(), inputs, create_graph=True)
    return torch.stack([grad.square().sum() for grad in grads]).sum()


class TestMap:
    @pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
    def test_rows_are_output_positions_and_sum_to_one(self, lead: tuple[int, ...]) -> None:
        operands = draw(lead)
        out, attention = attend_with_map(*operands, block_size=4)
        assert attention.shape == (*lead, 11, 7)
        q, k, v = in_float64(operands)
        want = attention_map(q, k)
        assert max(errors([out, attention], [want @ v, want], torch.float64)) < 16
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))

    @forward_mode
    def test_both_outputs_are_differentiable_twice(self) -> None:
        operands = draw(sizes=(5, 4, 2, 3))
        # gradcheck passes over an output that has no graph.
        assert all(output.requires_grad for output in attend_with_map(*operands))
        assert torch.autograd.gradcheck(attend_with_map, operands, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(attend_with_map, operands)


class TestErrors:
    @pytest.mark.parametrize("function", [attend, attend_with_map])
    def test_operands_that_do_not_belong_together(self, function: Callable[..., object]) -> None:
        query, key, value = draw()
        for wrong, message in (
            ((query[..., :2], key, value), "query has width 2 and key 3"),
            ((query, key, value[:, :4]), "key has 7 positions and value 4"),
            ((query, key.float(), value), "dtypes torch.float64, torch.float32, torch.float64 should be one"),
            ((query, key, value.to("meta")), "devices cpu, cpu, meta should be one"),
            ((query[0], key, value), "one rank"),
            ((query[:1], key, value), "leading axes should be equal"),
            ((query[0, 0], key[0, 0], value[0, 0]), "at least 2"),
        ):
            with pytest.raises(ValueError, match=message):
                function(*wrong)

    @pytest.mark.parametrize("function", [attend, attend_with_map])
    @pytest.mark.parametrize("block_size", [0, -1, 2.0, "4", True])
    def test_block_size(self, function: Callable[..., object], block_size: object) -> None:
        with pytest.raises(ValueError, match="must be a positive integer"):
            function(*draw(), block_size=block_size)


class TestSpecialValues:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("block_size", [None, 4])
    def test_stay_within_what_depends_on_them(self, bad: float, block_size: int | None) -> None:
        def run(index: int) -> tuple[torch.Tensor, ...]:
            operands = draw((3,))
            with torch.no_grad():
                operands[index][1, 6, 1] = bad
            out = attend(*operands, block_size=block_size)
            return out, *torch.autograd.grad(out.sin().sum(), operands)

        clean = attend(*draw((3,)), block_size=block_size)
        for index in range(3):
            results = run(index)
            for result in results:
                assert result[[0, 2]].isfinite().all()
                assert not result[1].isfinite().all()
            out = results[0]
            if index == 0:
                others = [row for row in range(11) if row != 6]
                torch.testing.assert_close(out[1, others], clean[1, others], rtol=1e-12, atol=0)
                assert out[1, 6].isnan().all()
            if index == 2:
                others = [0, 2, 3, 4]
                torch.testing.assert_close(out[1][:, others], clean[1][:, others], rtol=1e-12, atol=0)
                assert not out[1, :, 1].isfinite().any()

    # With sqrt(size / 2) a whole number every order of summation gives the same logits, and the limit is 16 eps alone.
    @pytest.mark.parametrize(
        ("dtype", "size"),
        [(torch.float32, 1e4), (torch.float32, 2 * 64.0**2), (torch.bfloat16, 2 * 12.0**2)],
    )
    @pytest.mark.parametrize("block_size", [None, 4])
    def test_large_logits_give_finite_rows(
        self, dtype: torch.dtype, size: float, block_size: int | None
    ) -> None:
        operands = draw(dtype=dtype)
        with torch.no_grad():
            for operand in operands[:2]:
                operand.copy_(operand.sign() * math.sqrt(size / 2))
            # The largest logits of a row differ by a few units, less than 16 bits can tell.
            operands[0][..., 0] = 1
            operands[1][..., 0] = torch.arange(7) % 4
        assert (operands[0] @ operands[1].mT).abs().max() > 0.9 * size
        out, attention = attend_with_map(*operands)
        got = attend(*operands, block_size=block_size)
        grads = torch.autograd.grad(got.float().square().sum(), operands)
        for tensor in (out, attention, got, *grads):
            assert tensor.isfinite().all()
        torch.testing.assert_close(attention.float().sum(-1), torch.ones(2, 11), rtol=0, atol=0.02)
        q, k, v = in_float64(operands)
        want = attention_map(q, k) @ v
        rounded = shift_of_output(q, k, v, torch.finfo(torch.float32).eps)
        assert rounded.any() == (size == 1e4)
        for result in in_float64([out, got]):
            assert (abs(result - want) <= 16 * torch.finfo(dtype).eps * abs(want).max() + rounded).all()


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("block_size", [None, 20])
    def test_logits_of_16_bit_operands_are_float32(self, dtype: torch.dtype, block_size: int | None) -> None:
        operands = draw(sizes=(64, 48, 8, 16), dtype=dtype, scale=2.0)
        arrays = in_float64(operands)
        a = attention_map(*arrays[:2])
        got = attend(*operands, block_size=block_size)
        assert got.dtype == dtype
        # 16-bit logits, here about 30 with eps 2⁻⁷ to 2⁻¹⁰, would be off by many times this.
        assert max(errors([got], [a @ arrays[2]], dtype)) < 2
        (weight,) = like([got])
        grads = torch.autograd.grad(got, operands, weight, create_graph=True)
        assert {grad.dtype for grad in grads} == {dtype}
        g = weight.double().numpy()
        assert max(errors(grads, first_order(*arrays, g), dtype)) < 2
        dots = like(operands, seed=2)
        seconds = torch.autograd.grad(grads, operands, dots)
        assert max(errors(seconds, second_order(arrays, g, in_float64(dots))[:3], dtype)) < 4

    def test_float16_logits_may_exceed_its_range(self) -> None:
        operands = draw(dtype=torch.float16, scale=200.0)
        assert (operands[0] @ operands[1].mT).isinf().any()
        for block_size in (None, 4):
            out = attend(*operands, block_size=block_size)
            assert out.isfinite().all()

    @pytest.mark.parametrize("block_size", [None, 4])
    def test_autocast_changes_nothing(self, block_size: int | None) -> None:
        def run() -> tuple[torch.Tensor, ...]:
            operands = draw(sizes=(64, 48, 8, 16), dtype=torch.float32)
            out = attend(*operands, block_size=block_size)
            grads = torch.autograd.grad(out.square().sum(), operands, create_graph=True)
            return out, *grads, *torch.autograd.grad(grads[0].square().sum() + grads[2].sin().sum(), operands)

        outside = run()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run()
            attention = attend_with_map(*draw(dtype=torch.float32))[1]
        assert attention.dtype == torch.float32
        for one, other in zip(inside, outside, strict=True):
            assert one.dtype == torch.float32
            assert max(errors([one], in_float64([other]), torch.float32)) < 128


class NodeCounter:
    """A compiler backend that keeps the graphs it is given."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        self.targets += [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        return torch._functorch.aot_autograd.make_boxed_func(module.forward)


@compiles
class TestCompiled:
    def test_forward_and_backward_in_one_graph(self) -> None:
        for transposed in (False, True):
            operands = draw(transposed=transposed)
            compiled = torch.compile(
                lambda *qkv: attend(*qkv, block_size=3), fullgraph=True, backend="aot_eager"
            )
            out = compiled(*operands)
            (weight,) = like([out])
            got = torch.autograd.grad(out, operands, weight)
            arrays = in_float64(operands)
            assert max(errors([out], [attention_map(*arrays[:2]) @ arrays[2]], torch.float64)) < 16
            assert max(errors(got, first_order(*arrays, weight.numpy()), torch.float64)) < 128

    def test_the_graph_does_not_grow_with_the_number_of_blocks(self) -> None:
        counts = []
        for block_size in (100, 10, 1):
            backend = NodeCounter()
            torch._dynamo.reset()
            function = torch.compile(
                lambda *qkv: attend(*qkv, block_size=block_size),  # noqa: B023
                fullgraph=True,
                backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=backend, bw_compiler=backend),
            )
            operands = draw(sizes=(100, 7, 3, 5))
            function(*operands).sum().backward()
            counts.append(len(backend.targets))
            assert "selfattn.attend.default" in backend.targets
            assert "selfattn.attend_backward.default" in backend.targets
        assert counts[0] == counts[1] == counts[2] < 16

    @pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
    @pytest.mark.parametrize("block_size", [None, 3])
    def test_new_sizes_do_not_recompile(self, dynamic: bool | None, block_size: int | None) -> None:
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(
            lambda *qkv: attend(*qkv, block_size=block_size),
            fullgraph=True,
            backend=counter,
            dynamic=dynamic,
        )
        for sizes in ((11, 7, 3, 5), (13, 8, 3, 5), (40, 30, 3, 5), (300, 200, 3, 5)):
            operands = draw(sizes=sizes)
            out = compiled(*operands)
            (weight,) = like([out])
            got = torch.autograd.grad(out, operands, weight)
            assert max(errors(got, first_order(*in_float64(operands), weight.numpy()), torch.float64)) < 128
        assert counter.frame_count <= (1 if dynamic else 2)

    def test_a_double_backward_from_outside_raises(self) -> None:
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        operands = draw()
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            torch.autograd.grad(penalty(compiled)(*operands), operands)

    def test_the_recipe_for_a_penalty(self) -> None:
        operands = draw()
        want = torch.autograd.grad(penalty(dense)(*operands), operands)
        step = penalty(lambda *qkv: attend(*qkv, block_size=3))
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            value = torch.compile(step, fullgraph=True, backend="aot_eager")(*operands)
        got = torch.autograd.grad(value, operands)
        assert max(errors(got, in_float64(want), torch.float64)) < 1000

    @pytest.mark.parametrize("name", ["jvp", "grad", "vmap"])
    def test_transforms_inside(self, name: str) -> None:
        query, key, value = (operand.detach() for operand in draw())
        (dot,) = like([query])

        def transformed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def run(x: torch.Tensor) -> torch.Tensor:
                if name == "jvp":
                    return torch.func.jvp(lambda q: function(q, key, value), (x,), (dot,))[1]
                if name == "grad":
                    return torch.func.grad(lambda q: function(q, key, value).square().sum())(x)
                return torch.func.vmap(function)(x, key, value)

            return run

        want = transformed(dense)(query)
        got = torch.compile(transformed(attend), fullgraph=True, backend="aot_eager")(query)
        assert max(errors([got], in_float64([want]), torch.float64)) < 128

    def test_a_dual_number_keeps_its_tangent(self) -> None:
        operands = tuple(operand.detach() for operand in draw())
        dots = tuple(like(list(operands)))
        want = torch.func.jvp(dense, operands, dots)[1]
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        compiled(*operands)
        with torch.autograd.forward_ad.dual_level():
            duals = map(torch.autograd.forward_ad.make_dual, operands, dots)
            got = torch.autograd.forward_ad.unpack_dual(compiled(*duals)).tangent
            assert got is not None
            assert max(errors([got], in_float64([want]), torch.float64)) < 128

    @LAYOUTS
    @pytest.mark.parametrize("tiles", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_the_operators_are_what_they_claim(self, monkeypatch, dtype, tiles, transposed: bool) -> None:
        monkeypatch.setattr(products, "multiplies_bfloat16", lambda: tiles)
        operands = draw(sizes=(5, 4, 2, 3), transposed=transposed, dtype=dtype)
        grad = torch.ones(2, 5, 3, dtype=dtype)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(compiled.attend_op, (*operands, 2), test_utils=tests)
        torch.library.opcheck(compiled.attend_backward_op, (*operands, grad, 2), test_utils=tests)
        detached = [operand.detach() for operand in operands]
        torch.library.opcheck(
            compiled.attend_second_op, (*detached, grad, *like(detached), 2), test_utils=tests
        )


class Layer(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend(query, key, value, block_size=2)


@compiles
class TestExported:
    def test_graph_holds_standard_operators_only(self) -> None:
        operands = tuple(operand.detach() for operand in draw(dtype=torch.float32))
        rows, keys = torch.export.Dim("rows"), torch.export.Dim("keys")
        shapes = ({1: rows}, {1: keys}, {1: keys})
        exported = torch.export.export(Layer(), operands, dynamic_shapes=shapes)
        targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert sorted(targets) == [
            "aten.bmm.default",
            "aten.bmm.default",
            "aten.softmax.int",
            "aten.transpose.int",
        ]
        others = draw(sizes=(23, 9, 3, 5), dtype=torch.float32)
        torch.testing.assert_close(exported.module()(*others), dense(*others))

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_traced_graph_holds_no_python(self) -> None:
        operands = tuple(operand.detach() for operand in draw(dtype=torch.float32))
        traced = torch.jit.trace(Layer(), operands)
        kinds = {node.kind() for node in traced.inlined_graph.nodes()}
        assert {kind for kind in kinds if not kind.startswith("aten::")} <= {"prim::Constant"}
        others = draw(sizes=(23, 9, 3, 5), dtype=torch.float32)
        torch.testing.assert_close(traced(*others), dense(*others))


class TestMemory:
    @staticmethod
    def peak(case: str, positions: int, order: int) -> int:
        done = subprocess.run(
            [
                sys.executable,
                Path(__file__).parent / "programs" / "torch_memory.py",
                case,
                str(positions),
                str(order),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])},
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    @pytest.mark.parametrize("order", [1, 2])
    def test_grows_linearly_and_is_a_fraction_of_one_map(self, order: int) -> None:
        small, large = (self.peak("attend", positions, order) for positions in (3000, 6000))
        assert math.log2(large / small) < 1.15
        # Fragmented blocks, one temporary each, take several times this and more with every block.
        assert large < 4 * 6000**2 // 2

    def test_the_measure_sees_a_map_and_a_checkpoint_that_saves_nothing(self) -> None:
        assert self.peak("dense", 2048, 1) > 4 * 2048**2
        assert self.peak("checkpoint", 2048, 2) > 4 * 4 * 2048**2


class TestDistributed:
    @pytest.mark.filterwarnings("ignore")
    def test_a_dtensor_is_attended_from_in_standard_operators(self) -> None:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            operands = draw()
            shards = [
                torch.distributed.tensor.distribute_tensor(
                    operand.detach(), mesh, [torch.distributed.tensor.Shard(0)]
                ).requires_grad_()
                for operand in operands
            ]
            out = attend(*shards, block_size=4)
            grads = torch.autograd.grad((out * out).sum(), shards)
            want = torch.autograd.grad(dense(*operands).square().sum(), operands)
            got = [grad.full_tensor() for grad in grads]
            assert max(errors(got, in_float64(want), torch.float64)) < 128
        finally:
            torch.distributed.destroy_process_group()


class TestImport:
    def test_takes_nothing_more_than_torch(self) -> None:
        code = (
            "import sys, torch; before = set(sys.modules); import selfattn_ops.torch;"
            "print(sorted(m for m in set(sys.modules) - before if not m.startswith('selfattn_ops')))"
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])},
        )
        assert "_dynamo" not in done.stdout
        assert "_inductor" not in done.stdout
