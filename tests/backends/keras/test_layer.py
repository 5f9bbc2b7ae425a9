"""The Keras layer against the numpy specification, and against layers of other hands."""

import dataclasses
import re
from typing import get_args

import keras
import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, init_params, parameter_table, spec
from selfattn_core.conformance import REGISTRY
from selfattn_core.conformance.cases.computations import Ability
from selfattn_keras import SelfAttention2D, from_canonical
from selfattn_keras.conformance.backend import backend
from selfattn_keras.conformance.model import Model
from selfattn_keras.projection import Projection
from tests.support import CONFIGS, FLAT, GRADIENT, OUTPUT, POOLED, designed, to_numpy, wide

FRAMEWORK = keras.backend.backend()
LAYOUTS = ["channels_last", "channels_first"]
# As many value channels as the map is wide: Keras then takes a channels-first bias on TensorFlow for the wrong axis.
LAYERS = CONFIGS | {"out projection": SelfAttentionConfig(11, 3, 9, out_projection=True)}


def error(got, want, eps, scale=None):
    """The largest error in units of eps times the largest of `want`."""
    assert got.shape == want.shape
    scale = np.abs(want).max(initial=0) if scale is None else scale
    return float(np.abs(np.float64(got) - want).max(initial=0)) / (float(eps) * max(float(scale), 1e-300))


def assert_gradients(got, want, eps, cancelling, gamma_terms):
    """Every gradient to `GRADIENT` eps; sums that cancel are measured by what is summed."""
    assert list(got) == list(want)
    largest = max(np.abs(value).max(initial=0) for value in want.values())
    for name, value in want.items():
        scale = largest if name in cancelling else gamma_terms if name == "gamma" else None
        assert error(got[name], value, eps, scale) <= GRADIENT, name


def test_backend_is_what_the_kit_expects():
    assert backend.claims() <= set(get_args(Ability))
    assert backend.name in REGISTRY
    assert set(backend.versions()) == {"keras", FRAMEWORK}
    assert backend.layouts() == ("channels_last", "channels_first")


@pytest.mark.parametrize(("dtype", "layout"), [("float32", LAYOUTS[1]), ("float64", LAYOUTS[0])])
def test_forward_map_and_derivatives(dtype, layout):
    """Of one layer, in this process; tests/conformance compares every kind of layer and shape."""
    config = LAYERS["pooled with biases"]
    eps = np.finfo(dtype).eps
    params, x, dy = designed(config, dtype)
    exact, wide_x, wide_dy = map(wide, (params, x, dy))
    model = backend.build(config, params, dtype, layout)
    y, A = backend.forward(model, x), backend.attention_map(model, x)
    assert y.dtype == A.dtype == dtype
    assert error(y, spec.forward(config, exact, wide_x), eps) <= OUTPUT
    assert error(A, spec.attention_map(config, exact, wide_x), eps) <= OUTPUT
    z = (spec.forward(config, exact, wide_x) - wide_x) / 0.7
    want = spec.vjp(config, exact, wide_x, wide_dy)
    assert_gradients(backend.vjp(model, x, dy), want, eps, ["key.bias"], np.abs(wide_dy * z).sum())
    value, want = spec.r1(config, exact, wide_x, wide_dy)
    got, gradients = backend.r1(model, x, dy)
    assert abs(got - value) <= GRADIENT * eps * value
    assert_gradients(gradients, want, eps, ["key.bias", "value.bias", "out.bias"], None)


def test_block_size_changes_nothing_but_rounding():
    params, x, dy = designed(FLAT)
    exact, wide_x, wide_dy = map(wide, (params, x, dy))
    model = Model(from_canonical(FLAT, params, block_size=8, data_format="channels_last"))
    eps = np.finfo("float32").eps
    assert error(backend.forward(model, x), spec.forward(FLAT, exact, wide_x), eps) <= OUTPUT
    gradients = backend.r1(model, x, dy)[1]
    want = spec.r1(FLAT, exact, wide_x, wide_dy)[1]
    assert_gradients(gradients, want, eps, ["key.bias", "value.bias"], None)


def test_block_size_reaches_the_core(monkeypatch):
    received = []

    def record(query, key, value, *, block_size):
        received.append(block_size)
        return value

    import selfattn_keras.layer

    monkeypatch.setattr(selfattn_keras.layer._ops, "attend", record)
    layer = SelfAttention2D.from_spec(FLAT, block_size=5)
    layer(np.zeros((1, 2, 3, 11), "float32"))
    assert received == [5]


