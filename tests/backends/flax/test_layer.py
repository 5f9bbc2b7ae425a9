"""The two Flax layers against the specification, and in the idioms of Flax.

float64 is switched on by a context, so that the other tests of the process see JAX as its users do.
"""

import dataclasses
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from jax import export

import selfattn_flax
from selfattn_core import SelfAttentionConfig, init_params, parameter_table, spec
from selfattn_core.conformance.backends import REGISTRY, resolve
from selfattn_core.conformance.verdicts.tolerance import EPS
from selfattn_flax import linen
from selfattn_flax.conformance.backend import linen_backend, nnx_backend
from tests.support import CONFIGS, FLAT, GRADIENT, OUTPUT, POOLED, assert_near, designed, wide


@pytest.fixture(params=CONFIGS, ids=str)
def config(request) -> SelfAttentionConfig:
    return CONFIGS[request.param]


@pytest.fixture(params=["flat", "pooled with biases"])
def typical(request) -> SelfAttentionConfig:
    return CONFIGS[request.param]


@pytest.fixture(params=[nnx_backend, linen_backend], ids=["nnx", "linen"])
def backend(request):
    return request.param


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(True) if request.param == "float64" else nullcontext():
        yield request.param


def assert_gradients_near(got, want, ulps, dtype="float32"):
    assert list(got) == list(want)
    largest = max(np.abs(array).max(initial=1e-300) for array in want.values())
    for name, array in want.items():
        # Gradients of zero (the key bias') and of one sum that cancels (gamma's) have the noise of the others.
        cancels = name == "gamma" or np.abs(array).max(initial=0) < 1e-9 * largest
        assert_near(got[name], array, ulps, dtype, scale=largest if cancels else None)


def built(backend, config, params, **options):
    """A function of x (and of sow_weights) that is the layer with these weights, in its own idiom."""
    if backend is nnx_backend:
        return selfattn_flax.from_canonical(config, params, **options)
    module, variables = linen.from_canonical(config, params, **options)
    return partial(module.apply, variables)


def function(backend, model):
    """The output as a function of the parameters and x."""
    return lambda params, x: backend.kind.apply(model.static, params, model.state, x)[0]


def test_the_registry_finds_both():
    assert resolve(REGISTRY["flax-nnx"].target) is nnx_backend
    assert resolve(REGISTRY["flax-linen"].target) is linen_backend
    assert nnx_backend.name == "flax-nnx"
    assert linen_backend.name == "flax-linen"
    assert set(nnx_backend.versions()) == {"flax", "jax", "jaxlib"}


def assert_is_the_specification(backend, config, dtype, shape=(2, 7, 9)):
    params, x, dy = designed(config, dtype, shape)
    args = config, wide(params), wide(x)
    model = backend.build(config, params, dtype, "channels_last")
    y, A = backend.forward(model, x), backend.attention_map(model, x)
    assert y.dtype == A.dtype == dtype
    assert_near(y, spec.forward(*args), OUTPUT, dtype)
    assert_near(A, spec.attention_map(*args), OUTPUT, dtype)
    got = backend.vjp(model, x, dy)
    assert {array.dtype.name for array in got.values()} == {dtype}
    assert_gradients_near(got, spec.vjp(*args, wide(dy)), GRADIENT, dtype)
    value, got = backend.r1(model, x, dy)
    want_value, want = spec.r1(*args, wide(dy))
    assert abs(value - want_value) <= GRADIENT * EPS[dtype] * want_value
    assert_gradients_near(got, want, GRADIENT, dtype)


def test_values_and_derivatives_are_the_specifications(backend, dtype):
    """Of one layer, in this process; tests/conformance compares every kind of layer and shape."""
    assert_is_the_specification(backend, CONFIGS["pooled with biases"], dtype)


def test_a_single_column_of_pooled_keys(backend):
    assert_is_the_specification(backend, CONFIGS["pooled by 3"], "float32", (1, 8, 3))


