"""The specification against a hand-computed example, finite differences and the function's exact identities."""

import dataclasses

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, init_params, parameter_table, spec
from selfattn_core.params import state_table
from tests.support import CONFIGS, FLAT, POOLED, assert_near, designed

LAYERS = CONFIGS | {
    "spectral norm": dataclasses.replace(FLAT, spectral_norm=True),
    "spectral norm, pooled": dataclasses.replace(POOLED, use_bias=True, spectral_norm=True),
}


@pytest.fixture(params=LAYERS, ids=str)
def config(request) -> SelfAttentionConfig:
    return LAYERS[request.param]


def split(config, params):
    """The parameters, and the state, which is constant to every derivative."""
    state = state_table(config)
    return {n: a for n, a in params.items() if n not in state}, {
        n: a for n, a in params.items() if n in state
    }


def test_hand_computed_example():
    # Two positions, one channel; q = x, k = 2x, v = 3x + 1: scores q kᵀ = [[0, 0], [0, 2]] for x = (0, 1).
    config = SelfAttentionConfig(1, 1)
    params = {name: np.zeros(row.shape) for name, row in parameter_table(config).items()}
    params |= {
        f"{name}.kernel": np.array([[k]]) for name, k in (("query", 1.0), ("key", 2.0), ("value", 3.0))
    }
    params |= {"value.bias": np.array([1.0]), "gamma": np.array([0.5])}
    x = np.array([0.0, 1.0]).reshape(1, 1, 2, 1)
    weight = np.exp(2) / (1 + np.exp(2))
    A = np.array([[0.5, 0.5], [1 - weight, weight]])
    o = A @ [1.0, 4.0]
    np.testing.assert_allclose(spec.attention_map(config, params, x)[0], A, rtol=1e-15)
    np.testing.assert_allclose(spec.forward(config, params, x).ravel(), 0.5 * o + [0.0, 1.0], rtol=1e-15)
    gradients = spec.vjp(config, params, x, np.ones_like(x))
    np.testing.assert_allclose(gradients["gamma"], o.sum(), rtol=1e-15)
    np.testing.assert_allclose(gradients["value.bias"], 0.5 * 2, rtol=1e-15)
    # d y₂/d score₂₂ = γ w (1 − w)(v₂ − v₁), and score₂₂ = 1 · Wk · 1.
    np.testing.assert_allclose(gradients["key.kernel"], 0.5 * weight * (1 - weight) * 3, rtol=1e-14)


def test_pooling_by_hand():
    # One window of values (1, 4, 4, 2): the first 4 in row-major order wins, and is the only key.
    config = SelfAttentionConfig(1, 1, kv_pool=2)
    params = {name: np.zeros(row.shape) for name, row in parameter_table(config).items()}
    params |= {"value.kernel": np.ones((1, 1)), "gamma": np.ones(1)}
    x = np.array([1.0, 4.0, 9.0, 4.0, 2.0, 9.0]).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(spec.forward(config, params, x), x + 4)
    dx = spec.vjp(config, params, x, np.ones_like(x))["x"]
    np.testing.assert_array_equal(dx.ravel(), [1, 7, 1, 1, 1, 1])


def numerical_gradient(function, arrays, step):
    """Central differences of a scalar function, for every element of every array."""
    gradients = {}
    for name, array in arrays.items():
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            values = []
            for sign in (1, -1):
                moved = array.copy()
                moved[index] += sign * step
                values.append(function(arrays | {name: moved}))
            gradient[index] = (values[0] - values[1]) / (2 * step)
        gradients[name] = gradient
    return gradients


def test_vjp_is_the_numerical_gradient(config):
    params, x, dy = designed(config, "float64", (2, 3, 4))

    trained, state = split(config, params)

    def scalar(arrays):
        rest = state | {name: value for name, value in arrays.items() if name != "x"}
        return float(np.sum(dy * spec.forward(config, rest, arrays["x"])))

    want = numerical_gradient(scalar, {"x": x} | trained, 1e-6)
    got = spec.vjp(config, params, x, dy)
    assert list(got) == list(want)
    scale = max(np.abs(value).max() for value in want.values())
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-8 * scale, err_msg=name)