def test_both_formats_give_the_same_map_and_output():
    params, x, _ = designed(POOLED, shape=(2, 5, 7))
    last, first = (from_canonical(POOLED, params, data_format=layout) for layout in LAYOUTS)
    y, A = last(x, return_attention_scores=True)
    y_first, A_first = first(x.transpose(0, 3, 1, 2), return_attention_scores=True)
    assert tuple(A.shape) == (2, 35, 6)
    np.testing.assert_array_equal(to_numpy(A_first), to_numpy(A))
    np.testing.assert_array_equal(to_numpy(y_first).transpose(0, 2, 3, 1), to_numpy(y))


@pytest.mark.parametrize(("name", "layout"), [("flat", LAYOUTS[0]), ("pooled with biases", LAYOUTS[1])])
def test_gamma_zero_is_the_identity_bit_for_bit(name, layout):
    config = LAYERS[name]
    params, x, _ = designed(config, gamma=0)
    model = backend.build(config, params, "float32", layout)
    assert backend.forward(model, x).tobytes() == x.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pooled_window_with_nan_gives_nan_and_other_samples_stay(layout):
    # A NaN in the value alone, which no softmax can spread: only pooling decides.
    params, x, _ = designed(POOLED)
    x[0, 1, 2, 4] = np.nan
    for name in ("query.kernel", "key.kernel"):
        params[name][4] = 0
    x_seen = np.nan_to_num(x)
    model = backend.build(POOLED, params, "float32", layout)
    y = backend.forward(model, x)
    assert np.isnan(y[0]).all()
    np.testing.assert_array_equal(y[1], backend.forward(model, x_seen)[1])


def test_pool_ties_go_to_the_first_winner():
    # Small integers, so that keys and values are exact: many windows hold their largest several times.
    params, x, dy = designed(POOLED, "float64", shape=(2, 5, 7))
    generator = np.random.default_rng(1)
    x = generator.integers(-1, 2, x.shape).astype("float64")
    for name in ("key.kernel", "value.kernel"):
        params[name] = generator.integers(-1, 2, params[name].shape) / 8
    model = backend.build(POOLED, params, "float64", "channels_first")
    eps = np.finfo("float64").eps
    value = (x @ params["value.kernel"])[:, :4, :6].reshape(2, 2, 2, 3, 2, 5)
    tied = (value == value.max((2, 4), keepdims=True)).sum((2, 4)) > 1
    assert tied.mean() > 0.2
    assert_gradients(backend.vjp(model, x, dy), spec.vjp(POOLED, params, x, dy), eps, [], None)
    assert_gradients(backend.r1(model, x, dy)[1], spec.r1(POOLED, params, x, dy)[1], eps, [], None)


def test_keras_multi_head_attention_reproduces_the_flat_layer():
    """One head without its scale, which sqrt(key_dim) in the query takes back."""
    config = SelfAttentionConfig(24)
    params, x, _ = designed(config, shape=(2, 5, 7))
    theirs = keras.layers.MultiHeadAttention(num_heads=1, key_dim=3, value_dim=24, flash_attention=False)
    rows = x.reshape(2, 35, 24)
    theirs.build(rows.shape, rows.shape)
    scale = np.sqrt(np.float32(3))
    theirs.set_weights(
        [
            (params["query.kernel"] * scale)[:, None],
            (params["query.bias"] * scale)[None],
            params["key.kernel"][:, None],
            params["key.bias"][None],
            params["value.kernel"][:, None],
            params["value.bias"][None],
            np.eye(24, dtype="float32")[None],
            np.zeros(24, "float32"),
        ]
    )
    attended, A = theirs(rows, rows, return_attention_scores=True)
    want = params["gamma"] * to_numpy(attended).reshape(x.shape) + x
    layer = from_canonical(config, params, data_format="channels_last")
    y, ours = layer(x, return_attention_scores=True)
    eps = np.finfo("float32").eps
    assert error(to_numpy(y), np.float64(want), eps) <= 2 * OUTPUT
    assert error(to_numpy(ours), np.float64(to_numpy(A)[:, 0]), eps) <= 2 * OUTPUT


def published_twin(params, x):
    """The published TensorFlow f/g/h layer, f = query and g = key, less its defects other than the order of axes.

    NHWC features are reshaped to (B, C', N) without a transpose; the map is transposed before use and returned so.
    """
    batch, height, width = x.shape[:3]
    f, g, h = (
        (x @ params[f"{name}.kernel"] + params[f"{name}.bias"]).reshape(batch, -1, height * width)
        for name in ("query", "key", "value")
    )
    scores = f.swapaxes(1, 2) @ g
    A = np.exp(scores - scores.max(-1, keepdims=True))
    A = (A / A.sum(-1, keepdims=True)).swapaxes(1, 2)
    return params["gamma"] * (h @ A).reshape(x.shape) + x, A