@pytest.mark.parametrize("kv_pool", [2, 3])
def test_equal_values_in_a_pooling_window_have_the_specifications_winner(backend, kv_pool):
    config = SelfAttentionConfig(2, 1, kv_pool=kv_pool)
    params, x, w = designed(config)
    # Multiples of small powers of two, so that projections of equal values are equal, and logits of a few units.
    params = {
        name: ((np.abs(np.rint(2 * value)) + 1) / 8).astype("float32") for name, value in params.items()
    }
    x = np.rint(x / 2)
    assert sum(len(np.unique(window)) < window.size for window in x[:, :2, :2].reshape(2, -1)) == 2
    model = backend.build(config, params, "float32", "channels_last")
    args = config, wide(params), wide(x), wide(w)
    assert_gradients_near(backend.vjp(model, x, w), spec.vjp(*args), GRADIENT)
    assert_gradients_near(backend.r1(model, x, w)[1], spec.r1(*args)[1], GRADIENT)


@pytest.mark.parametrize("leading", [(), (2, 3), (2, 0, 3)])
def test_any_number_of_leading_axes(backend, typical, leading):
    params, flat, _ = designed(typical, shape=(math.prod(leading), 7, 9))
    x = flat.reshape(*leading, 7, 9, typical.channels)
    layer = built(backend, typical, params)
    want = spec.forward(typical, wide(params), wide(flat)).reshape(x.shape)
    assert_near(layer(x), want, OUTPUT)
    model = backend.build(typical, params, "float32", "channels_last")
    A = backend.attention_map(model, x)
    height, width = typical.key_grid(7, 9)
    assert A.shape == (*leading, 63, height * width)


def test_a_pooled_window_with_nan_gives_nan_and_other_samples_stay(backend):
    params, x, _ = designed(POOLED)
    x[0, 1, 2, 4] = np.nan
    y = np.asarray(built(backend, POOLED, params)(x))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


@pytest.mark.parametrize("module", [selfattn_flax.nnx, linen], ids=["nnx", "linen"])
def test_the_block_size_reaches_the_core(monkeypatch, module):
    seen = []

    def recording(attend):
        def wrapped(*operands, block_size):
            seen.append(block_size)
            return attend(*operands, block_size=block_size)

        return wrapped

    for name in ("attend", "attend_with_map"):
        monkeypatch.setattr(module.layer, name, recording(getattr(module.layer, name)))
    backend = linen_backend if module is linen else nnx_backend
    layer = built(backend, FLAT, designed(FLAT)[0], block_size=5)
    layer(jnp.ones((2, 3, 11)))
    if module is linen:
        layer(jnp.ones((2, 3, 11)), sow_weights=True)
    else:
        nnx.capture(layer, nnx.Intermediate)(jnp.ones((2, 3, 11)), sow_weights=True)
    assert seen == [5, 5]


@pytest.mark.parametrize("block_size", [1, 5, 63, 1000])
def test_the_block_size_changes_nothing(backend, block_size):
    params, x, _ = designed(FLAT)
    want = spec.forward(FLAT, wide(params), wide(x))
    assert_near(built(backend, FLAT, params, block_size=block_size)(x), want, OUTPUT)


