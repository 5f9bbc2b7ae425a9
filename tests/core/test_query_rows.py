"""Rows and change by blocks are those of the whole map of the definition, in float64, and no whole map is made."""

import tracemalloc

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, maps, parameter_table, query_rows, spec
from selfattn_core.params import state_table
from selfattn_core.query_rows import attention_rows, relative_change

EPS = np.finfo(np.float64).eps
LAYERS = {
    "flat": SelfAttentionConfig(10, 3),
    "pooled": SelfAttentionConfig(10, 3, 4, out_projection=True, kv_pool=2),
    "pooled, no out projection": SelfAttentionConfig(10, 3, kv_pool=2),
    "no biases, spectral norm": SelfAttentionConfig(10, 3, use_bias=False, kv_pool=2, spectral_norm=True),
}
H, W = 7, 9


def drawn(config, height=H, width=W):
    generator = np.random.default_rng(4)
    table = parameter_table(config) | state_table(config)
    params = {name: generator.standard_normal(row.shape) for name, row in table.items()}
    return params | {"gamma": np.full(1, 0.7)}, generator.standard_normal((height, width, config.channels))


def bound(config, params, x):
    """How far two ways of adding up the same products may lie apart, relative to a weight.

    A logit is a sum of Dk products of sums of C: each way is within (C + Dk + 4) eps of its absolute terms, so that a
    weight exp(logit) is too, with a sum over M of them, and the terms are taken for every key.
    """
    folded, kernels = query_rows.fold_spectral_norm(config, params)
    size = {
        name: np.abs(x).reshape(-1, config.channels) @ np.abs(kernels[f"{name}.kernel"])
        + np.abs(kernels.get(f"{name}.bias", 0))
        for name in ("query", "key")
    }
    terms = (size["query"] @ size["key"].T).max()
    keys = np.prod(folded.key_grid(*x.shape[:2]))
    return 2 * EPS * (2 * (config.channels + config.qk_channels + 4) * terms + keys)


@pytest.fixture(params=[(1024, 4096), (5, 4), (1, 1)], ids=["one block", "ragged blocks", "one by one"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(query_rows, "_QUERIES", request.param[0])
    monkeypatch.setattr(query_rows, "_KEYS", request.param[1])


@pytest.mark.parametrize("name", LAYERS)
def test_rows_and_their_statistics_are_those_of_the_whole_map(name):
    config = LAYERS[name]
    params, x = drawn(config)
    grid = maps.unflatten(spec.attention_map(config, params, x[None])[0], H, W, kv_pool=config.kv_pool)
    whole = maps.map_statistics(grid, kv_pool=config.kv_pool)
    positions = [(6, 2), (0, 8), (3, 4), (3, 4)]
    rows = attention_rows(config, params, x, positions)
    statistics = maps.row_statistics(rows, positions, (H, W), kv_pool=config.kv_pool)
    error = bound(config, params, x)
    assert error < 1e-9
    for index, position in enumerate(positions):
        np.testing.assert_allclose(rows[index], grid[position], rtol=error, atol=0)
        # A sum of weights times distances below H + W, or times logarithms, which move by the error itself.
        of_rows = {
            "mean_distance": error * (H + W),
            "peak": error,
            "entropy": error * (2 + np.abs(np.log(grid[position].min()))),
        }
        for quantity, allowed in of_rows.items():
            got, want = (getattr(found, quantity) for found in (statistics, whole))
            assert abs(got[index] - want[position]) <= allowed, quantity
        assert statistics.effective_size[index] == pytest.approx(np.exp(statistics.entropy[index]))


@pytest.mark.parametrize("name", LAYERS)
def test_the_change_is_that_of_the_definition(name, blocks):
    config = LAYERS[name]
    params, x = drawn(config)
    change = spec.forward(config, params, x[None])[0] - x
    error = bound(config, params, x) + 8 * config.channels * H * W * EPS
    # Weights that are off by so much move the attended values by so much of their largest one.
    _, kernels = query_rows.fold_spectral_norm(config, params)
    values = np.abs(x) @ np.abs(kernels["value.kernel"]) + np.abs(kernels.get("value.bias", 0))
    out = np.abs(kernels["out.kernel"]).sum(axis=0).max() if config.out_projection else 1
    allowed = error * (1 + 0.7 * values.max() * out) * np.sqrt(x.size) / np.linalg.norm(x)
    assert allowed < 1e-8
    assert abs(relative_change(config, params, x) - np.linalg.norm(change) / np.linalg.norm(x)) <= allowed
    some = np.array([3, 17, 40, 62])
    want = np.linalg.norm(change.reshape(H * W, -1)[some]) / np.linalg.norm(x.reshape(H * W, -1)[some])
    assert abs(relative_change(config, params, x, positions=some) - want) <= allowed * 4


def test_large_logits_in_rising_order_neither_overflow_nor_vanish(blocks):
    config = SelfAttentionConfig(1, 1, use_bias=False)
    params = {name: np.ones(row.shape) for name, row in parameter_table(config).items()}
    x = np.linspace(-900, 900, H * W).reshape(H, W, 1)
    want = np.linalg.norm(spec.forward(config, params, x[None])[0] - x) / np.linalg.norm(x)
    assert relative_change(config, params, x) == pytest.approx(want, rel=64 * EPS)


@pytest.mark.parametrize("name", LAYERS)
def test_no_whole_map_is_made(name):
    """A map has N·M numbers; what is held is a block, and so many numbers as the features have, a few times."""
    config = LAYERS[name]
    params, x = drawn(config, 95, 101)
    whole = x[..., 0].size * np.prod(config.key_grid(95, 101)) * x.itemsize
    block = query_rows._QUERIES * query_rows._KEYS * x.itemsize
    tracemalloc.start()
    try:
        attention_rows(config, params, x, [(94, 2), (0, 100)])
        relative_change(config, params, x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 1.25 * block + 12 * x.nbytes
    assert peak < whole / 3
