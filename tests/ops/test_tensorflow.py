"""`selfattn_ops.tensorflow` against dense formulas in numpy float64, in every way TensorFlow runs a function."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from selfattn_ops import blocks
from selfattn_ops.tensorflow import attend, attend_with_map, dense, derivatives, products
from selfattn_ops.tensorflow import blocks as tensorflow_blocks
from selfattn_ops.tensorflow.blocks import plan, rows_of_block
from tests.support import GRADIENT, OUTPUT, assert_near

# Largest error allowed, in eps of the dtype times the largest magnitude of the answer.
SECOND = 1000
# The same of two right answers in float64 that add up in different orders, at most 1e-10.
ROUNDINGS = 450_000

SLOW = pytest.mark.slow
# Both at once take longest to compile, and go through the code of each.
BOTH = pytest.param("xla, unknown sizes", marks=SLOW)
MODES = ("eager", "function", "unknown sizes", "xla", BOTH)
GRAPH_MODES = ("function", "unknown sizes")

# leading axes, N, M, block_size: one block, ragged, even, single rows, prime N, no leading axis, the automatic choice.
LAYOUTS = [
    ((2,), 12, 7, 4),
    ((2,), 13, 7, 4),
    ((), 11, 5, 3),
    ((2, 3), 13, 7, 13),
    ((3,), 4, 9, 1),
    ((2,), 1, 7, 1),
    ((2,), 11, 7, None),
]
QK_WIDTH, VALUE_WIDTH = 3, 5


def operands(leading, rows, keys, dtype=tf.float64, seed=1, scale=1.5):
    """q, k, v and a cotangent of the output; every axis has its own size."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, QK_WIDTH), (keys, QK_WIDTH), (keys, VALUE_WIDTH), (rows, VALUE_WIDTH))
    return [tf.constant(scale * rng.normal(size=(*leading, *shape)), dtype) for shape in shapes]


def in_float64(tensors):
    return [tf.cast(tensor, tf.float64).numpy() for tensor in tensors]


def turned(array):
    return np.swapaxes(array, -1, -2)


def dense_map(query, key):
    logits = query @ turned(key)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def dense_first(query, key, value, g):
    """o, dq, dk, dv."""
    attention = dense_map(query, key)
    d_attention = g @ turned(value)
    d_scores = attention * (d_attention - (attention * d_attention).sum(-1, keepdims=True))
    return [attention @ value, d_scores @ key, turned(d_scores) @ query, turned(attention) @ g]


def plain(query, key, value, *, block_size=None):
    """The dense formula in TensorFlow's own operations, for derivatives by its own rules."""
    scores = tf.matmul(query, key, transpose_b=True)
    weights = tf.exp(scores - tf.reduce_max(scores, -1, keepdims=True))
    return tf.matmul(weights / tf.reduce_sum(weights, -1, keepdims=True), value)


@functools.cache
def first(function, block_size):
    def run(query, key, value, g):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            output = function(query, key, value, block_size=block_size)
        return [output, *tape.gradient(output, [query, key, value], output_gradients=g)]

    return run


@functools.cache
def second(function, block_size):
    """Gradients of a curved function of the first derivatives, so that each of their cotangents differs."""

    def run(query, key, value, g):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value, g])
            penalty = tf.add_n(
                [tf.reduce_sum(tf.sin(x) * x) for x in first(function, block_size)(query, key, value, g)]
            )
        return tape.gradient(penalty, [query, key, value, g])

    return run


def third(function, block_size):
    def run(query, key, value, g):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value, g])
            penalty = tf.add_n(
                [tf.reduce_sum(x**2) for x in second(function, block_size)(query, key, value, g)]
            )
        return tape.gradient(penalty, [query, key, value, g])

    return run


def in_mode(function, mode, arguments):
    if mode == "eager":
        return function
    unknown = tuple(tf.TensorSpec([None] * x.shape.rank, x.dtype) for x in arguments)
    return graph_of(function, unknown if "unknown" in mode else None, "xla" in mode)


# A function of unknown sizes is traced once for all the sizes that the tests give it, as its users have it.
@functools.cache
def graph_of(function, signature, compiled):
    return tf.function(
        function, input_signature=signature, jit_compile=True if compiled else None, autograph=False
    )


def assert_each_near(got, want, ulps, dtype):
    for one, other in zip(got, want, strict=True):
        assert_near(one, other, ulps, dtype.name)