@pytest.mark.parametrize(
    ("given", "param_dtype", "dtype", "result"),
    [
        ("float32", "float32", None, "float32"),
        ("bfloat16", "float32", None, "float32"),
        ("bfloat16", "bfloat16", None, "bfloat16"),
        ("float16", "float16", None, "float16"),
        ("float16", "bfloat16", None, "float32"),
        ("float32", "bfloat16", None, "float32"),
        ("float32", "float32", jnp.bfloat16, "bfloat16"),
        ("bfloat16", "float32", "float16", "float16"),
        ("bfloat16", "bfloat16", jnp.float32, "float32"),
    ],
)
def test_the_dtype_is_promoted_unless_given(backend, given, param_dtype, dtype, result):
    config = CONFIGS["pooled with biases"]
    params, x, _ = designed(config)
    layer = built(backend, config, params, dtype=dtype, param_dtype=param_dtype)
    x = jnp.asarray(x, given)
    y = layer(x)
    assert y.dtype == result
    params = {name: np.asarray(jnp.asarray(value, param_dtype), np.float64) for name, value in params.items()}
    want = spec.forward(config, params, np.asarray(x, np.float64))
    assert_near(y, want, OUTPUT, result)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_round_where_the_specification_does(backend, dtype):
    config = dataclasses.replace(FLAT, use_bias=False)
    params, x, _ = designed(config, gamma=0.3)
    sixteen = {name: np.asarray(jnp.asarray(value, dtype)) for name, value in params.items()}
    x = np.asarray(jnp.asarray(x, dtype))
    y = np.asarray(built(backend, config, sixteen)(x))
    want = spec.forward(config, sixteen, x)
    assert y.dtype == want.dtype
    # An output differs only where a rounding of q, k, v, A or o fell the other way.
    assert (y == want).mean() > 0.9


def test_the_residual_is_computed_in_float32_and_rounded_once(backend):
    """With one position o is x rounded to bfloat16, and y shows how x and gamma enter the sum."""
    config = SelfAttentionConfig(1, 1, use_bias=False)
    params = {f"{name}.kernel": np.ones((1, 1), np.float32) for name in ("query", "key", "value")}
    params["gamma"] = np.array([1 / 3], np.float32)
    x = np.random.default_rng(0).standard_normal((200, 1, 1, 1)).astype(np.float32)
    rounded = x.astype(jnp.bfloat16).astype(np.float32)
    for given in (x, rounded):
        y = built(backend, config, params, dtype=jnp.bfloat16)(jnp.asarray(given))
        want = (params["gamma"] * rounded + given).astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(y), want)


def test_logits_beyond_the_range_of_float16_are_finite(backend):
    params, x, _ = designed(FLAT, "float16")
    params |= {name: params[name] * np.float16(200) for name in ("query.kernel", "key.kernel")}
    y = built(backend, FLAT, params)(x)
    assert y.dtype == jnp.float16
    assert jnp.isfinite(y).all()


def test_parameters_come_in_param_dtype():
    layer = selfattn_flax.SelfAttention2D(16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    variables = linen.SelfAttention2D(param_dtype=jnp.bfloat16).init(jax.random.key(0), jnp.zeros((2, 3, 16)))
    for tree in (nnx.state(layer), variables):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"bfloat16"}