def mended_twin(params, x):
    """The same with the transpose that it lacks, so that features are (B, C', N) indeed."""
    batch, height, width = x.shape[:3]
    f, g, h = (
        (x @ params[f"{name}.kernel"] + params[f"{name}.bias"])
        .reshape(batch, height * width, -1)
        .swapaxes(1, 2)
        for name in ("query", "key", "value")
    )
    scores = f.swapaxes(1, 2) @ g
    A = np.exp(scores - scores.max(-1, keepdims=True))
    A = (A / A.sum(-1, keepdims=True)).swapaxes(1, 2)
    return params["gamma"] * (h @ A).swapaxes(1, 2).reshape(x.shape) + x, A


def test_the_published_tensorflow_twin_is_another_function():
    params, x, _ = designed(FLAT)
    exact, wide_x = map(wide, (params, x))
    want = spec.forward(FLAT, exact, wide_x)
    eps = np.finfo("float32").eps
    layer = from_canonical(FLAT, params, data_format="channels_last")
    y, A = layer(x, return_attention_scores=True)
    assert error(to_numpy(y), want, eps) <= OUTPUT
    broken, _ = published_twin(exact, wide_x)
    assert error(broken, want, eps) > 1e5
    # With the transpose it is ours, but for its map, which has the attended positions as rows.
    mended, columns = mended_twin(exact, wide_x)
    assert error(mended, want, eps) < 1
    assert error(to_numpy(A), columns.swapaxes(1, 2), eps) <= OUTPUT
    assert np.abs(to_numpy(A).sum(-1) - 1).max() < OUTPUT * eps
    assert np.abs(columns.sum(-1) - 1).max() > 0.1


@pytest.mark.parametrize(
    ("policy", "layout"),
    [
        ("mixed_bfloat16", LAYOUTS[0]),
        ("mixed_float16", LAYOUTS[1]),
        ("bfloat16", LAYOUTS[1]),
        ("float16", LAYOUTS[0]),
    ],
)
def test_sixteen_bits(policy, layout):
    compute = policy.removeprefix("mixed_")
    params, x, _ = designed(POOLED)
    layer = from_canonical(POOLED, params, data_format=layout, dtype=policy)
    assert {variable.dtype for variable in layer.variables} == {
        "float32" if policy.startswith("mixed") else compute
    }
    native = x if layout == "channels_last" else x.transpose(0, 3, 1, 2)
    y, A = layer(native, return_attention_scores=True)
    assert keras.backend.standardize_dtype(y.dtype) == keras.backend.standardize_dtype(A.dtype) == compute
    y = np.float64(to_numpy(y))
    y = y if layout == "channels_last" else y.transpose(0, 2, 3, 1)
    eps = {"bfloat16": 2.0**-7, "float16": 2.0**-10}[compute]
    assert error(y, spec.forward(POOLED, *map(wide, (params, x))), eps) <= 4


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_of_a_bias_is_a_sum_that_does_not_stand_still(dtype, spectral_norm):
    # What is added up in bfloat16, one by one, ends at 256.
    config = dataclasses.replace(LAYERS["out projection"], spectral_norm=spectral_norm)
    params, x, dy = designed(config, shape=(256, 4, 4), gamma=1.0)
    if spectral_norm:
        params = init_params(config, seed=0) | params
    gradients = backend.vjp(backend.build(config, params, dtype, "channels_last"), x, np.ones_like(dy))
    np.testing.assert_array_equal(np.float64(gradients["out.bias"]), 256 * 16)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_residual_is_rounded_once(policy):
    # Attention over equal values is that value: z = 1 everywhere, y = gamma·1 + x, with gamma no 16-bit number.
    compute = policy.removeprefix("mixed_")
    config = SelfAttentionConfig(8)
    params = {name: np.zeros(row.shape, "float32") for name, row in parameter_table(config).items()}
    params |= {"value.bias": np.ones(8, "float32"), "gamma": np.array([0.0101], "float32")}
    x = np.linspace(-2, 2, 2 * 3 * 8, dtype="float32").reshape(1, 2, 3, 8)
    layer = from_canonical(config, params, dtype=policy, data_format="channels_last")
    y = np.float32(to_numpy(layer(x)))
    rounded = np.float32(to_numpy(keras.ops.cast(x, compute)))
    want = np.float32(to_numpy(keras.ops.cast(np.float32(0.0101) + rounded, compute)))
    np.testing.assert_array_equal(y, want)