def cases(layouts):
    """Every layout in each mode; XLA, which takes seconds to compile, in ragged blocks only."""
    plain = [(mode, *layout) for mode in ("eager", *GRAPH_MODES) for layout in layouts]
    return [*plain, ("xla", *LAYOUTS[1]), pytest.param(*BOTH.values, *LAYOUTS[1], marks=SLOW)]


@pytest.mark.parametrize(("mode", "leading", "rows", "keys", "block_size"), cases(LAYOUTS))
def test_output_and_gradients_of_all_operands(mode, leading, rows, keys, block_size):
    for dtype in (tf.float32,) if "xla" in mode else (tf.float32, tf.float64):
        given = operands(leading, rows, keys, dtype)
        output, *gradients = in_mode(first(attend, block_size), mode, given)(*given)
        want = dense_first(*in_float64(given))
        assert output.dtype == dtype
        assert_each_near(in_float64([output]), want[:1], OUTPUT, dtype)
        assert_each_near(in_float64(gradients), want[1:], GRADIENT, dtype)


@pytest.mark.parametrize(
    ("mode", "leading", "rows", "keys", "block_size"), cases([LAYOUTS[1], LAYOUTS[2], LAYOUTS[-1]])
)
def test_second_derivatives_of_all_operands(mode, leading, rows, keys, block_size):
    for dtype in (tf.float32,) if "xla" in mode else (tf.float32, tf.float64):
        given = operands(leading, rows, keys, dtype)
        got = in_mode(second(attend, block_size), mode, given)(*given)
        want = second(plain, None)(*(tf.cast(x, tf.float64) for x in given))
        assert_each_near(in_float64(got), in_float64(want), SECOND, dtype)