def test_projections_of_several_dtypes_are_promoted():
    x = jnp.ones((2, 3, 16), jnp.bfloat16)
    layer = selfattn_flax.SelfAttention2D(16, rngs=nnx.Rngs(0))
    layer.query = nnx.Conv(16, 2, (1, 1), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    assert layer(x).dtype == jnp.float32
    module = linen.SelfAttention2D()
    params = module.init(jax.random.key(0), x)["params"]
    params["query"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["query"])
    assert module.apply({"params": params}, x).dtype == jnp.float32


OPTIONS = {
    "qk_channels=0 must be a positive integer": {"qk_channels": 0},
    "value_channels=-4 must be a positive integer": {"value_channels": -4},
    "kv_pool=0 must be a positive integer": {"kv_pool": 0},
    "use_bias=1 must be True or False": {"use_bias": 1},
    "out_projection='no' must be True or False": {"out_projection": "no"},
    r"block_size=0 must be a positive integer \(query rows a block\)": {"block_size": 0},
}


@pytest.mark.parametrize("message", OPTIONS)
def test_options_are_checked_at_construction(message):
    with pytest.raises(ValueError, match=message):
        selfattn_flax.SelfAttention2D(16, **OPTIONS[message], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        linen.SelfAttention2D(**OPTIONS[message])


CHANNELS = {
    "channels=4 is below 8, so the default qk_channels = channels // 8 would be 0: pass qk_channels": (4, {}),
    "channels=0 must be a positive integer": (0, {}),
    "value_channels=8 differs from channels=16, but without an out projection": (16, {"value_channels": 8}),
}


@pytest.mark.parametrize("message", CHANNELS)
def test_channels_are_checked_as_soon_as_they_are_known(message):
    channels, options = CHANNELS[message]
    with pytest.raises(ValueError, match=message):
        selfattn_flax.SelfAttention2D(channels, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        linen.SelfAttention2D(**options).init(jax.random.key(0), jnp.zeros((2, 5, 7, channels)))


INPUTS = [
    (
        (5, 11),
        "float32",
        "SelfAttention2D: got input of shape (5, 11); expected (…, H, W, 11): its rank is 2.",
    ),
    ((), "float32", "SelfAttention2D: got input of shape (); expected (…, H, W, 11): its rank is 0."),
    (
        (2, 5, 7, 10),
        "float32",
        "SelfAttention2D: got input of shape (2, 5, 7, 10); expected (…, H, W, 11): its 10 channels should be 11.",
    ),
    (
        (2, 1, 7, 11),
        "float32",
        "SelfAttention2D: got input of shape (2, 1, 7, 11); expected (…, H, W, 11): its map of 1×7 positions is smaller than one 2×2 pooling window (kv_pool=2).",
    ),
    (
        (2, 5, 7, 11),
        "int32",
        "SelfAttention2D: got input of dtype int32; expected floating point: convert it first, for example to float32.",
    ),
    (
        (2, 5, 7, 11),
        "bool",
        "SelfAttention2D: got input of dtype bool; expected floating point: convert it first, for example to float32.",
    ),
    (
        (2, 5, 7, 11),
        "complex64",
        "SelfAttention2D: got input of dtype complex64; expected floating point: convert it first, for example to float32.",
    ),
]


@pytest.mark.parametrize(("shape", "dtype", "message"), INPUTS)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_inputs_that_do_not_fit_are_refused(backend, transform, shape, dtype, message):
    layer = built(backend, POOLED, designed(POOLED)[0])
    with pytest.raises((TypeError, ValueError)) as error:
        transform(layer)(jnp.zeros(shape, dtype))
    assert str(error.value) == message
    assert type(error.value) is (ValueError if dtype == "float32" else TypeError)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((5, 11), "float32", "got input of shape (5, 11); expected (…, H, W, C): its rank is 2."),
        ((2, 0, 7, 16), "float32", "its map of 0×7 positions is smaller than one position."),
        ((2, 5, 7, 16), "int32", "got input of dtype int32; expected floating point"),
    ],
)
def test_linen_refuses_inputs_at_initialisation_too(shape, dtype, message):
    with pytest.raises((TypeError, ValueError)) as error:
        linen.SelfAttention2D().init(jax.random.key(0), jnp.zeros(shape, dtype))
    assert message in str(error.value)


def test_refusals_come_before_any_computation(backend):
    """A projection that is called fails the test."""
    if backend is nnx_backend:
        layer = selfattn_flax.SelfAttention2D(16, rngs=nnx.Rngs(0))
        layer.query = layer.key = layer.value = None
        call = layer
    else:
        module = linen.SelfAttention2D(kernel_init=None)
        call = partial(module.init, jax.random.key(0))
    with pytest.raises(TypeError, match="dtype int32"):
        call(jnp.zeros((2, 5, 7, 16), "int32"))


def test_the_config_of_the_nnx_layer(config):
    layer = selfattn_flax.SelfAttention2D.from_config(config, rngs=nnx.Rngs(0))
    assert layer.config == config


def test_the_config_of_the_linen_layer_exists_once_channels_are_known(config):
    module = linen.SelfAttention2D.from_config(config, block_size=7)
    with pytest.raises(
        ValueError, match="number of channels is unknown until the module is bound to initialised variables"
    ):
        _ = module.config
    with pytest.raises(ValueError, match="number of channels is unknown"):
        _ = module.bind({}).config
    variables = module.init(jax.random.key(0), jnp.zeros((7, 9, config.channels)))
    assert module.bind(variables).config == config


def test_a_parent_can_read_the_config_of_a_linen_child_it_has_called():
    seen = []

    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x):
            child = linen.SelfAttention2D(name="attention")
            y = child(x)
            seen.append(child.config)
            return y

    Parent().init(jax.random.key(0), jnp.zeros((2, 3, 16)))
    assert seen == [SelfAttentionConfig(16)]


