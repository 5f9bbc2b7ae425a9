"""The grid of the map on Keras, in both data formats; other adapters' is tested in `test_maps.py`."""

import keras
import numpy as np
import pytest

from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.verdicts.expected import expect
from selfattn_core.conformance.verdicts.tolerance import judge
from selfattn_keras import SelfAttention2D, attention_grid, from_canonical

LAYOUTS = {"channels_last": (0, 1, 2, 3), "channels_first": (0, 3, 1, 2)}


# 5×7 positions of 2 samples, without pooling and pooled by 2 with a row and a column left over.
@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("SA-MAP-001", "SA-MAP-002")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_position_has_the_grid_that_the_spec_gives_it(case, layout):
    given = inputs(case, "float32")
    batch, height, width = case.shape
    down, across = case.config.key_grid(height, width)
    layer = from_canonical(case.config, given.params, data_format=layout)
    grid = keras.ops.convert_to_numpy(attention_grid(layer, given.x.transpose(LAYOUTS[layout])))
    assert grid.shape == (batch, height, width, down, across)
    flat = np.empty((batch, height * width, down * across), grid.dtype)
    for h, w in np.ndindex(height, width):
        for row, column in np.ndindex(down, across):
            flat[:, h * width + w, row * across + column] = grid[:, h, w, row, column]
    assert judge("map", flat, expect(case, "float32")["map"], "float32").passed


def test_a_layer_that_is_not_built_yet_and_an_empty_batch():
    layer = SelfAttention2D(kv_pool=2, data_format="channels_first")
    assert tuple(attention_grid(layer, np.zeros((0, 16, 5, 7), "float32")).shape) == (0, 5, 7, 2, 3)


class GridOf(keras.layers.Layer):
    """A layer that looks at the map of another."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return attention_grid(self.layer, x)


def test_the_state_of_spectral_norm_stays_inside_a_training_call_too():
    layer = SelfAttention2D(2, spectral_norm=True, data_format="channels_last")
    x = np.random.default_rng(0).standard_normal((2, 5, 7, 16)).astype("float32")
    layer.build(x.shape)
    before = [keras.ops.convert_to_numpy(weight) for weight in layer.weights]
    GridOf(layer)(x, training=True)
    for weight, kept in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), kept)