def test_derivatives_against_finite_differences():
    given = operands((), 3, 2)
    for derivative in (first(attend, 2), second(attend, 2)):
        function = in_mode(derivative, "function", given)
        for index in range(len(function(*given))):
            analytic, numeric = tf.test.compute_gradient(
                lambda *x, function=function, index=index: function(*x)[index], given, delta=1e-5
            )
            for one, other in zip(analytic, numeric, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-6 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize("mode", ["eager", "function", pytest.param("unknown sizes", marks=SLOW)])
def test_third_derivatives(mode):
    given = operands((2,), 9, 4)
    got = in_mode(third(attend, 4), mode, given)(*given)
    assert_each_near(in_float64(got), in_float64(third(plain, None)(*given)), ROUNDINGS, tf.float64)


def test_what_is_closed_over_keeps_its_gradient():
    query, key, value, g = operands((2,), 13, 7)
    variables = [tf.Variable(x) for x in (query, key, value)]
    want = dense_first(*in_float64((query, key, value, g)))

    def run():
        with tf.GradientTape() as tape:
            output = attend(*variables, block_size=4)
        return tape.gradient(output, variables, output_gradients=g)

    for each in (run, tf.function(run)):
        assert_each_near(in_float64(each()), want[1:], GRADIENT, tf.float64)


def branch(function):
    def run(query, key, value, *, block_size):
        return tf.cond(
            tf.reduce_sum(query) < 1e9,
            lambda: function(query, key, value, block_size=block_size),
            lambda: tf.zeros_like(query[..., :1]) * value[..., :1, :],
        )

    return run


def loop(function):
    def run(query, key, value, *, block_size):
        def body(step, q):
            return step + 1, q + function(q, key, value, block_size=block_size)[..., :QK_WIDTH]

        return tf.while_loop(lambda step, _: step < 2, body, (0, query))[1]

    return run


def mapped(function):
    def run(query, key, value, *, block_size):
        return tf.map_fn(
            lambda x: function(*x, block_size=block_size),
            (query, key, value),
            fn_output_signature=query.dtype,
        )

    return run


def compiled(function):
    return tf.function(
        lambda query, key, value, *, block_size: function(query, key, value, block_size=block_size)
    )


@pytest.mark.parametrize(
    ("around", "mode"),
    [
        *((around, mode) for around in (branch, loop, mapped, compiled) for mode in ("eager", "function")),
        (loop, "unknown sizes"),
        *(pytest.param(around, "unknown sizes", marks=SLOW) for around in (branch, mapped, compiled)),
    ],
)
def test_second_derivatives_within_other_graphs(around, mode):
    """Tapes outside a tf.function, and control flow, differentiate in graphs of their own."""
    query, key, value, g = operands((2,), 13, 7, scale=0.7)
    given = [query, key, value, g[..., :QK_WIDTH] if around is loop else g]
    got = in_mode(second(around(attend), 4), mode, given)(*given)
    assert_each_near(in_float64(got), in_float64(second(around(plain), None)(*given)), ROUNDINGS, tf.float64)


def test_forward_mode_and_jacobian():
    query, key, value, _ = operands((2,), 9, 4)
    for primal, tangent in ((query, query + 1), (key, key - 1), (value, value * 2)):
        answers = []
        for function in (attend, plain):
            with tf.autodiff.ForwardAccumulator(primal, tangent) as accumulator:
                output = function(query, key, value, block_size=4)
            with tf.GradientTape() as tape:
                tape.watch(primal)
                again = function(query, key, value, block_size=4)
            answers.append([accumulator.jvp(output), tape.jacobian(again, primal)])
        assert_each_near(*map(in_float64, answers), ROUNDINGS, tf.float64)


SIZES = [0, 1, 2, 127, 128, 129, 1000, 4096, 65536]


def test_rows_of_unknown_sizes_are_those_of_known_sizes():
    for block_size in (None, 1, 100, 10**9):
        for batch in (0, 1, 3, 40):
            for rows in SIZES:
                for keys in SIZES:
                    sizes = (batch, rows, keys)
                    got = rows_of_block(block_size, *(tf.constant(size, tf.int64) for size in sizes))
                    assert int(got) == blocks.block_rows(block_size, *sizes)
                    planned = plan(block_size, *(tf.constant(size, tf.int64) for size in sizes))
                    assert [int(x) for x in planned] == list(plan(block_size, *sizes))


def test_a_block_of_rows_and_elements_stays_within_the_budget():
    for batch in (1, 2, 7, 300):
        for rows, keys in ((4096, 4096), (64, 64), (1024, 256), (65536, 16384)):
            elements, block = plan(None, batch, rows, keys)
            assert 1 <= elements <= batch
            assert 1 <= block <= rows
            smallest = block == blocks.MINIMUM_ROWS and elements == 1
            assert smallest or 4 * elements * block * keys <= blocks.SCORE_BUDGET


@pytest.fixture
def small_budget(monkeypatch):
    """A budget of 2 batch elements of 3 × 7, or 10 rows of a single one; and the sizes of all scores computed."""
    for module in (blocks, tensorflow_blocks):
        monkeypatch.setattr(module, "SCORE_BUDGET", 4 * 70)
        monkeypatch.setattr(module, "MINIMUM_ROWS", 2)
    seen = []
    softmax_scores = dense.softmax_scores

    def spied(query, key):
        seen.append((*query.shape[:-1], key.shape[-2]))
        return softmax_scores(query, key)

    for module in (dense, derivatives):
        monkeypatch.setattr(module, "softmax_scores", spied)
    # A graph has the budget that it was traced with.
    graph_of.cache_clear()
    yield seen
    graph_of.cache_clear()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("leading", "rows", "shapes"), [((5,), 4, {(2, 4, 7), (1, 4, 7)}), ((3,), 13, {(1, 10, 7), (1, 3, 7)})]
)
def test_the_batch_is_split_where_rows_are_not_enough(small_budget, mode, leading, rows, shapes):
    given = operands(leading, rows, 7)
    got = in_mode(first(attend, None), mode, given)(*given)
    assert_each_near(in_float64(got), dense_first(*in_float64(given)), GRADIENT, tf.float64)
    got = in_mode(second(attend, None), mode, given)(*given)
    assert_each_near(in_float64(got), in_float64(second(plain, None)(*given)), SECOND, tf.float64)
    if "unknown" not in mode:
        assert set(small_budget) == shapes


@pytest.mark.parametrize("mode", ["unknown sizes", BOTH])
@pytest.mark.parametrize(("leading", "rows"), [((0,), 13), ((2,), 0)])
def test_nothing_is_attended_from_in_a_size_that_was_unknown(mode, leading, rows):
    given = operands(leading, rows, 7)
    got = in_mode(second(attend, 4), mode, given)(*given)
    assert [x.shape for x in got] == [x.shape for x in given]
    assert not any(x.numpy().any() for x in got)


def operations(graph):
    """Every operation of a graph and of the functions it calls."""
    definition = graph.as_graph_def()
    return [
        *definition.node,
        *(node for function in definition.library.function for node in function.node_def),
    ]