def test_options_after_the_widths_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        selfattn_flax.SelfAttention2D(16, 2, 16, True)
    with pytest.raises(TypeError, match="positional"):
        linen.SelfAttention2D(2, 16, True)


def initialised(flavour, channels, **options):
    if flavour == "nnx":
        layer = selfattn_flax.SelfAttention2D(channels, **options, rngs=nnx.Rngs(3))
        return selfattn_flax.to_canonical(layer)
    module = linen.SelfAttention2D(**options)
    return linen.to_canonical(module, module.init(jax.random.key(3), jnp.zeros((1, 1, channels))))


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_initialisation_is_glorot_uniform_with_zero_biases_and_gamma(flavour):
    config = SelfAttentionConfig(512, None, 256, out_projection=True)
    params = initialised(flavour, 512, value_channels=256, out_projection=True)
    want = parameter_table(config)
    assert {name: value.shape for name, value in params.items()} == {
        name: row.shape for name, row in want.items()
    }
    for name, row in want.items():
        if row.initial == "zeros":
            assert not params[name].any()
            continue
        limit = np.sqrt(6 / sum(row.shape))
        # One-sample Kolmogorov-Smirnov distance to U(-limit, limit), 0.1 % level.
        ordered = np.sort(params[name].ravel())
        distance = np.abs((ordered + limit) / (2 * limit) - np.linspace(0, 1, ordered.size)).max()
        assert distance < 1.95 / np.sqrt(ordered.size)
    kernels = [params[f"{name}.kernel"].ravel()[:1000] for name in ("query", "key", "value", "out")]
    assert np.abs(np.corrcoef(kernels) - np.eye(4)).max() < 0.15


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_initialisers_are_the_users(flavour):
    constant = jax.nn.initializers.constant
    params = initialised(
        flavour, 16, kernel_init=constant(2.0), bias_init=constant(3.0), gamma_init=constant(4.0)
    )
    for name, value in params.items():
        assert (value == {"kernel": 2, "bias": 3, "gamma": 4}[name.rpartition(".")[2]]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_new_layer_is_the_identity_bit_for_bit(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 16), dtype)
    layer = selfattn_flax.SelfAttention2D(16, param_dtype=dtype, rngs=nnx.Rngs(0))
    y, _ = linen.SelfAttention2D(param_dtype=dtype).init_with_output(jax.random.key(0), x)
    for out in (layer(x), y):
        assert out.dtype == x.dtype
        assert np.asarray(out).tobytes() == np.asarray(x).tobytes()


def test_nnx_sows_the_map_on_request_only():
    layer = selfattn_flax.SelfAttention2D(16, rngs=nnx.Rngs(0))
    before = nnx.graphdef(layer)
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 16))
    y, sown = nnx.capture(layer, nnx.Intermediate)(x, sow_weights=True)
    (A,) = sown["attention_weights"]
    assert A.shape == (2, 35, 35)
    np.testing.assert_allclose(A.sum(-1), 1, rtol=1e-5)
    assert (y == layer(x)).all()
    _, nothing = nnx.capture(layer, nnx.Intermediate)(x)
    assert "attention_weights" not in nothing
    assert nnx.graphdef(layer) == before