def core_message(error, config, *arguments, **keywords):
    with pytest.raises(error) as raised:
        config.check_input(*arguments, layer="SelfAttention2D", **keywords)
    return "^" + re.escape(str(raised.value)) + "$"


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("again", [False, True], ids=["first call", "later call"])
def test_input_that_does_not_fit_is_refused(layout, symbolic, again):
    axes = "BHWC" if layout == "channels_last" else "BCHW"

    def native(*shape, dtype="float32"):
        sizes = dict(zip("BHWC", shape[-4:], strict=False))
        shape = tuple(sizes[axis] for axis in axes) if len(shape) == 4 else shape
        return (keras.KerasTensor(shape, dtype) if symbolic else np.ones(shape, dtype)), shape

    def layer(config=POOLED):
        if again:
            return SelfAttention2D.from_spec(config, data_format=layout)
        options = config.to_dict()
        del options["channels"]
        return SelfAttention2D(**options, data_format=layout)

    for rank in (2, 3, 5):
        x, shape = native(*range(11, 11 + rank))
        described = f"{', '.join(axes)}".replace("C", "11" if again else "C")
        message = (
            f"^SelfAttention2D: got input of shape {re.escape(str(shape))}; "
            f"expected \\({described}\\): its rank is {rank}.$"
        )
        with pytest.raises(ValueError, match=message):
            layer()(x)
    x, shape = native(2, 5, 7, 10)
    if again:
        with pytest.raises(ValueError, match=core_message(ValueError, POOLED, shape, layout=axes)):
            layer()(x)
    else:
        with pytest.raises(ValueError, match="value_channels=11 differs from channels=10"):
            layer(FLAT)(x)
    x, shape = native(2, 1, 7, 11)
    with pytest.raises(ValueError, match=core_message(ValueError, POOLED, shape, layout=axes)):
        layer()(x)
    for dtype in ("int32", "uint8", "bool"):
        x, shape = native(2, 5, 7, 11, dtype=dtype)
        message = core_message(TypeError, POOLED, shape, layout=axes, dtype=dtype, floating=False)
        with pytest.raises(TypeError, match=message):
            layer()(x)


def test_nothing_is_computed_before_an_input_is_refused(monkeypatch):
    layer = SelfAttention2D.from_spec(POOLED, data_format="channels_last")

    def bomb(*arguments, **keywords):
        raise AssertionError("computed")

    monkeypatch.setattr(Projection, "call", bomb)
    with pytest.raises(AssertionError, match="computed"):
        layer(np.ones((2, 5, 7, 11), "float32"))
    for x in (
        np.ones((2, 1, 7, 11), "float32"),
        np.ones((2, 5, 7, 11), "int32"),
        np.ones((2, 5, 7, 9), "float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=r"^SelfAttention2D: got input of"):
            layer(x)


def test_unknown_channels_are_refused():
    with pytest.raises(
        ValueError, match=r"got input of shape \(None, 5, 7, None\); expected \(B, H, W, C\): its ch"
    ):
        SelfAttention2D(data_format="channels_last")(keras.Input((5, 7, None)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_channels": 0}, "SelfAttentionConfig: qk_channels=0 must be a positive integer"),
        ({"value_channels": -1}, "SelfAttentionConfig: value_channels=-1 must be a positive integer"),
        ({"kv_pool": 0}, "SelfAttentionConfig: kv_pool=0 must be a positive integer"),
        ({"use_bias": 1}, "SelfAttentionConfig: use_bias=1 must be True or False"),
        ({"block_size": 0}, "block_size=0 must be a positive integer"),
        (
            {"data_format": "NHWC"},
            "SelfAttention2D: data_format='NHWC' must be 'channels_last' or 'channels_first'",
        ),
        ({"spectral": True}, "spectral"),
    ],
)
def test_options_that_make_no_layer_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention2D(**options)


def test_options_that_make_no_layer_for_these_channels_are_refused_when_built():
    with pytest.raises(ValueError, match=r"channels=4 is below 8, so .*: pass qk_channels"):
        SelfAttention2D().build((None, 4, 4, 4))
    with pytest.raises(
        ValueError, match=r"value_channels=5 differs from channels=16.*: pass out_projection=True"
    ):
        SelfAttention2D(value_channels=5, data_format="channels_last").build((None, 4, 4, 16))


def test_config_exists_once_the_layer_is_built():
    layer = SelfAttention2D(3, data_format="channels_last")
    with pytest.raises(ValueError, match="config exists once the layer is built"):
        layer.config  # noqa: B018 - reading it is the test
    layer(np.zeros((1, 2, 3, 11), "float32"))
    assert layer.config == FLAT


@pytest.mark.skipif(FRAMEWORK != "tensorflow", reason="on TensorFlow alone")
@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "XLA"])
@pytest.mark.parametrize(
    ("name", "layout"), [("out projection", LAYOUTS[1]), ("pooled with biases", LAYOUTS[0])]
)
def test_penalty_inside_a_function_of_unknown_sizes(name, compiled, layout):
    import tensorflow as tf

    config = LAYERS[name]
    params, x, w = designed(config)
    model = backend.build(config, params, "float32", layout).layer
    shape = [None, None, None, 11] if layout == "channels_last" else [None, 11, None, None]
    variables = [model.gamma.value, model.value.kernel.value]

    @tf.function(jit_compile=compiled, input_signature=[tf.TensorSpec(shape)] * 2)
    def penalty(x, w):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = model(x)
            value = tf.reduce_sum(tf.square(inner.gradient(y, x, w)))
        return value, *outer.gradient(value, [x, *variables])

    native = (lambda a: a) if layout == "channels_last" else (lambda a: a.transpose(0, 3, 1, 2).copy())
    value, dx, gamma, kernel = penalty(native(x), native(w))
    want_value, want = spec.r1(config, *map(wide, (params, x, w)))
    eps = np.finfo("float32").eps
    dx = dx.numpy() if layout == "channels_last" else dx.numpy().transpose(0, 2, 3, 1)
    assert abs(float(value) - want_value) <= GRADIENT * eps * want_value
    assert error(dx, want["x"], eps) <= GRADIENT
    assert error(gamma.numpy(), want["gamma"], eps) <= GRADIENT
    assert error(kernel.numpy()[0, 0], want["value.kernel"], eps) <= GRADIENT