def traced(function, arguments):
    return tf.function(function).get_concrete_function(*arguments).graph


def test_one_block_is_the_dense_computation():
    given = operands((2,), 12, 7, tf.float32)

    def dense(query, key, value, *, block_size):
        return tf.matmul(tf.nn.softmax(tf.matmul(query, key, transpose_b=True)), value)

    for derivative in (first, second):
        ours, theirs = (
            sorted(node.op for node in operations(traced(derivative(function, None), given)))
            for function in (attend, dense)
        )
        assert ours == theirs


def test_the_graph_does_not_grow_with_the_number_of_blocks():
    few, many = (
        operations(traced(second(attend, 4), operands((2,), rows, 7, tf.float32)))
        # Both large: of few numbers TensorFlow makes a constant, of many an operation that fills.
        for rows in (4 * 50 + 1, 4 * 500 + 1)
    )
    assert sorted(node.op for node in few) == sorted(node.op for node in many)


def test_blocks_do_not_run_beside_one_another():
    for given in (operands((2,), 13, 7, tf.float32), operands((3000,), 40, 41, tf.float32)):
        loops = [
            node
            for node in operations(traced(second(attend, 4), given))
            if node.op in {"While", "StatelessWhile"}
        ]
        assert len(loops) >= 3
        assert {node.attr["parallel_iterations"].i for node in loops} == {1}


