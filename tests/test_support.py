"""The helpers of the tests see what they should: each is given something wrong."""

import dataclasses

import numpy as np
import pytest

from selfattn_core import spec, spectral_norm
from selfattn_core.params import projections, state_table
from tests.support import CONFIGS, NORMALISED, OUTPUT, assert_near, assert_same, designed, wide

EVERY_LAYER = [*CONFIGS.values(), NORMALISED]
WANT = np.array([[1.0, -2.0, 3.0]])


@pytest.mark.parametrize("config", EVERY_LAYER, ids=[*CONFIGS, "spectral norm"])
def test_every_part_of_a_designed_layer_shows_in_its_output(config):
    params, x, dy = designed(config, "float64")
    assert x.shape == dy.shape == (2, 7, 9, config.channels)
    y = spec.forward(config, params, x)
    # A bias of the key moves every logit of a row alike, and u and v enter by their product with a kernel.
    for name in params.keys() - {"key.bias"}:
        spoiled = params | {name: params[name][::-1] if len(params[name]) > 1 else 2 * params[name]}
        assert np.abs(spec.forward(config, spoiled, x) - y).max() > 1e-3, name


def test_sizes_differ_and_so_do_draws():
    config = CONFIGS["pooled with biases"]
    params, x, _ = designed(config)
    batch, height, width, channels = x.shape
    keys = np.prod(config.key_grid(height, width))
    sizes = batch, height, width, channels, config.qk_channels, config.value_channels, height * width, keys
    assert len(set(sizes)) == len(sizes)
    assert not np.array_equal(designed(config, seed=1)[0]["query.kernel"], params["query.kernel"])
    assert designed(config, gamma=0.25)[0]["gamma"] == 0.25


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_everything_has_the_dtype(dtype):
    params, x, dy = designed(NORMALISED, dtype)
    assert set(state_table(NORMALISED)) < set(params)
    assert {array.dtype for array in (*params.values(), x, dy)} == {np.dtype(dtype)}
    assert {array.dtype for array in (*wide(params).values(), wide(x))} == {np.dtype("float64")}


def test_the_state_of_a_spectral_norm_has_not_converged():
    params, *_ = designed(NORMALISED)
    for name in projections(NORMALISED):
        kernel, u, v = (params[f"{name}.{part}"] for part in ("kernel", "u", "v"))
        assert spectral_norm.sigma(kernel, u, v) < 0.97 * np.linalg.norm(kernel, 2)
        np.testing.assert_allclose([np.linalg.norm(u), np.linalg.norm(v)], 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_error_is_seen_from_the_limit_on(dtype):
    ulp = np.finfo(dtype).eps * 3
    assert_near(WANT + 15 * ulp, WANT, OUTPUT, dtype)
    for got in (WANT + 17 * ulp, WANT - [[0, 17 * ulp, 0]]):
        with pytest.raises(AssertionError, match="at most 16 × is allowed"):
            assert_near(got, WANT, OUTPUT, dtype)
    assert_near(WANT + 17 * ulp, WANT, OUTPUT, dtype, scale=30)
    with pytest.raises(AssertionError):
        assert_near(WANT + 15 * ulp, WANT, OUTPUT, dtype, scale=1)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (WANT[0], WANT),
        (WANT.T, WANT),
        (WANT * [[1, np.nan, 1]], WANT),
        (WANT * [[1, np.inf, 1]], WANT),
        (WANT * np.nan, WANT * np.nan),
        (np.full(3, 1e-30), np.zeros(3)),
    ],
    ids=["rank", "shape", "NaN", "infinity", "NaN wanted", "not zero"],
)
def test_what_is_not_near(got, want):
    with pytest.raises(AssertionError):
        assert_near(got, want, 1e6)


def test_equal_arrays_are_near_and_the_same():
    for want in (WANT, np.zeros(3), np.zeros((0, 3)), np.float64(2)):
        assert_near(want, want, 0)
    assert_same({"a": WANT, "b": WANT.T}, {"a": WANT, "b": WANT.T})


@pytest.mark.parametrize(
    "got",
    [
        {"b": WANT, "a": WANT},
        {"a": WANT},
        {"a": WANT, "b": WANT, "c": WANT},
        {"a": WANT, "b": WANT.astype("float32")},
        {"a": WANT, "b": WANT[0]},
        {"a": WANT, "b": np.nextafter(WANT, 9)},
        {"a": WANT, "b": WANT.view(np.matrix)},
    ],
    ids=["order", "missing", "extra", "dtype", "shape", "last bit", "type"],
)
def test_what_is_not_the_same(got):
    with pytest.raises(AssertionError):
        assert_same(got, {"a": WANT, "b": WANT})


def test_a_wrong_layer_is_not_near():
    config = CONFIGS["flat"]
    params, x, _ = designed(config, "float64")
    y = spec.forward(config, params, x)
    swapped = params | {"query.kernel": params["key.kernel"], "key.kernel": params["query.kernel"]}
    other = dataclasses.replace(config, use_bias=False)
    plain = {name: array for name, array in params.items() if "bias" not in name}
    for wrong in (spec.forward(config, swapped, x), spec.forward(other, plain, x), y.astype("float32")):
        with pytest.raises(AssertionError):
            assert_near(wrong, y, OUTPUT, "float64")
