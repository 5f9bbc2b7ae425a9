import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

import selfattn_ops.jax as ops
from selfattn_ops.jax import attend, attend_with_map, products
from selfattn_ops.jax import blocks as jax_blocks
from selfattn_ops.jax.blocks import plan
from selfattn_ops.jax.dense import dense_attention

ROOT = Path(__file__).parents[2]
HELPER = Path(__file__).parent / "programs" / "jax_sharded.py"

# (leading, N, M, Dk, Dv), all different; N is prime or ragged in most blocks.
SIZES = (
    ((2,), 7, 5, 3, 4),
    ((), 11, 6, 2, 5),
    ((2, 3), 13, 8, 4, 6),
    ((3,), 1, 5, 2, 4),
    ((1,), 24, 10, 3, 7),
)


def swap(array):
    return np.swapaxes(array, -1, -2)


def softmax(scores):
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def rowsum(array):
    return array.sum(-1, keepdims=True)


def forward(q, k, v):
    return softmax(q @ swap(k)) @ v


def first(q, k, v, g):
    """Gradients of Σ g∘o towards q, k, v."""
    A = softmax(q @ swap(k))
    dA = g @ swap(v)
    dS = A * (dA - rowsum(A * dA))
    return dS @ k, swap(dS) @ q, swap(A) @ g


def second(q, k, v, g, qt, kt, vt):
    """Gradients of ⟨dq, qt⟩ + ⟨dk, kt⟩ + ⟨dv, vt⟩ towards q, k, v and g; the last is the tangent of o."""
    A = softmax(q @ swap(k))
    dA = g @ swap(v)
    D = rowsum(A * dA)
    dS = A * (dA - D)
    U = qt @ swap(k) + q @ swap(kt)
    centred = U - rowsum(A * U)
    At = A * centred
    X = centred * (dA - D) + g @ swap(vt)
    dSt = A * (X - rowsum(A * X))
    return dSt @ k + dS @ kt, swap(dSt) @ q + swap(dS) @ qt, swap(At) @ g, At @ v + A @ vt