def test_linen_sows_the_map_on_request_only():
    module = linen.SelfAttention2D()
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 16))
    variables = module.init(jax.random.key(0), x, sow_weights=True)
    assert list(variables) == ["params"]
    y, sown = module.apply(variables, x, sow_weights=True, mutable=["intermediates"])
    (A,) = sown["intermediates"]["attention_weights"]
    assert A.shape == (2, 35, 35)
    np.testing.assert_allclose(A.sum(-1), 1, rtol=1e-5)
    assert (y == module.apply(variables, x)).all()
    assert module.apply(variables, x, mutable=["intermediates"])[1] == {}
    assert (module.apply(variables, x, sow_weights=True) == y).all()


def test_the_two_have_one_tree(config):
    params, x, _ = designed(config)
    module, variables = linen.from_canonical(config, params)
    layer = selfattn_flax.SelfAttention2D.from_config(config, rngs=nnx.Rngs(0))
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(layer, nnx.Param))) == jax.tree.structure(
        dict(variables["params"])
    )
    nnx.update(layer, variables["params"])
    assert (layer(x) == module.apply(variables, x)).all()
    back = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert (module.apply({"params": back}, x) == layer(x)).all()


def test_a_call_changes_no_state():
    layer = selfattn_flax.SelfAttention2D(16, rngs=nnx.Rngs(0))
    graph, before = nnx.split(layer)
    layer(jnp.ones((5, 7, 16)))
    assert nnx.graphdef(layer) == graph
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), nnx.state(layer), before)))
    variables = [leaf for _, leaf in nnx.iter_graph(layer) if isinstance(leaf, nnx.Variable)]
    assert len({id(variable) for variable in variables}) == len(variables) == 7


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax", "nnx"])
def test_jit_at_several_sizes(backend, jit):
    params, _, _ = designed(FLAT)
    layer = built(backend, FLAT, params)
    compiled = jit(layer) if backend is linen_backend else jit(lambda m, x: m(x))
    for shape in [(2, 7, 9), (2, 9, 7), (7, 9), (0, 4, 4), (3, 1, 1)]:
        x = np.random.default_rng(0).standard_normal((*shape, FLAT.channels)).astype("float32")
        y = compiled(x) if backend is linen_backend else compiled(layer, x)
        batch = x.reshape(-1, *x.shape[-3:]).astype(np.float64)
        want = spec.forward(FLAT, wide(params), batch).reshape(x.shape)
        assert_near(y, want, OUTPUT)


def test_vmap_over_the_batch_and_over_layers(backend, typical):
    params, x, _ = designed(typical)
    model = backend.build(typical, params, "float32", "channels_last")
    other = backend.build(typical, designed(typical, seed=1)[0], "float32", "channels_last")
    want = spec.forward(typical, wide(params), wide(x))
    apply = function(backend, model)
    mapped = jax.vmap(apply, (None, 0))(model.tree, x)
    assert_near(mapped, want, OUTPUT)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), model.tree, other.tree)
    both = jax.vmap(apply, (0, None))(stacked, x)
    assert_near(both[0], want, OUTPUT)
    assert_near(both[1], backend.forward(other, x), OUTPUT)


def test_derivatives_under_jit_and_forward_over_reverse(backend, typical):
    params, x, w = designed(typical, shape=(1, 4, 6))
    model = backend.build(typical, params, "float32", "channels_last")

    def penalty(x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(w * function(backend, model)(model.tree, x)))(x) ** 2)

    want = spec.r1(typical, wide(params), wide(x), wide(w))[1]["x"]
    assert_near(np.asarray(jax.jit(jax.grad(penalty))(x)), want, GRADIENT)
    direction = designed(typical, seed=2, shape=(1, 4, 6))[1]
    slope = jax.jit(lambda x, direction: jax.jvp(penalty, (x,), (direction,))[1])(x, direction)
    assert abs(slope - (want * direction).sum()) < GRADIENT * EPS["float32"] * np.abs(want * direction).sum()