def test_second_order_is_the_numerical_gradient_of_the_first(config):
    params, x, dy = designed(config, "float64", (2, 3, 4))
    other, dot_x, _ = designed(config, "float64", (2, 3, 4), seed=1, gamma=-0.4)
    cotangents = {"x": dot_x} | split(config, other)[0]
    trained, state = split(config, params)

    def scalar(arrays):
        rest = state | {name: value for name, value in arrays.items() if name not in ("x", "dy")}
        first = spec.vjp(config, rest, arrays["x"], arrays["dy"])
        return float(sum(np.sum(cotangent * first[name]) for name, cotangent in cotangents.items()))

    want = numerical_gradient(scalar, {"dy": dy, "x": x} | trained, 1e-6)
    got = spec.vjp_of_vjp(config, params, x, dy, cotangents)
    assert list(got) == list(want)
    scale = max(np.abs(value).max() for value in want.values())
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-8 * scale, err_msg=name)


def test_r1_is_the_squared_norm_and_its_gradient(config):
    params, x, w = designed(config, "float64")
    value, gradients = spec.r1(config, params, x, w)
    dx = spec.vjp(config, params, x, w)["x"]
    np.testing.assert_allclose(value, np.sum(dx * dx), rtol=1e-14)
    want = spec.vjp_of_vjp(config, params, x, w, {"x": 2 * dx})
    del want["dy"]
    assert list(gradients) == list(want)
    for name, array in want.items():
        np.testing.assert_array_equal(gradients[name], array)


def test_rows_of_the_map_sum_to_one(config):
    params, x, _ = designed(config, "float64", (2, 5, 7))
    A = spec.attention_map(config, params, x)
    height, width = config.key_grid(5, 7)
    assert A.shape == (2, 35, height * width)
    np.testing.assert_allclose(A.sum(-1), 1, rtol=1e-14)
    assert A.max() > 0.5, "the designed input should be far from a uniform map"


def test_a_shift_of_the_key_bias_changes_nothing():
    params, x, _ = designed(FLAT, "float64")
    moved = params | {"key.bias": params["key.bias"] + [1.0, -2.0, 0.5]}
    assert_near(spec.forward(FLAT, moved, x), spec.forward(FLAT, params, x), 450, "float64")
    gradient = spec.vjp(FLAT, params, x, x)
    assert np.abs(gradient["key.bias"]).max() < 1e-13 * np.abs(gradient["query.bias"]).max()


def test_a_shift_of_the_value_bias_adds_gamma_times_it():
    params, x, _ = designed(FLAT, "float64")
    shift = np.linspace(-1, 2, FLAT.value_channels)
    moved = params | {"value.bias": params["value.bias"] + shift}
    assert_near(spec.forward(FLAT, moved, x), spec.forward(FLAT, params, x) + 0.7 * shift, 45, "float64")


def test_permuting_positions_permutes_the_output():
    params, x, _ = designed(FLAT, "float64", (2, 5, 7))
    order = np.random.default_rng(3).permutation(35)
    permuted = x.reshape(2, 35, 11)[:, order].reshape(x.shape)
    want = spec.forward(FLAT, params, x).reshape(2, 35, 11)[:, order].reshape(x.shape)
    assert_near(spec.forward(FLAT, params, permuted), want, 45, "float64")


def test_samples_are_independent(config):
    params, x, _ = designed(config, "float64")
    alone = spec.forward(config, params, x[1:])
    assert_near(spec.forward(config, params, x)[1:], alone, 45, "float64")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_gamma_zero_is_the_identity_bit_for_bit(config, dtype):
    params, x, _ = designed(config, dtype, gamma=0)
    y = spec.forward(config, params, x)
    assert y.tobytes() == x.tobytes()
    assert y is not x


def test_gradient_identities(config):
    """⟨Wq,dWq⟩+⟨bq,dbq⟩ = ⟨Wk,dWk⟩+⟨bk,dbk⟩, and the same between value, out projection and gamma."""
    config = dataclasses.replace(config, spectral_norm=False)
    params, x, dy = designed(config, "float64")
    gradients = spec.vjp(config, params, x, dy)

    def pairing(*names):
        return sum(np.sum(params[n] * gradients[n]) for name in names for n in params if n.startswith(name))

    np.testing.assert_allclose(pairing("query"), pairing("key"), rtol=1e-11)
    tail = pairing("out.") if config.out_projection else pairing("gamma")
    np.testing.assert_allclose(tail, pairing("gamma"), rtol=1e-11)


def test_sixteen_bits_compute_in_float32_and_round_where_values_are_stored():
    params, x, dy = designed(FLAT, np.float16)
    wide = {name: value.astype(np.float64) for name, value in params.items()}
    y = spec.forward(FLAT, params, x)
    assert y.dtype == np.float16
    want = spec.forward(FLAT, wide, x.astype(np.float64))
    assert np.abs(y - want).max() < 16 * 2**-10 * np.abs(want).max()
    assert all(value.dtype == np.float16 for value in spec.vjp(FLAT, params, x, dy).values())