def draw(sizes, seed=0, dtype=np.float64):
    """Query, key, value, cotangent of the output and three tangents, with logits of about 8."""
    leading, N, M, Dk, Dv = sizes
    rng = np.random.default_rng(seed)
    gain = (8 / 3 / Dk**0.5) ** 0.5
    shapes = [(N, Dk), (M, Dk), (M, Dv), (N, Dv), (N, Dk), (M, Dk), (M, Dv)]
    scales = [gain, gain, 1, 1, 1, 1, 1]
    return [
        (rng.normal(size=(*leading, *shape)) * scale).astype(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="block_size")
def derivatives(q, k, v, g, *tangents, block_size=None):
    """The output, its three gradients, and the four gradients of their product with the tangents."""

    def gradients(q, k, v, g):
        return jax.vjp(functools.partial(attend, block_size=block_size), q, k, v)[1](g)

    once, again = jax.vjp(gradients, q, k, v, g)
    return attend(q, k, v, block_size=block_size), once, again(tangents)


def wanted(*arrays):
    arrays = [np.asarray(array, np.float64) for array in arrays]
    return forward(*arrays[:3]), first(*arrays[:4]), second(*arrays)


def errors(got, want, eps):
    """Largest error in eps of the largest value wanted."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return [
        np.abs(np.asarray(one, np.float64) - other).max() / np.abs(other).max() / eps
        for one, other in pairs
        if other.size
    ]


def equations_in(jaxpr):
    """All equations, those of inner functions and loops too, and those that our own primitive stands for."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive is products._product:
            multiply = functools.partial(products._computed, **equation.params)
            yield from equations_in(jax.make_jaxpr(multiply)(*(x.aval for x in equation.invars)).jaxpr)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from equations_in(getattr(inner, "jaxpr", inner))


def is_matrix(dot):
    """Whether a product has rows, columns and a sum."""
    (left, right), (batch, _) = dot.params["dimension_numbers"]
    sizes = [x.aval.ndim - len(batch) for x in dot.invars]
    return bool(left) and sizes[0] > len(left) and sizes[1] > len(right)


def program(function, *shapes, dtype=np.float32):
    """Equations of a function of arrays of these shapes."""
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return list(equations_in(jax.make_jaxpr(function)(*operands).jaxpr))


def largest(equations):
    """Elements of the largest result."""
    return max(result.aval.size for equation in equations for result in equation.outvars)


def squared(function):
    return lambda *operands: sum((x**2).sum() for x in jax.tree.leaves(function(*operands)))


def penalty(function):
    """Squared norm of the gradients of a squared norm, and with it the second-order step."""
    return jax.grad(squared(jax.grad(squared(function), (0, 1, 2))), (0, 1, 2))


class TestValues:
    @pytest.mark.parametrize(
        ("sizes", "block_size"),
        [
            *((sizes, 4) for sizes in SIZES),
            *((SIZES[0], rows) for rows in (None, 1, 3, 1000)),
            (SIZES[2], None),
        ],
        ids=str,
    )
    def test_exact_in_float64(self, sizes, block_size):
        arrays = draw(sizes)
        with jax.enable_x64(True):
            got = derivatives(*map(jnp.asarray, arrays), block_size=block_size)
        assert max(errors(got, wanted(*arrays), np.finfo(np.float64).eps)) < 128

    @pytest.mark.parametrize("block_size", [None, 5])
    @pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
    def test_float32(self, sizes, block_size):
        arrays = draw(sizes, seed=1, dtype=np.float32)
        y, once, twice = derivatives(*map(jnp.asarray, arrays), block_size=block_size)
        assert {x.dtype for x in jax.tree.leaves((y, once, twice))} == {jnp.dtype(np.float32)}
        want = wanted(*arrays)
        eps = np.finfo(np.float32).eps
        assert max(errors(y, want[0], eps)) < 16
        assert max(errors(once, want[1], eps)) < 128
        assert max(errors(twice, want[2], eps)) < 128

    @pytest.mark.parametrize("function", [attend, attend_with_map, functools.partial(attend, block_size=4)])
    def test_sixteen_bits_meet_in_float32(self, function):
        # Asked of the program, not of the values: XLA may skip a rounding to 16 bits that the program asks for.
        equations = program(function, (2, 12, 3), (2, 10, 3), (2, 10, 4), dtype=jnp.bfloat16)
        found = {
            (x.invars[0].aval.dtype.name, x.outvars[0].aval.dtype.name)
            for x in equations
            if x.primitive.name == "dot_general"
        }
        assert found == {("bfloat16", "float32")}
        assert {
            x.outvars[0].aval.dtype.name for x in equations if x.primitive.name in {"exp", "reduce_sum"}
        } == {"float32"}

    @pytest.mark.parametrize("block_size", [None, 4])
    @pytest.mark.parametrize("order", ["first", "second", "forward mode", "forward over reverse"])
    def test_derivatives_multiply_bfloat16(self, order, block_size):
        function = functools.partial(attend, block_size=block_size)
        gradient = jax.grad(squared(function), (0, 1, 2))
        equations = program(
            {
                "first": gradient,
                "second": penalty(function),
                "forward mode": lambda *x: jax.jvp(function, x, x),
                "forward over reverse": lambda *x: jax.jvp(gradient, x, x),
            }[order],
            (2, 12, 3),
            (2, 10, 3),
            (2, 10, 4),
            dtype=jnp.bfloat16,
        )
        found = [x for x in equations if x.primitive.name == "dot_general"]
        # Sums along rows of the map, and what spreads a row's number over its row, are not products of matrices.
        matrices = [x for x in found if is_matrix(x)]
        assert len(matrices) > 3
        assert {x.invars[0].aval.dtype.name for x in matrices} == {"bfloat16"}
        assert {x.outvars[0].aval.dtype.name for x in found} == {"float32"}

    @pytest.mark.parametrize(("name", "block_size"), [("bfloat16", None), ("bfloat16", 32), ("float16", 32)])
    def test_sixteen_bits(self, name, block_size):
        dtype = jnp.dtype(name)
        arrays = [jnp.asarray(x, dtype) for x in draw(((2,), 96, 80, 16, 24), seed=2)]
        got = derivatives(*arrays, block_size=block_size)
        assert {x.dtype for x in jax.tree.leaves(got)} == {dtype}
        assert max(errors(got, wanted(*arrays), float(jnp.finfo(dtype).eps))) < 4

    def test_with_map(self):
        q, k, v, *_ = draw(((2,), 7, 5, 3, 4))
        with jax.enable_x64(True):
            y, A = attend_with_map(*map(jnp.asarray, (q, k, v)), block_size=2)
            check_grads(jax.jit(attend_with_map), (q, k, v), order=2)
        np.testing.assert_allclose(A, softmax(q @ swap(k)), rtol=1e-12)
        np.testing.assert_allclose(y, forward(q, k, v), rtol=1e-12)

    @pytest.mark.parametrize("name", ["float32", "bfloat16"])
    def test_map_in_the_dtype_of_the_operands(self, name):
        operands = [jnp.asarray(x, name) for x in draw(((2,), 7, 5, 3, 4))[:3]]
        assert [x.dtype for x in attend_with_map(*operands)] == [jnp.dtype(name)] * 2

    @pytest.mark.parametrize("block_size", [None, 2])
    @pytest.mark.parametrize("shape", [(0, 7), (2, 0), (0, 3, 7), (3, 0, 7)])
    def test_nothing_to_do(self, shape, block_size):
        *leading, N = shape
        operands = [jnp.ones((*leading, *inner)) for inner in ((N, 3), (5, 3), (5, 4))]
        y = attend(*operands, block_size=block_size)
        assert y.shape == (*leading, N, 4)
        gradients = jax.grad(lambda *x: attend(*x, block_size=block_size).sum(), (0, 1, 2))(*operands)
        assert not any(x.any() for x in gradients)

    @pytest.mark.parametrize("block_size", [None, 3])
    @pytest.mark.parametrize(("name", "size"), [("float32", 1e4), ("bfloat16", 300), ("float16", 3e4)])
    def test_extreme_logits(self, name, size, block_size):
        # Products of exact powers of two and small integers, so that the logits are what they should be.
        q = jnp.asarray([[1], [-1], [0.5], [0], [1], [-1], [1]], name)
        k = jnp.asarray([[size], [0], [-size], [size], [1]], name)
        v = jnp.arange(10, dtype=name).reshape(5, 2)
        y, once, twice = derivatives(q, k, v, v[:1] * jnp.ones_like(q) + 1, q, k, v, block_size=block_size)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((y, once)))
        operands = (np.asarray(x, np.float64) for x in (q, k, v))
        np.testing.assert_allclose(
            np.asarray(y, np.float64), forward(*operands), rtol=4 * jnp.finfo(name).eps
        )
        assert all(not jnp.isnan(x).any() for x in jax.tree.leaves(twice))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("operand", range(3))
    def test_bad_input_stays_in_its_rows(self, operand, bad):
        arrays = [x.astype(np.float32) for x in draw(((3,), 7, 5, 2, 4))[:3]]
        arrays[operand][1, 4, 1] = bad
        clean = attend(*draw(((3,), 7, 5, 2, 4), dtype=np.float32)[:3], block_size=3)
        with np.errstate(invalid="ignore"):
            want = forward(*arrays)
        got = np.asarray(attend(*arrays, block_size=3))
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
        np.testing.assert_array_equal(got[[0, 2]], clean[jnp.asarray([0, 2])])
        gradients = jax.jit(jax.grad(lambda *x: attend(*x, block_size=3).sum(), (0, 1, 2)))(*arrays)
        assert all(np.isfinite(x[[0, 2]]).all() for x in map(np.asarray, gradients))

    def test_padding_adds_no_nan(self):
        # Every logit towards the infinite key is -inf, so it takes no part; a query of zeros would give 0·inf there.
        q, k, v = -np.ones((7, 1), np.float32), np.ones((5, 1), np.float32), np.ones((5, 2), np.float32)
        k[2] = np.inf
        for block_size in (7, 4):
            dv = jax.grad(lambda v, rows=block_size: attend(q, k, v, block_size=rows).sum())(v)
            np.testing.assert_allclose(dv[:, 0], [1.75, 1.75, 0, 1.75, 1.75], rtol=1e-6)


