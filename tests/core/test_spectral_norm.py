"""Spectral norm in the specification: sigma, its derivatives, the state, and PyTorch's as the outside reference."""

import dataclasses

import numpy as np
import pytest
import torch

from selfattn_core import SelfAttentionConfig, init_params, spec, spectral_norm
from selfattn_core.params import (
    check_params,
    fold_spectral_norm,
    parameter_table,
    projections,
    refresh_spectral_norm,
    state_table,
)
from tests.support import designed

FLAT = SelfAttentionConfig(11, 3, spectral_norm=True)
POOLED = SelfAttentionConfig(11, 3, 5, out_projection=True, kv_pool=2, spectral_norm=True)
EPS = float(np.finfo(np.float64).eps)


@pytest.fixture(params=[FLAT, POOLED], ids=["flat", "pooled"])
def config(request) -> SelfAttentionConfig:
    return request.param


def test_by_hand():
    # K = [[3], [4]] (C_in 2, C_out 1) and v = (1, 0): one iteration gives u = 1, v = (0.6, 0.8), sigma = 5.
    config = SelfAttentionConfig(2, 1, spectral_norm=True)
    params = {name: np.zeros(row.shape) for name, row in parameter_table(config).items()}
    params |= {
        name: np.eye(1, *row.shape)[0] if row.shape == (2,) else np.ones(row.shape)
        for name, row in state_table(config).items()
    }
    params["query.kernel"] = np.array([[3.0], [4.0]])
    moved = spec.power_iteration(config, params)
    np.testing.assert_allclose(moved["query.u"], [1.0], rtol=EPS)
    np.testing.assert_allclose(moved["query.v"], [0.6, 0.8], rtol=EPS)
    params |= {"query.v": moved["query.v"], "query.u": moved["query.u"]}
    for name in ("key", "value"):
        params[f"{name}.kernel"] = np.eye(2)[:, : projections(config)[name][1]]
    params["value.u"] = np.array([1.0, 0.0])
    folded, plain = fold_spectral_norm(config, params)
    assert folded == SelfAttentionConfig(2, 1)
    np.testing.assert_allclose(plain["query.kernel"], [[0.6], [0.8]], rtol=EPS)
    np.testing.assert_array_equal(plain["value.kernel"], np.eye(2))


def test_the_function_is_that_of_the_folded_layer(config):
    params, x, _ = designed(config, "float64")
    plain, folded = fold_spectral_norm(config, params)
    assert plain == dataclasses.replace(config, spectral_norm=False)
    assert list(folded) == list(parameter_table(plain))
    np.testing.assert_array_equal(spec.forward(config, params, x), spec.forward(plain, folded, x))
    np.testing.assert_array_equal(spec.attention_map(config, params, x), spec.attention_map(plain, folded, x))
    unnormalised = {name: array for name, array in params.items() if name in folded}
    difference = spec.forward(config, params, x) - spec.forward(plain, unnormalised, x)
    assert np.abs(difference).max() > 0.1


def test_magnitudes_are_those_of_the_folded_layer(config):
    params, x, dy = designed(config, "float64")
    plain, folded = fold_spectral_norm(config, params)
    for cotangents in (None, {"x": x}):
        assert spec.magnitudes(config, params, x, dy, cotangents=cotangents) == spec.magnitudes(
            plain, folded, x, dy, cotangents=cotangents
        )


def test_a_gradient_is_orthogonal_to_its_raw_kernel(config):
    """Scaling a raw kernel changes nothing, which holds for any u and v: here they are not even unit vectors."""
    params, x, dy = designed(config, "float64")
    for name in state_table(config):
        params[name] = params[name] * 1.5
    for gradients in (spec.vjp(config, params, x, dy), spec.r1(config, params, x, dy)[1]):
        for name in projections(config):
            kernel, gradient = params[f"{name}.kernel"], gradients[f"{name}.kernel"]
            assert np.abs(gradient).max() > 1e-3
            assert abs(np.sum(kernel * gradient)) < 100 * EPS * np.sum(np.abs(kernel * gradient))


def test_scaling_a_raw_kernel_changes_nothing(config):
    params, x, dy = designed(config, "float64")
    scaled = params | {f"{name}.kernel": 4 * params[f"{name}.kernel"] for name in projections(config)}
    np.testing.assert_array_equal(spec.forward(config, scaled, x), spec.forward(config, params, x))
    got, want = spec.vjp(config, scaled, x, dy), spec.vjp(config, params, x, dy)
    np.testing.assert_array_equal(got["key.kernel"], want["key.kernel"] / 4)
    np.testing.assert_array_equal(got["x"], want["x"])