def test_nnx_transforms():
    params, x, _ = designed(FLAT)
    layer = selfattn_flax.from_canonical(FLAT, params)
    y = layer(x)
    gradients = nnx.grad(lambda m, x: m(x).sum())(layer, x)
    again = nnx.grad(nnx.remat(lambda m, x: m(x).sum()))(layer, x)
    assert jax.tree.structure(gradients) == jax.tree.structure(nnx.state(layer, nnx.Param))
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(gradients), strict=True):
        assert_near(got, np.asarray(want), GRADIENT, scale=np.abs(gradients.gamma).max())
    plain = jax.grad(lambda state: nnx.merge(nnx.graphdef(layer), state)(x).sum())(nnx.state(layer))
    assert_near(plain["gamma"][...], np.asarray(gradients["gamma"][...]), GRADIENT)
    abstract = nnx.eval_shape(lambda: selfattn_flax.SelfAttention2D(11, 3, rngs=nnx.Rngs(0)))
    assert nnx.eval_shape(lambda m, x: m(x), abstract, x).shape == y.shape
    nnx.update(abstract, nnx.state(layer))
    assert (abstract(x) == y).all()


def test_nnx_scan_over_layers():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return selfattn_flax.SelfAttention2D(16, gamma_init=jax.nn.initializers.ones, rngs=rngs)

    layers = stack(nnx.Rngs(0).split(3))
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 16))
    scanned = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)
    graph, state = nnx.split(layers)
    looped = x
    for i in range(3):
        looped = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(looped)
    np.testing.assert_allclose(scanned, looped, rtol=1e-5, atol=1e-5)


def test_linen_remat_and_scan():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 16))
    module = linen.SelfAttention2D(gamma_init=jax.nn.initializers.ones)
    variables = module.init(jax.random.key(0), x)
    remat = nn.remat(linen.SelfAttention2D)(gamma_init=jax.nn.initializers.ones)

    def loss(module, variables):
        return module.apply(variables, x).sum()

    want = jax.grad(partial(loss, module))(variables)
    for got, array in zip(
        jax.tree.leaves(jax.grad(partial(loss, remat))(variables)), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(got, array, rtol=1e-3, atol=1e-3)

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.SelfAttention2D(gamma_init=jax.nn.initializers.ones, name="attention")(x), None

    scanned = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    stacked = scanned.init(jax.random.key(0), x)
    y, _ = scanned.apply(stacked, x)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked["params"]["attention"])
        x = module.apply({"params": one}, x)
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_linen_vmap_with_a_layer_for_each_element():
    mapped = nn.vmap(
        linen.SelfAttention2D, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0
    )()
    x = jnp.ones((4, 3, 5, 16))
    variables = mapped.init(jax.random.key(0), x)
    assert variables["params"]["query"]["kernel"].shape == (4, 1, 1, 16, 2)
    assert mapped.apply(variables, x).shape == x.shape


def test_partitioning_metadata():
    init = nn.with_partitioning(jax.nn.initializers.glorot_uniform(), (None, None, "in", "out"))
    module = linen.SelfAttention2D(kernel_init=init)
    x = jax.random.normal(jax.random.key(0), (3, 5, 16))
    boxed = module.init(jax.random.key(0), x)
    assert isinstance(boxed["params"]["query"]["kernel"], nn.Partitioned)
    plain = linen.SelfAttention2D().init(jax.random.key(0), x)
    assert (module.apply(boxed, x) == linen.SelfAttention2D().apply(plain, x)).all()
    assert module.bind(boxed).config == SelfAttentionConfig(16)
    for name, array in linen.to_canonical(module, boxed).items():
        assert (array == linen.to_canonical(module, plain)[name]).all()