class TestDerivatives:
    def test_all_modes(self):
        operands = draw(((2,), 7, 5, 3, 4))[:3]
        with jax.enable_x64(True):
            check_grads(jax.jit(functools.partial(attend, block_size=3)), operands, order=2)

    @pytest.mark.parametrize("block_size", [None, 3])
    def test_forward_mode(self, block_size):
        q, k, v, _, *tangents = draw(((2,), 7, 5, 3, 4))
        with jax.enable_x64(True):
            _, tangent = jax.jvp(functools.partial(attend, block_size=block_size), (q, k, v), tuple(tangents))
        np.testing.assert_allclose(tangent, second(q, k, v, np.zeros((2, 7, 4)), *tangents)[3], rtol=1e-11)

    @pytest.mark.parametrize(
        ("outer", "inner"), [(jax.jacfwd, jax.jacfwd), (jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd)]
    )
    def test_hessian(self, outer, inner):
        q, k, v, g, *_ = draw(((), 5, 4, 2, 3))
        with jax.enable_x64(True):
            blocked, dense = (
                jax.jit(outer(inner(lambda k, f=f: (g * f(q, k, v)).sum())))(k)
                for f in (
                    functools.partial(attend, block_size=2),
                    lambda q, k, v: jax.nn.softmax(q @ k.T) @ v,
                )
            )
        np.testing.assert_allclose(blocked, dense, rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("wrt", [(0,), (1,), (2,), (0, 2), (1, 2)])
    def test_some_operands_only(self, wrt):
        arrays = draw(((2,), 7, 5, 3, 4))
        q, k, v, g, *_ = arrays
        with jax.enable_x64(True):
            got = jax.jit(jax.grad(lambda *x: (g * attend(*x, block_size=3)).sum(), wrt))(q, k, v)
        for index, gradient in zip(wrt, got, strict=True):
            np.testing.assert_allclose(gradient, first(q, k, v, g)[index], rtol=1e-11, atol=1e-14)

    @pytest.mark.parametrize("block_size", [None, 3])
    @pytest.mark.parametrize("axes", [(0, 0, 0), (1, None, 2), (None, 1, None)])
    def test_vmap(self, axes, block_size):
        arrays = draw(((2,), 7, 5, 3, 4))[:3]
        f = functools.partial(attend, block_size=block_size)
        mapped = [
            x[0] if axis is None else np.moveaxis(x, 0, axis) for x, axis in zip(arrays, axes, strict=True)
        ]
        want = [x[:1] if axis is None else x for x, axis in zip(arrays, axes, strict=True)]
        with jax.enable_x64(True):
            np.testing.assert_allclose(jax.vmap(f, axes)(*mapped), forward(*want), rtol=1e-12)

    def test_gradients_per_sample(self):
        q, k, v, g, *_ = draw(((2,), 7, 5, 3, 4))
        with jax.enable_x64(True):
            one = jax.grad(lambda q, k, v, g: (g * attend(q, k, v, block_size=3)).sum(), (0, 1, 2))
            got = jax.vmap(one)(q, k, v, g)
        for one, other in zip(got, first(q, k, v, g), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-14)

    def test_remat_and_jit_outside(self):
        arrays = draw(((2,), 7, 5, 3, 4))
        with jax.enable_x64(True):
            got = jax.jit(penalty(jax.checkpoint(functools.partial(attend, block_size=3))))(*arrays[:3])
            want = jax.jit(penalty(functools.partial(attend, block_size=7)))(*arrays[:3])
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


class TestBatchSplit:
    @pytest.fixture(autouse=True)
    def small_budget(self, monkeypatch):
        # What three elements of 4 rows and 5 keys need, so that 4 rows of seven do not fit.
        monkeypatch.setattr("selfattn_ops.blocks.SCORE_BUDGET", 3 * 4 * 4 * 5)
        monkeypatch.setattr("selfattn_ops.blocks.MINIMUM_ROWS", 4)
        monkeypatch.setattr(jax_blocks, "SCORE_BUDGET", 3 * 4 * 4 * 5)
        ops._attend.clear_cache()
        yield
        ops._attend.clear_cache()

    def test_plan(self):
        assert plan((3, 11, 3), 5, None) == (1, 3)
        assert plan((7, 11, 3), 5, None) == (3, 3)
        assert plan((7, 3, 3), 5, None)[1] == 1
        assert plan((6, 12, 3), 100, None) == (6, 3), "one at a time when even one exceeds the budget"
        assert plan((7, 11, 3), 5, 2)[0] == 1, "a choice of rows is kept as it is"

    @pytest.mark.parametrize(
        ("leading", "N", "M"), [((7,), 11, 5), ((2, 4), 11, 5), ((5,), 3, 5), ((2, 2), 8, 31)]
    )
    def test_values(self, leading, N, M):
        arrays = draw((leading, N, M, 2, 6))
        assert plan(arrays[0].shape, M, None)[0] > 1
        with jax.enable_x64(True):
            got = derivatives(*map(jnp.asarray, arrays))
        assert max(errors(got, wanted(*arrays), np.finfo(np.float64).eps)) < 128

    def test_no_array_of_the_whole_batch(self):
        shapes = ((12, 16, 2), (12, 20, 2), (12, 20, 3))
        for function in (attend, jax.grad(squared(attend), (0, 1, 2)), penalty(attend)):
            # The operands themselves have up to 720 elements, all maps together 3840.
            assert largest(program(function, *shapes)) < 1000


class TestMemory:
    """Nothing of N × M elements, at either order, and temporary memory that grows as N."""

    rows = 128

    def single(self, q, k, v):
        """The same blocks with one checkpoint, which the checks below have to refuse."""
        k, v = k.swapaxes(-1, -2), v.swapaxes(-1, -2)
        body = jax.checkpoint(functools.partial(dense_attention, factors=np.float32), prevent_cse=False)
        return jax.lax.map(lambda block: body(block, k, v), q.reshape(-1, self.rows, q.shape[-1]))

    def attend(self, q, k, v):
        return attend(q, k, v, block_size=self.rows)

    @staticmethod
    def exponent(function):
        sizes = (1024, 2048, 4096)
        used = []
        for N in sizes:
            operands = [jax.ShapeDtypeStruct((N, width), np.float32) for width in (8, 8, 64)]
            used.append(jax.jit(function).lower(*operands).compile().memory_analysis().temp_size_in_bytes)
        return np.polyfit(np.log(sizes), np.log(used), 1)[0]

    shapes = ((1024, 8), (1024, 8), (1024, 16))

    def test_no_map_in_the_program(self):
        gradient = jax.grad(squared(self.attend), (0, 1, 2))
        for function in (
            self.attend,
            gradient,
            penalty(self.attend),
            lambda *operands: jax.jvp(self.attend, operands, operands),
            lambda *operands: jax.jvp(gradient, operands, operands),
        ):
            assert largest(program(function, *self.shapes)) <= self.rows * 1024

    def test_one_checkpoint_is_seen(self):
        assert largest(program(jax.grad(squared(self.single), (0, 1, 2)), *self.shapes)) <= self.rows * 1024
        assert largest(program(penalty(self.single), *self.shapes)) >= 1024 * 1024

    def test_first_order_is_linear(self):
        assert self.exponent(self.attend) < 1.15
        assert self.exponent(jax.grad(squared(self.attend), (0, 1, 2))) < 1.15

    def test_second_order_is_linear(self):
        assert self.exponent(penalty(self.attend)) < 1.15

    def test_one_checkpoint_is_quadratic_at_second_order(self):
        assert self.exponent(penalty(self.single)) > 1.5

    def test_resident_memory_of_a_second_order_step(self):
        # The compiler's figure leaves out what its library allocates; one map would be 256 MiB.
        script = """if True:
            import resource, jax, jax.numpy as jnp
            from selfattn_ops.jax import attend
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            squared = lambda f: lambda *x: sum((y**2).sum() for y in jax.tree.leaves(f(*x)))
            step = jax.jit(jax.grad(squared(jax.grad(squared(attend), (0, 1, 2))), (0, 1, 2)))
            small, large = ([jnp.ones((1, N, width)) / 8 for width in (8, 8, 64)] for N in (1024, 8192))
            jax.block_until_ready(step(*small))
            before = peak()
            jax.block_until_ready(step(*large))
            print(peak() - before)
        """
        assert float(run(script)) < 192


class TestProgram:
    """What the compiled program is made of."""

    def test_one_block_is_dense(self):
        shapes = ((1, 32, 2), (1, 32, 2), (1, 32, 16))

        def overhead(function):
            return {x.primitive.name for x in program(function, *shapes)} & {
                "scan",
                "while",
                "checkpoint",
                "remat2",
            }

        for function in (attend, jax.grad(squared(attend), (0, 1, 2)), penalty(attend)):
            assert not overhead(function)
        blocks = functools.partial(attend, block_size=31)
        assert overhead(blocks) == {
            "scan",
            jax.make_jaxpr(jax.checkpoint(jnp.sin))(1.0).eqns[0].primitive.name,
        }

    shapes = ((12, 2), (10, 2), (10, 3))

    def test_gradients_are_summed_transposed(self):
        # As (M, D) the sums cost XLA's CPU library two to ten times the time.
        gradient = jax.grad(squared(functools.partial(attend, block_size=4)), (0, 1, 2))
        carried = set()
        for equation in program(gradient, *((1, *shape) for shape in self.shapes)):
            if equation.primitive.name == "scan":
                # JAX 0.12 has no `num_carry`. What is stacked leaves the loop with one axis more than the body.
                inner = equation.params["jaxpr"]
                results = zip(equation.outvars, getattr(inner, "jaxpr", inner).outvars, strict=True)
                carried |= {
                    outer.aval.shape for outer, each in results if outer.aval.shape == each.aval.shape
                }
        assert carried - {()} == {(2, 10), (3, 10)}

    def test_row_sums_of_products_are_contractions(self):
        # As a product and a sum they cost XLA's CPU library 100 times the time where the batch is 1. The sum that is
        # left is the softmax's own: once in the forward pass, once where that is recomputed.
        gradient = jax.grad(lambda *x: (attend(*x, block_size=4) * np.float32(2)).sum(), (0, 1, 2))
        sums = [x for x in program(gradient, *self.shapes) if x.primitive.name == "reduce_sum"]
        assert len([x for x in sums if x.invars[0].aval.shape == (4, 10)]) == 2

    @pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
    @pytest.mark.parametrize("block_size", [None, 4])
    @pytest.mark.parametrize("default", [None, "bfloat16"])
    def test_products_are_in_full_whatever_the_default(self, default, block_size, dtype):
        function = functools.partial(attend, block_size=block_size)
        functions = [function, jax.grad(squared(function), (0, 1, 2)), penalty(function)]
        functions += [] if block_size else [attend_with_map, penalty(attend_with_map)]
        with jax.default_matmul_precision(default):
            for each in functions:
                equations = program(each, *self.shapes, dtype=dtype)
                products = [x.params for x in equations if x.primitive.name == "dot_general"]
                assert len(products) > 1
                assert {x["precision"] for x in products} == {(jax.lax.Precision.HIGHEST,) * 2}

    def test_eager_calls_compile_once(self):
        operands = [jnp.ones(shape) for shape in ((12, 2), (10, 2), (10, 3))]
        ops._attend.clear_cache()
        for block_size in (4, 4, np.int64(4)):
            attend(*operands, block_size=block_size)
        assert ops._attend._cache_size() == 1

    @pytest.mark.parametrize("block_size", [None, 3])
    def test_export_with_a_symbolic_batch(self, block_size):
        arrays = draw(((2,), 7, 5, 3, 4))[:3]
        (batch,) = export.symbolic_shape("batch")
        shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), np.float32) for x in arrays]
        exported = export.export(jax.jit(functools.partial(attend, block_size=block_size)))(*shapes)
        assert ("while" in exported.mlir_module()) == (block_size is not None)
        got = export.deserialize(exported.serialize()).call(*(x.astype(np.float32) for x in arrays))
        assert max(errors(got, forward(*arrays), np.finfo(np.float32).eps)) < 16

    def test_export_with_symbolic_sizes(self):
        arrays = draw(((2,), 7, 5, 3, 4))[:3]
        batch, N, M = export.symbolic_shape("batch, n, m")
        shapes = [
            jax.ShapeDtypeStruct((batch, rows, width), np.float32) for rows, width in ((N, 3), (M, 3), (M, 4))
        ]
        exported = export.export(jax.jit(functools.partial(attend, block_size=3)))(*shapes)
        got = exported.call(*(x.astype(np.float32) for x in arrays))
        assert max(errors(got, forward(*arrays), np.finfo(np.float32).eps)) < 16