def test_many_iterations_reach_the_largest_singular_value(config):
    params, *_ = designed(config, "float64")
    previous = 0.0
    for step in range(400):
        params = spec.power_iteration(config, params)
        kernel = params["value.kernel"]
        sigma = spectral_norm.sigma(kernel, params["value.u"], params["value.v"])
        assert sigma >= previous * (1 - 4 * EPS), f"step {step}: the estimate only grows"
        previous = sigma
    for name in projections(config):
        kernel, u, v = (params[f"{name}.{part}"] for part in ("kernel", "u", "v"))
        left, values, right = np.linalg.svd(kernel)
        np.testing.assert_allclose(spectral_norm.sigma(kernel, u, v), values[0], rtol=1e-12)
        np.testing.assert_allclose(np.outer(v, u), np.outer(left[:, 0], right[0]), atol=1e-6)


def test_an_iteration_moves_the_state_alone_and_reads_only_v(config):
    params, *_ = designed(config, "float64")
    moved = spec.power_iteration(config, params)
    assert list(moved) == list(params)
    for name in params:
        difference = np.abs(moved[name] - params[name]).max()
        assert difference > 1e-3 if name in state_table(config) else difference == 0
    spoiled = params | {name: params[name] * np.nan for name in state_table(config) if name.endswith(".u")}
    for name, array in spec.power_iteration(config, spoiled).items():
        np.testing.assert_array_equal(array, moved[name])


def test_a_layer_without_spectral_norm_has_no_state():
    plain = dataclasses.replace(FLAT, spectral_norm=False)
    params = init_params(plain, seed=0)
    assert state_table(plain) == {}
    moved = spec.power_iteration(plain, params)
    folded, same = fold_spectral_norm(plain, params)
    assert folded == plain
    for name, array in params.items():
        np.testing.assert_array_equal(moved[name], array)
        np.testing.assert_array_equal(same[name], array)


def test_torch_agrees_through_training_steps():
    """Sigma and gradient of one kernel through five steps of SGD, with a loss that is linear in the used kernel."""
    generator = np.random.default_rng(1)
    params, *_ = designed(FLAT, "float64")
    slope = generator.standard_normal((3, 11))
    linear = torch.nn.Linear(11, 3, bias=False, dtype=torch.float64)
    torch.nn.utils.parametrizations.spectral_norm(linear)
    weights = linear.parametrizations.weight
    with torch.no_grad():
        weights.original.copy_(torch.from_numpy(params["query.kernel"].T))
        weights[0]._u.copy_(torch.from_numpy(params["query.u"]))
        weights[0]._v.copy_(torch.from_numpy(params["query.v"]))
    for _ in range(5):
        linear.zero_grad()
        used = linear.weight
        (used * torch.from_numpy(slope)).sum().backward()
        params = spec.power_iteration(FLAT, params)
        kernel, u, v = (params[f"query.{part}"] for part in ("kernel", "u", "v"))
        np.testing.assert_allclose(u, weights[0]._u.numpy(), rtol=1e-13, atol=4 * EPS)
        np.testing.assert_allclose(v, weights[0]._v.numpy(), rtol=1e-13, atol=4 * EPS)
        norm = spectral_norm.sigma(kernel, u, v)
        np.testing.assert_allclose(kernel.T / norm, used.detach().numpy(), rtol=1e-13)
        gradient = spec._Normalised(kernel / norm, np.outer(v, u), norm).back(slope.T)
        np.testing.assert_allclose(gradient.T, weights.original.grad.numpy(), rtol=1e-11, atol=16 * EPS)
        with torch.no_grad():
            weights.original -= 0.1 * weights.original.grad
        params["query.kernel"] = kernel - 0.1 * gradient


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_new_layer_has_been_warmed_up(dtype):
    config = dataclasses.replace(POOLED, channels=64, qk_channels=8)
    params = init_params(config, seed=3, dtype=dtype)
    plain = init_params(dataclasses.replace(config, spectral_norm=False), seed=3, dtype=dtype)
    for name, array in plain.items():
        np.testing.assert_array_equal(array, params[name])
    for name in projections(config):
        kernel, u, v = (params[f"{name}.{part}"].astype(np.float64) for part in ("kernel", "u", "v"))
        np.testing.assert_allclose([np.linalg.norm(u), np.linalg.norm(v)], 1, rtol=2 * np.finfo(dtype).eps)
        ratio = spectral_norm.sigma(kernel, u, v) / np.linalg.norm(kernel, 2)
        assert 0.9 < ratio < 1 + 2 * np.finfo(dtype).eps
    assert {str(array.dtype) for array in params.values()} == {np.dtype(dtype).name}
    again = init_params(config, seed=3, dtype=dtype)
    assert all(again[name].tobytes() == params[name].tobytes() for name in params)


