"""The grid of the map, in the adapters that share a process; Keras' is checked in `keras/test_maps.py`."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import selfattn_flax
import selfattn_torch
from selfattn_core import spec
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.verdicts.expected import expect
from selfattn_core.conformance.verdicts.tolerance import judge
from selfattn_flax import linen

# 5×7 positions of 2 samples: without pooling, pooled by 2 with a row and a column left over, pooled by 3.
GRIDS = [case for case in CASES if case.id in ("SA-MAP-001", "SA-MAP-002", "SA-MAP-007")]


def torch_grid(config, params, x):
    layer = selfattn_torch.from_canonical(config, params)
    return selfattn_torch.attention_grid(layer, torch.from_numpy(np.moveaxis(x, -1, -3))).detach()


def nnx_grid(config, params, x):
    return selfattn_flax.attention_grid(selfattn_flax.from_canonical(config, params), jnp.asarray(x))


def linen_grid(config, params, x):
    return linen.attention_grid(*linen.from_canonical(config, params), jnp.asarray(x))


ADAPTERS = pytest.mark.parametrize("grid_of", [torch_grid, nnx_grid, linen_grid])


@ADAPTERS
@pytest.mark.parametrize("case", GRIDS, ids=lambda case: case.id)
def test_each_position_has_the_grid_that_the_spec_gives_it(grid_of, case):
    given = inputs(case, "float32")
    batch, height, width = case.shape
    down, across = case.config.key_grid(height, width)
    grid = np.asarray(grid_of(case.config, given.params, given.x))
    assert grid.shape == (batch, height, width, down, across)
    # By position, not by a second reshape: row h·W + w, column h'·W' + w'.
    flat = np.empty((batch, height * width, down * across), grid.dtype)
    for h, w in np.ndindex(height, width):
        for row, column in np.ndindex(down, across):
            flat[:, h * width + w, row * across + column] = grid[:, h, w, row, column]
    wanted = expect(case, "float32")["map"]
    assert judge("map", flat, wanted, "float32").passed


@ADAPTERS
def test_without_a_batch_axis(grid_of):
    case = GRIDS[1]
    given = inputs(case, "float32")
    alone = np.asarray(grid_of(case.config, given.params, given.x[1]))
    assert alone.shape == (5, 7, 2, 3)
    together = np.asarray(grid_of(case.config, given.params, given.x))[1]
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-7)


@ADAPTERS
def test_an_empty_batch_has_an_empty_grid(grid_of):
    case = GRIDS[1]
    given = inputs(case, "float32")
    assert grid_of(case.config, given.params, given.x[:0]).shape == (0, 5, 7, 2, 3)


@pytest.mark.parametrize("grid_of", [nnx_grid, linen_grid])
def test_further_leading_axes(grid_of):
    case = GRIDS[0]
    given = inputs(case, "float32")
    stacked = np.stack([given.x, -given.x, 2 * given.x])
    grid = np.asarray(grid_of(case.config, given.params, stacked))
    assert grid.shape == (3, 2, 5, 7, 5, 7)
    np.testing.assert_allclose(
        grid[2].reshape(2, 35, 35), spec.attention_map(case.config, given.params, stacked[2]), atol=1e-5
    )


def test_nothing_stays_sown():
    case = GRIDS[0]
    given = inputs(case, "float32")
    layer = selfattn_flax.from_canonical(case.config, given.params)
    selfattn_flax.attention_grid(layer, jnp.asarray(given.x))
    assert not hasattr(layer, "attention_weights")


def test_the_grid_can_be_differentiated():
    case = GRIDS[1]
    given = inputs(case, "float32")
    layer = selfattn_torch.from_canonical(case.config, given.params)
    x = torch.from_numpy(np.moveaxis(given.x, -1, -3)).requires_grad_()
    selfattn_torch.attention_grid(layer, x)[0, 4, 6, 1, 2].backward()
    assert x.grad[0].any()
    assert not x.grad[1].any()