@pytest.mark.skipif(FRAMEWORK != "tensorflow", reason="on TensorFlow alone")
@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "XLA"])
def test_an_empty_batch_whose_size_was_unknown(compiled):
    config = LAYERS["pooled with biases"]
    import tensorflow as tf

    layer = from_canonical(config, designed(config)[0], data_format=LAYOUTS[0])

    @tf.function(jit_compile=compiled, input_signature=[tf.TensorSpec([None, 5, 7, 11])])
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, A = layer(x, return_attention_scores=True)
        return y, A, tape.gradient(y, [x, *(weight.value for weight in layer.trainable_weights)])

    y, A, gradients = run(np.zeros((0, 5, 7, 11), "float32"))
    assert (y.shape, A.shape) == ((0, 5, 7, 11), (0, 35, 6))
    assert gradients[0].shape == (0, 5, 7, 11)
    assert not any(gradient.numpy().any() for gradient in gradients)
    # The same graph, of one sample: nothing is added then.
    x = np.random.default_rng(0).standard_normal((1, 5, 7, 11)).astype("float32")
    np.testing.assert_allclose(run(x)[0], layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(FRAMEWORK != "tensorflow", reason="on TensorFlow alone")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_map_smaller_than_a_window_whose_size_was_unknown(layout):
    import tensorflow as tf

    layer = from_canonical(POOLED, designed(POOLED)[0], data_format=layout)
    shape, native = (
        ([None, None, None, 11], (0, 1, 2, 3))
        if layout == "channels_last"
        else ([None, 11, None, None], (0, 3, 1, 2))
    )
    run = tf.function(layer, input_signature=[tf.TensorSpec(shape)])
    for height, width in ((1, 5), (5, 1)):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"smaller than one 2×2 pooling window"):
            run(np.zeros((2, height, width, 11), "float32").transpose(native))
    assert run(np.zeros((2, 2, 3, 11), "float32").transpose(native)).shape[0] == 2


@pytest.mark.skipif(FRAMEWORK != "jax", reason="on JAX alone")
def test_penalty_under_jit():
    import jax

    params, x, w = designed(POOLED)
    model = backend.build(POOLED, params, "float32", "channels_first").layer

    def native(maps):
        return maps.transpose(0, 3, 1, 2)

    @jax.jit
    def penalty(x):
        dx = jax.grad(lambda x: (native(w) * model(x)).sum())(x)
        return (dx * dx).sum()

    value, dx = jax.value_and_grad(penalty)(native(x))
    want_value, want = spec.r1(POOLED, *map(wide, (params, x, w)))
    eps = np.finfo("float32").eps
    assert abs(float(value) - want_value) <= GRADIENT * eps * want_value
    assert error(np.asarray(dx).transpose(0, 2, 3, 1), want["x"], eps) <= GRADIENT
