"""Averaged weights with spectral norm: which state the recipes of docs/gan-training.md end with, and what the naive way misses."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from selfattn_core import SelfAttentionConfig, spec
from selfattn_core.conformance.verdicts.tolerance import EPS
from selfattn_core.params import projections
from selfattn_torch import SelfAttention2d, to_canonical
from tests.support import OUTPUT, assert_near

CONFIG = SelfAttentionConfig(16, 3, 11, out_projection=True, spectral_norm=True)
PASSES = 50


def of_converged_norms(params, x):
    """What averaged kernels define: the spec in float64, each kernel over its largest singular value."""
    wide = {name: array.astype(np.float64) for name, array in params.items()}
    for name in projections(CONFIG):
        wide[f"{name}.kernel"] /= np.linalg.norm(wide[f"{name}.kernel"], 2)
    plain = SelfAttentionConfig(16, 3, 11, out_projection=True)
    return spec.forward(plain, {name: wide[name] for name in wide if name[-2:] not in (".u", ".v")}, x)


def error_in_ulp(layer, seed=5):
    x = np.random.default_rng(seed).standard_normal((2, 5, 7, 16)).astype(np.float32)
    with torch.no_grad():
        y = layer.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    want = of_converged_norms(to_canonical(layer), x.astype(np.float64))
    return np.abs(y - want).max() / (EPS["float32"] * np.abs(want).max())


def shortfall(layer):
    """By how much the norm that u and v estimate is too small, the worst projection's."""
    params = to_canonical(layer)
    return max(
        1
        - params[f"{name}.v"]
        @ params[f"{name}.kernel"]
        @ params[f"{name}.u"]
        / np.linalg.norm(params[f"{name}.kernel"], 2)
        for name in projections(CONFIG)
    )


@pytest.fixture(scope="module")
def averages():
    """After 200 steps: parameters averaged, and buffers copied, averaged, or averaged by hand."""
    torch.manual_seed(0)
    layer = SelfAttention2d.from_config(CONFIG)
    nn.init.constant_(layer.gamma, 0.7)
    teacher = SelfAttention2d(16)
    nn.init.ones_(teacher.gamma)
    adam = torch.optim.Adam(layer.parameters(), 1e-3, betas=(0.0, 0.9))
    kinds = {
        use: AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=use)
        for use in (False, True)
    }
    for _ in range(200):
        x = torch.randn(4, 16, 5, 3)
        loss = (layer(x) - teacher(x)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        for average in kinds.values():
            average.update_parameters(layer)
    return kinds


def settle(average):
    average.train()
    with torch.no_grad():
        for _ in range(PASSES):
            average(torch.randn(2, 16, 5, 3))
    return average.eval()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_passes_in_training_mode_give_the_function_of_the_averaged_kernels(averages, use_buffers):
    average = copy.deepcopy(averages[use_buffers])
    kernel = average.module.value.weight.clone()
    assert error_in_ulp(settle(average).module) <= OUTPUT
    assert torch.equal(average.module.value.weight, kernel)


@pytest.mark.parametrize(("use_buffers", "least"), [(False, 5e-4), (True, 4e-3)])
def test_without_them_the_norm_is_too_small(averages, use_buffers, least):
    layer = copy.deepcopy(averages[use_buffers]).module
    assert least < shortfall(layer) < 0.03
    assert error_in_ulp(layer) > 100 * OUTPUT


def test_update_bn_moves_the_state_only_where_there_is_a_batch_norm(averages):
    layer = copy.deepcopy(averages[False]).module
    before = layer.query.v.clone()
    update_bn([torch.randn(2, 16, 5, 3)], layer)
    assert torch.equal(layer.query.v, before)
    update_bn([torch.randn(2, 16, 5, 3)] * PASSES, nn.Sequential(nn.BatchNorm2d(16), layer))
    assert error_in_ulp(layer) <= OUTPUT


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_flax_averages_parameters_and_settles_the_state(averages, api):
    jax = pytest.importorskip("jax")
    flax_nnx = pytest.importorskip("flax.nnx")
    optax = pytest.importorskip("optax")
    import selfattn_flax
    from selfattn_flax import linen

    start, end = (to_canonical(averages[use].module) for use in (False, True))
    end = end | {name: 1.3 * end[name] + 0.2 for name in end if name.endswith("kernel")}
    x = np.random.default_rng(5).standard_normal((2, 5, 7, 16)).astype(np.float32)
    if api == "nnx":
        average, network = (selfattn_flax.from_canonical(CONFIG, params) for params in (start, end))
        mean, value = (flax_nnx.state(model, flax_nnx.Param) for model in (average, network))
        assert {str(path[-1]) for path, _ in flax_nnx.to_flat_state(mean)} == {"kernel", "bias", "gamma"}
        flax_nnx.update(average, optax.incremental_update(value, mean, 0.3))
        move = flax_nnx.jit(lambda model, x: model(x))
        for _ in range(PASSES):
            move(average, x)
        average.eval()
        y, params = average(x), selfattn_flax.to_canonical(average)
    else:
        (layer, variables), (_, other) = (linen.from_canonical(CONFIG, params) for params in (start, end))
        mean = optax.incremental_update(other["params"], variables["params"], 0.3)
        move = jax.jit(
            lambda stats: layer.apply(
                {"params": mean, "batch_stats": stats}, x, use_running_average=False, mutable=["batch_stats"]
            )[1]["batch_stats"]
        )
        stats = variables["batch_stats"]
        for _ in range(PASSES):
            stats = move(stats)
        settled = {"params": mean, "batch_stats": stats}
        y = layer.apply(settled, x, use_running_average=True)
        params = linen.to_canonical(layer, settled)
    np.testing.assert_allclose(
        params["value.kernel"], 0.7 * start["value.kernel"] + 0.3 * end["value.kernel"], rtol=1e-5, atol=1e-6
    )
    want = of_converged_norms(params, x.astype(np.float64))
    assert_near(y, want, OUTPUT)