class TestErrors:
    @pytest.mark.parametrize("function", [attend, attend_with_map])
    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((6, 4), (5, 3), (5, 8)), "query has width 4 and key 3"),
            (((6, 4), (5, 4), (7, 8)), "key has 5 positions and value 7"),
            (((2, 6, 4), (3, 5, 4), (3, 5, 8)), "leading axes"),
            (((2, 6, 4), (5, 4), (5, 8)), "one rank"),
            (((4,), (4,), (4,)), "rank, of at least 2"),
        ],
    )
    def test_shapes(self, function, shapes, message):
        with pytest.raises(ValueError, match=message):
            function(*map(jnp.ones, shapes))

    @pytest.mark.parametrize("function", [attend, attend_with_map])
    def test_dtypes(self, function):
        with pytest.raises(ValueError, match="dtypes float32, float32, bfloat16"):
            function(jnp.ones((6, 4)), jnp.ones((5, 4)), jnp.ones((5, 3), jnp.bfloat16))

    @pytest.mark.parametrize("function", [attend, attend_with_map])
    @pytest.mark.parametrize("block_size", [0, -1, 2.0, True, "4", np.float32(2)])
    def test_block_size(self, function, block_size):
        with pytest.raises(ValueError, match="must be a positive integer"):
            function(jnp.ones((6, 4)), jnp.ones((5, 4)), jnp.ones((5, 3)), block_size=block_size)