def test_bridges_both_ways():
    params, x, _ = designed(FLAT)
    module, variables = linen.from_canonical(FLAT, params)
    y = module.apply(variables, x)
    to_nnx = bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x)
    nnx.update(to_nnx, variables["params"])
    assert (to_nnx(x) == y).all()
    to_linen = bridge.ToLinen(selfattn_flax.SelfAttention2D, args=(11, 3))
    initial = to_linen.init(jax.random.key(0), x)
    shapes = jax.tree.map(jnp.shape, initial["params"])
    assert shapes == jax.tree.map(jnp.shape, variables["params"])
    assert (to_linen.apply(initial | {"params": variables["params"]}, x) == y).all()


def test_export_with_a_symbolic_batch(backend, typical):
    params, x, _ = designed(typical)
    layer = built(backend, typical, params)
    (batch,) = export.symbolic_shape("b")
    spec_of_x = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = export.export(jax.jit(layer))(spec_of_x)
    for size in (1, 2):
        y = np.asarray(exported.call(x[:size]))
        assert_near(y, spec.forward(typical, wide(params), wide(x[:size])), OUTPUT)


@pytest.mark.parametrize(("precision", "projections"), [(None, 0), ("default", 0), ("highest", 4)])
def test_precision_is_that_of_the_projections_and_attention_has_the_highest(backend, precision, projections):
    config = SelfAttentionConfig(11, 3, 5, out_projection=True)
    params, x, _ = designed(config)
    layer = built(backend, config, params, precision=precision)
    with jax.default_matmul_precision("bfloat16"):
        jaxpr = str(jax.make_jaxpr(layer)(x))
    assert jaxpr.count("dot_general[") == 6
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == projections + 2


def test_importing_and_using_changes_no_setting_of_jax():
    script = (
        "import jax, numpy as np\n"
        "before = dict(jax.config.values)\n"
        "import selfattn_flax, selfattn_flax.linen, selfattn_core\n"
        "config = selfattn_core.SelfAttentionConfig(16)\n"
        "layer = selfattn_flax.from_canonical(config, selfattn_core.init_params(config, 0))\n"
        "layer(np.ones((3, 4, 16), np.float32))\n"
        "assert dict(jax.config.values) == before\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_without_jax_the_message_says_what_to_install():
    script = (
        "import sys, importlib.util as util\n"
        "real = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'flax' else real(name, package)\n"
        "try:\n"
        "    import selfattn_flax\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == (
        "selfattn_flax needs flax, which is not installed: pip install 'selfattn[flax]'"
    )


def test_float64_where_the_environment_asks_for_it():
    """As the kit's own process does."""
    script = (
        "import numpy as np\n"
        "from selfattn_core import SelfAttentionConfig, init_params\n"
        "from selfattn_flax.conformance.backend import linen_backend, nnx_backend\n"
        "config = SelfAttentionConfig.pooled(16)\n"
        "params = init_params(config, 0, np.float64)\n"
        "for backend in (nnx_backend, linen_backend):\n"
        "    model = backend.build(config, params, 'float64', 'channels_last')\n"
        "    assert backend.forward(model, np.ones((1, 2, 3, 16))).dtype == np.float64\n"
        "    model = backend.build(config, init_params(config, 0), 'float32', 'channels_last')\n"
        "    assert backend.forward(model, np.ones((1, 2, 3, 16), np.float32)).dtype == np.float32\n"
    )
    environment = {**os.environ, "JAX_ENABLE_X64": "1"}
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=environment)


def test_float64_parameters_are_refused_where_jax_has_none(backend):
    config = SelfAttentionConfig(16)
    with pytest.raises(
        ValueError, match=r"would silently make them float32: pass param_dtype.*JAX_ENABLE_X64=1"
    ):
        built(backend, config, init_params(config, 0, np.float64))
    layer = built(backend, config, init_params(config, 0, np.float64), param_dtype=jnp.float32)
    assert layer(jnp.ones((2, 3, 16))).dtype == jnp.float32