def test_warm_up_is_fifteen_iterations():
    generator = np.random.default_rng(0)
    kernel, v = generator.standard_normal((5, 3)), generator.standard_normal(5)
    want = v
    for _ in range(15):
        u = kernel.T @ want
        u /= np.linalg.norm(u)
        want = kernel @ u
        want /= np.linalg.norm(want)
    got = spectral_norm.warmed_up(kernel, v)
    np.testing.assert_allclose(got[0], u, rtol=1e-14)
    np.testing.assert_allclose(got[1], want, rtol=1e-14)


def test_sixteen_bits_compute_in_float32():
    params, x, _ = designed(FLAT, np.float16)
    wide = {name: array.astype(np.float64) for name, array in params.items()}
    moved, want = spec.power_iteration(FLAT, params), spec.power_iteration(FLAT, wide)
    for name in state_table(FLAT):
        assert moved[name].dtype == np.float16
        np.testing.assert_allclose(moved[name], want[name], atol=2**-11)
    assert spec.forward(FLAT, params, x).dtype == np.float16
    y = spec.forward(FLAT, wide, x.astype(np.float64))
    assert np.abs(spec.forward(FLAT, params, x) - y).max() < 16 * 2**-10 * np.abs(y).max()


@pytest.mark.parametrize("role", ["query", "out"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_kernel_of_zeros_is_applied_as_it_is_and_folds_to_itself(role, dtype):
    config = dataclasses.replace(POOLED, kv_pool=1)
    params, x, dy = designed(config, dtype)
    name = f"{role}.kernel"
    params[name] = np.zeros_like(params[name])
    plain, folded = fold_spectral_norm(config, params)
    assert not folded[name].any()
    for moved in (params, spec.power_iteration(config, params)):
        plain, folded = fold_spectral_norm(config, moved)
        got, want = spec.vjp(config, moved, x, dy), spec.vjp(plain, folded, x, dy)
        if dtype is np.float64:  # folding rounds the other kernels to fewer bits
            np.testing.assert_array_equal(got[name], want[name])
        assert np.abs(got[name]).max() > 1e-3
        second = spec.r1(config, moved, x, dy)[1]
        assert all(np.isfinite(array).all() for array in (spec.forward(config, moved, x), *second.values()))


def test_a_kernel_leaves_zero_and_its_norm_is_found():
    """From a state that is orthogonal to it, and from one that is zero, as was left behind before."""
    params, *_ = designed(FLAT, "float64")
    params["query.kernel"] = np.zeros((11, 3))
    at_rest = spec.power_iteration(FLAT, params)
    for part, length in (("u", 3), ("v", 11)):
        wanted = spectral_norm.fallback(length)
        np.testing.assert_allclose(at_rest[f"query.{part}"], wanted / np.linalg.norm(wanted), rtol=4 * EPS)
    kernel = np.random.default_rng(5).standard_normal((11, 3))
    kernel[4] = 0
    orthogonal = np.eye(11)[4]
    for start in (at_rest["query.v"], orthogonal, np.zeros(11)):
        moved = params | {"query.kernel": kernel, "query.v": start, "query.u": np.zeros(3)}
        for _ in range(300):
            moved = spec.power_iteration(FLAT, moved)
        got = spectral_norm.sigma(kernel, moved["query.u"], moved["query.v"])
        np.testing.assert_allclose(got, np.linalg.norm(kernel, 2), rtol=1e-12)


def test_the_warm_up_of_a_kernel_of_zeros_gives_vectors_of_length_one():
    u, v = spectral_norm.warmed_up(np.zeros((11, 3), np.float32), np.ones(11, np.float32))
    assert u.dtype == v.dtype == np.float32
    np.testing.assert_allclose([np.linalg.norm(u), np.linalg.norm(v)], 1, rtol=1e-6)


def test_a_kernel_that_is_not_a_number_stays_one():
    params, x, _ = designed(FLAT, "float64")
    params["query.kernel"] = np.full((11, 3), np.nan)
    assert np.isnan(spec.forward(FLAT, spec.power_iteration(FLAT, params), x)).all()


def test_all_norms_that_cannot_be_folded_are_reported():
    params, *_ = designed(FLAT, "float64")
    params = {name: array.astype(np.float32) for name, array in params.items()}
    params["key.u"] = np.zeros(3, np.float32)
    params["value.v"] = params["value.v"] * np.float32(1e-40)
    with pytest.raises(ValueError, match="cannot be folded") as error:
        fold_spectral_norm(FLAT, params)
    assert "key: its norm vᵀ K u is 0" in str(error.value)
    assert "value: its norm vᵀ K u = " in str(error.value)


def test_state_of_the_wrong_shape_or_name_is_refused():
    params, x, dy = designed(FLAT, "float64")
    params |= {"query.u": params["query.v"], "out.u": np.ones(11)}
    del params["key.v"]
    with pytest.raises(ValueError, match="do not fit") as error:
        check_params(FLAT, params)
    for words in ("missing: key.v (11,)", "unexpected: out.u (11,)", "query.u is (11,), should be (3,)"):
        assert words in str(error.value)
    params, *_ = designed(FLAT, "float64")
    with pytest.raises(ValueError, match=r"got cotangents \['query.u'\]"):
        spec.vjp_of_vjp(FLAT, params, x, dy, {"query.u": params["query.u"]})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_refreshed_state_is_that_of_the_kernels(config, dtype):
    params, *_ = designed(config, dtype, seed=7)
    params["key.kernel"] = 0 * params["key.kernel"]
    stale = {name: params[name][::-1] if name in state_table(config) else params[name] for name in params}
    eps = np.finfo(dtype).eps
    for given in (stale, {name: array for name, array in params.items() if name not in state_table(config)}):
        fresh = refresh_spectral_norm(config, given)
        assert list(check_params(config, fresh)) == list(fresh) == list(params)
        for name in projections(config):
            kernel, u, v = (fresh[f"{name}.{part}"] for part in ("kernel", "u", "v"))
            np.testing.assert_array_equal(kernel, params[f"{name}.kernel"])
            assert u.dtype == v.dtype == dtype
            np.testing.assert_allclose([np.linalg.norm(w.astype(float)) for w in (u, v)], 1, rtol=2 * eps)
            np.testing.assert_allclose(spectral_norm.share(kernel, u, v), 1, rtol=4 * eps)
    moved = spec.power_iteration(config, fresh)
    for name in state_table(config):
        np.testing.assert_allclose(moved[name], fresh[name], atol=8 * eps)
    with pytest.raises(ValueError, match=r"missing: query\.kernel"):
        refresh_spectral_norm(config, {name: params[name] for name in state_table(config)})


def test_the_share_sees_states_of_other_kernels_and_averages():
    params, *_ = designed(FLAT, "float64")
    kernel, u, v = (refresh_spectral_norm(FLAT, params)[f"value.{part}"] for part in ("kernel", "u", "v"))
    np.testing.assert_allclose(spectral_norm.share(kernel, 0.98 * u, 0.99 * v), 0.98 * 0.99, rtol=8 * EPS)
    assert abs(spectral_norm.share(kernel, u[::-1], v)) < 0.9


def test_lengths_that_only_rounding_made_are_nothing_to_speak_of():
    """A file in bfloat16 is read as float32, so its numbers have to show what they were rounded to."""
    _, u, v = (
        refresh_spectral_norm(POOLED, designed(POOLED, "float64")[0])[f"value.{part}"]
        for part in ("kernel", "u", "v")
    )
    single = np.resize(v.astype(np.float32), 64)
    single /= np.linalg.norm(single)
    halves = ((single.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)
    assert abs(np.linalg.norm(halves.astype(np.float64)) - 1) > 1e-5
    assert spectral_norm.unlike_unit_vectors({"v": halves, "u": u}) == ""
    assert "v: 0.99" in spectral_norm.unlike_unit_vectors({"v": np.float32(0.9901) * single, "u": u})
    # In float32 the decay of a thousand small steps is seen.
    assert "u: 0.9995" in spectral_norm.unlike_unit_vectors({"v": v, "u": 0.9995 * u})