def run(*arguments, devices=1):
    """The output of a Python process of its own: a script, or a file and its arguments."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-W", "error", *(["-c"] if len(arguments) == 1 else []), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_starts_nothing():
    script = """if True:
        import jax
        before = dict(jax.config.values)
        import selfattn_ops.jax
        from jax._src import xla_bridge
        assert dict(jax.config.values) == before
        assert not xla_bridge.backends_are_initialized()
        selfattn_ops.jax.attend(*[jax.numpy.ones((6, 2))] * 3, block_size=4)
        assert dict(jax.config.values) == before
    """
    run(script)


@pytest.fixture(scope="module")
def sharded():
    return json.loads(run(str(HELPER), "all", devices=8))


@pytest.mark.parametrize("mesh", ["Auto", "Explicit"])
@pytest.mark.parametrize("axis", ["batch", "rows"])
@pytest.mark.parametrize(("split", "order"), [(False, "forward"), (True, "forward"), (True, "penalty")])
def test_sharded(sharded, mesh, axis, split, order):
    """Eight devices agree with one, and talk only to sum the gradients of a shared key and value."""
    found = sharded[f"{mesh} {axis} {split} {order}"]
    assert found["error"] < 1e-12
    assert found["chunks"] == (2 if split else 1)
    if axis == "batch" or order == "forward":
        assert found["collectives"] == {}
    else:
        assert set(found["collectives"]) == {"all-reduce"}