def test_float32_computes_in_float32():
    params, x, dy = designed(POOLED, np.float32)
    assert spec.forward(POOLED, params, x).dtype == np.float32
    value, gradients = spec.r1(POOLED, params, x, dy)
    assert value > 0
    assert {str(array.dtype) for array in gradients.values()} == {"float32"}


def test_a_pooled_window_with_nan_gives_nan_and_other_samples_stay():
    params, x, _ = designed(POOLED, "float64")
    x[0, 1, 2, 4] = np.nan
    y = spec.forward(POOLED, params, x)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


def test_large_logits_are_finite():
    params, x, _ = designed(FLAT, np.float32)
    params["query.kernel"] = params["query.kernel"] * np.float32(1e4)
    assert np.isfinite(spec.forward(FLAT, params, x)).all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (1, 1, 1), (1, 1, 9), (3, 8, 1)])
def test_edge_shapes(shape):
    params, x, dy = designed(FLAT, "float64", shape)
    assert spec.forward(FLAT, params, x).shape == x.shape
    gradients = spec.vjp(FLAT, params, x, dy)
    assert {name: array.shape for name, array in gradients.items()} == {"x": x.shape} | {
        name: row.shape for name, row in parameter_table(FLAT).items()
    }
    assert np.isfinite(spec.r1(FLAT, params, x, dy)[0])


def test_gamma_of_any_one_element_shape_is_taken():
    params, x, _ = designed(FLAT, "float64")
    scalar = params | {"gamma": params["gamma"].reshape(())}
    np.testing.assert_array_equal(spec.forward(FLAT, scalar, x), spec.forward(FLAT, params, x))


def test_arguments_are_left_alone():
    params, x, dy = designed(POOLED, "float64")
    before = {name: value.copy() for name, value in params.items()}
    spec.r1(POOLED, params, x, dy)
    for name, value in before.items():
        np.testing.assert_array_equal(params[name], value)


def test_what_does_not_fit_is_refused():
    params, x, dy = designed(FLAT, "float64", (2, 5, 7))
    with pytest.raises(ValueError, match=r"got input of shape \(5, 7, 11\); expected \(B, H, W, 11\)"):
        spec.forward(FLAT, params, x[0])
    with pytest.raises(ValueError, match="its 10 channels should be 11"):
        spec.forward(FLAT, params, x[..., :10])
    with pytest.raises(TypeError, match="dtype int64; expected floating point"):
        spec.forward(FLAT, params, np.zeros(x.shape, np.int64))
    with pytest.raises(ValueError, match="x of dtype float32 and parameters of dtype float64"):
        spec.forward(FLAT, params, x.astype(np.float32))
    with pytest.raises(ValueError, match="map of 1×7 positions is smaller than one 2×2 pooling window"):
        spec.forward(POOLED, designed(POOLED, "float64")[0], x[:, :1])
    with pytest.raises(ValueError, match="got dy of shape"):
        spec.vjp(FLAT, params, x, dy[:1])
    with pytest.raises(ValueError, match=r"got cotangents .*krenel.*; expected names among x, query.kernel"):
        spec.vjp_of_vjp(FLAT, params, x, dy, {"key.krenel": dy})


def test_missing_extra_and_misshapen_parameters_are_reported_together():
    params, x, _ = designed(FLAT, "float64")
    del params["key.bias"]
    params |= {"kye.bias": np.zeros(3), "query.kernel": np.zeros((3, 11))}
    with pytest.raises(ValueError, match="do not fit") as error:
        spec.forward(FLAT, params, x)
    for words in (
        "missing: key.bias (3,)",
        "unexpected: kye.bias (3,)",
        "query.kernel is (3, 11), should be (11, 3)",
    ):
        assert words in str(error.value)


def test_initialisation_is_glorot_uniform_with_zero_biases_and_gamma():
    config = SelfAttentionConfig(512)
    params = init_params(config, seed=5)
    for name, row in parameter_table(config).items():
        if row.initial == "zeros":
            assert not params[name].any()
        else:
            limit = np.sqrt(6 / sum(row.shape))
            assert np.abs(params[name]).max() <= limit
            np.testing.assert_allclose(params[name].std(), limit / np.sqrt(3), rtol=0.01)
            assert abs(params[name].mean()) < 0.02 * limit
    assert not np.array_equal(params["query.kernel"], params["key.kernel"])