def test_xla_holds_no_array_of_all_scores():
    rows, keys = 300, 310
    given = operands((1,), rows, keys, tf.float32)
    for derivative in (first, second):
        compiled = tf.function(derivative(attend, 50), jit_compile=True)
        text = compiled.experimental_get_compiler_ir(*given)(stage="optimized_hlo")
        sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
        assert 50 * keys <= max(sizes) <= 51 * keys


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux' unit")
@pytest.mark.parametrize("mode", ["eager", "function", "inside"])
def test_memory_is_linear_at_both_orders(mode):
    """`inside`: a tf.function of the forward alone, the tapes around it."""
    small, large = 2048, 8192
    script = Path(__file__).parent / "programs" / "tensorflow_memory.py"
    run = subprocess.run(
        [sys.executable, str(script), mode, str(small), str(large)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # What is freed goes back to the system, or the peak would count what glibc keeps of it, three times as much.
            "MALLOC_MMAP_THRESHOLD_": str(2**20),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    peaks = json.loads(run.stdout)
    for order in (1, 2):
        one, other = peaks[f"{order} {small}"], peaks[f"{order} {large}"]
        assert other < 4 * large * large, (
            f"order {order}: {other / 2**20:.0f} MiB, one map is {large**2 / 2**18:.0f}"
        )
        # Order 2 starts above what order 1 left behind, so little of it may be new.
        assert math.log(max(other, 2**20) / max(one, 2**20), large / small) <= 1.2


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
@pytest.mark.parametrize("block_size", [None, 4])
def test_sixteen_bits(mode, dtype, block_size):
    query, key, *others = operands((2,), 13, 7, dtype)
    # Adds 64 to every logit: nothing to the softmax, and more to the rounding of 16-bit logits than they differ by.
    query, key = (
        tf.concat([tf.fill(x[..., :1].shape, tf.cast(8, dtype)), x[..., 1:]], -1) for x in (query, key)
    )
    given = [query, key, *others]
    output, *gradients = in_mode(first(attend, block_size), mode, given)(*given)
    assert {x.dtype for x in (output, *gradients)} == {dtype}
    want = dense_first(*in_float64(given))
    assert_each_near(in_float64([output]), want[:1], 1.5, dtype)
    assert_each_near(in_float64(gradients), want[1:], 4, dtype)
    got = in_mode(second(attend, block_size), mode, given)(*given)
    want = second(plain, None)(*(tf.cast(x, tf.float64) for x in given))
    assert_each_near(in_float64(got), in_float64(want), 32, dtype)


@pytest.fixture(params=[True, False])
def multiplies(request, monkeypatch):
    """Whether the processor is one that multiplies bfloat16 faster than float32."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("derivative", [first, second])
def test_derivatives_in_bfloat16_multiply_as_the_processor_does_best(multiplies, derivative):
    given = operands((2,), 13, 7, tf.bfloat16)
    nodes = operations(traced(derivative(attend, 4), given))
    dtypes = {node.attr["T"].type for node in nodes if node.op.startswith("BatchMatMul")}
    # Logits are float32 on every processor, and the output's product is bfloat16.
    assert dtypes == {tf.float32.as_datatype_enum, tf.bfloat16.as_datatype_enum}
    narrow = [
        node
        for node in nodes
        if node.op.startswith("BatchMatMul") and node.attr["T"].type == tf.bfloat16.as_datatype_enum
    ]
    assert (len(narrow) > len(nodes_of_forward(given))) is multiplies


def nodes_of_forward(given):
    nodes = operations(traced(functools.partial(attend, block_size=4), given[:3]))
    return [node for node in nodes if node.op.startswith("BatchMatMul")]


def test_derivatives_that_do_not_read_the_output(monkeypatch):
    """As of outputs so wide, or of 16 bits with factors of 32, that D is better computed from dA."""
    monkeypatch.setattr(products, "_WIDEST_OUTPUT", VALUE_WIDTH - 1)
    given = operands((2,), 9, 4)
    got = first(attend, 4)(*given)
    assert_each_near(in_float64(got), dense_first(*in_float64(given)), GRADIENT, tf.float64)
    for derivative in (second, third):
        got, want = (derivative(function, 4)(*given) for function in (attend, plain))
        assert_each_near(in_float64(got), in_float64(want), ROUNDINGS, tf.float64)
    monkeypatch.setattr(products, "_WIDEST_OUTPUT", VALUE_WIDTH)
    output = attend(*given[:3])
    assert products.reads_output(output, tf.float64)
    assert not products.reads_output(tf.cast(output, tf.bfloat16), tf.float32)
    assert products.reads_output(tf.ones((1, 2, 999), tf.bfloat16), tf.bfloat16)


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float32, tf.float64])
def test_a_shift_is_as_exact_as_the_sum_of_a_product(dtype):
    wide = dense.arithmetic_of(dtype)
    rng = np.random.default_rng(5)
    rows, other = (tf.constant(rng.normal(size=(2, size, 6)), dtype) for size in (5, 9))
    shift = tf.constant(1000 + rng.normal(size=(2, 5, 1)), wide)
    got = tf.matmul(
        tf.cast(products.with_shift(rows, shift), wide),
        tf.cast(products.with_ones(other), wide),
        transpose_b=True,
    )
    want = in_float64([rows])[0] @ turned(in_float64([other])[0]) - shift.numpy().astype(np.float64)
    assert_each_near([got.numpy()], [want], OUTPUT, wide)


@pytest.mark.parametrize(
    ("flags", "variables", "expected"),
    [
        ("avx512f avx512_bf16 amx_bf16", {}, True),
        ("avx512f avx512_bf16", {}, False),
        ("avx2 avx512f avx512_vnni", {}, False),
        ("amx_bf16", {"TF_ENABLE_ONEDNN_OPTS": "0"}, False),
        ("amx_bf16", {"ONEDNN_MAX_CPU_ISA": "avx2"}, False),
        ("amx_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, False),
        ("amx_bf16", {"DNNL_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True),
    ],
)
def test_what_the_processor_multiplies(monkeypatch, flags, variables, expected):
    for name in ("TF_ENABLE_ONEDNN_OPTS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"flags\t\t: fpu {flags} vme\n")
    assert products.multiplies_bfloat16.__wrapped__() is expected


def extreme(dtype, size):
    """Logits from -size to size, the largest in another column of each row; the rest within the largest."""
    query = tf.constant([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype)
    key = tf.constant([[size, -size], [-size, 0.0], [size / 2, size]], dtype)
    value = tf.constant([[1.0, 2.0, 0.5], [3.0, 4.0, 0.25], [-5.0, 6.0, 8.0]], dtype)
    return query, key, value


@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize(("dtype", "size"), [(tf.float32, 1e4), (tf.bfloat16, 300.0), (tf.float16, 6e4)])
def test_large_logits(mode, block_size, dtype, size):
    query, key, value = extreme(dtype, size)
    given = [query * 8 if dtype == tf.float16 else query, key, value, tf.ones((5, 3), dtype)]
    output, *gradients = in_mode(first(attend, block_size), mode, given)(*given)
    want = dense_first(*in_float64(given))
    assert_each_near(in_float64([output]), want[:1], 1.0, dtype)
    for got, exact in zip(in_float64(gradients), want[1:], strict=True):
        # Half precision has no number for a gradient beyond its largest.
        assert (np.isfinite(got) | (np.abs(exact) > dtype.max)).all()


@pytest.mark.parametrize("mode", ["eager", *GRAPH_MODES])
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_stays_where_it_belongs(mode, block_size, poison):
    clean = operands((3,), 13, 7)
    want = dense_first(*in_float64(clean))
    for index in range(4):
        given = [x.numpy() for x in clean]
        given[index][1, 2, 0] = poison
        with np.errstate(invalid="ignore"):
            dense = dense_first(*given)
        given = [tf.constant(x) for x in given]
        for got, reference, untouched in zip(
            in_mode(first(attend, block_size), mode, given)(*given), dense, want, strict=True
        ):
            assert_each_near([got.numpy()[::2]], [untouched[::2]], GRADIENT, tf.float64)
            bad, expected = ~np.isfinite(got.numpy()[1]), ~np.isfinite(reference[1])
            np.testing.assert_array_equal(bad, expected)


@pytest.mark.parametrize("mode", ["eager", *GRAPH_MODES])
@pytest.mark.parametrize(("leading", "rows"), [((0,), 13), ((2,), 0), ((0, 3), 5)])
def test_nothing_to_attend_from(mode, leading, rows):
    given = operands(leading, rows, 7)
    output, *gradients = in_mode(first(attend, 4), mode, given)(*given)
    assert output.shape == (*leading, rows, VALUE_WIDTH)
    assert [x.shape for x in gradients] == [x.shape for x in given[:3]]
    assert all(np.isfinite(x).all() for x in in_float64(gradients))


@pytest.mark.parametrize("block_size", [None, 4])
def test_the_map(block_size):
    given = operands((2,), 13, 7)
    output, attention = attend_with_map(*given[:3], block_size=block_size)
    query, key, value, g = in_float64(given)
    assert_each_near(
        [attention.numpy(), output.numpy()],
        [dense_map(query, key), dense_map(query, key) @ value],
        OUTPUT,
        tf.float64,
    )

    def function(*given, block_size):
        return attend_with_map(*given, block_size=block_size)[0]

    got = first(function, block_size)(*given)
    assert_each_near(in_float64(got), dense_first(query, key, value, g), GRADIENT, tf.float64)
    assert attend_with_map(*operands((2,), 13, 7, tf.bfloat16)[:3])[1].dtype == tf.bfloat16


def test_saved_and_loaded_with_unknown_sizes(tmp_path):
    module = tf.Module()
    signature = [
        tf.TensorSpec([None, None, width], tf.float32) for width in (QK_WIDTH, QK_WIDTH, VALUE_WIDTH)
    ]
    module.attend = tf.function(lambda q, k, v: attend(q, k, v, block_size=4), input_signature=signature)
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for leading, rows in (((2,), 13), ((3,), 3)):
        given = operands(leading, rows, 7, tf.float32)
        assert_each_near(
            in_float64([loaded.attend(*given[:3])]), dense_first(*in_float64(given))[:1], OUTPUT, tf.float32
        )


@pytest.mark.parametrize("function", [attend, attend_with_map])
def test_operands_that_do_not_belong_together(function):
    query, key, value, _ = operands((2,), 13, 7)
    for given, said in (
        ((query, key[..., :2], value), "query has width 3 and key 2"),
        ((query, key[:, :6], value), "key has 6 positions and value 7"),
        ((query[:1], key, value), "leading axes"),
        ((query[0], key, value), "one rank"),
        ((query, tf.cast(key, tf.float32), value), "dtypes"),
    ):
        with pytest.raises(ValueError, match=said):
            function(*given)
    for block_size in (0, -1, 1.5, True, "4"):
        with pytest.raises(ValueError, match="positive integer"):
            function(query, key, value, block_size=block_size)
    unknown = tf.TensorSpec(None, tf.float64)
    with pytest.raises(ValueError, match="unknown rank"):
        tf.function(
            lambda q: function(q, key, value), input_signature=[unknown], autograph=False
        ).get_concrete_function()


def test_leading_axes_that_differ_once_they_are_known():
    query, key, value, _ = operands((2,), 13, 7)
    unknown = [tf.TensorSpec([None] * 3, tf.float64)] * 3
    function = tf.function(attend, input_signature=unknown)
    with pytest.raises(tf.errors.InvalidArgumentError):
        function(query, key[:1], value[:1])
