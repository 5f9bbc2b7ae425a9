"""The Keras layer on eight devices of JAX, the one backend for which Keras 3.15 distributes."""

import keras
import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_keras import from_canonical, to_canonical

CONFIG = SelfAttentionConfig(12, 4, 6, out_projection=True, kv_pool=2)
GIVEN = inputs(Case("devices", "r1", "", CONFIG, (16, 5, 7)), "float32")


@pytest.fixture
def distributed():
    """Keras keeps the distribution for the whole process."""
    yield keras.distribution.set_distribution
    keras.distribution.set_distribution(None)


def trained():
    """Weights and outputs after three steps of one batch each, and the layer."""
    layer = from_canonical(CONFIG, GIVEN.params, data_format="channels_last")
    x = keras.Input((None, None, CONFIG.channels))
    model = keras.Model(x, layer(x))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(GIVEN.x, GIVEN.dy, batch_size=16, epochs=3, verbose=0)
    return to_canonical(layer), model.predict(GIVEN.x, batch_size=16, verbose=0), layer


def test_data_parallel_trains_as_one_device_does(distributed):
    params, y, _ = trained()
    devices = keras.distribution.list_devices("cpu")
    assert len(devices) == 8
    distributed(keras.distribution.DataParallel(devices=devices))
    got, got_y, layer = trained()
    assert len(layer.gamma.value.sharding.device_set) == 8
    for name, array in params.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
        if name != "key.bias":
            assert not np.array_equal(array, GIVEN.params[name])
    np.testing.assert_allclose(got_y, y, rtol=1e-5, atol=1e-5)


def test_model_parallel_over_output_channels(distributed):
    params, y, _ = trained()
    mesh = keras.distribution.DeviceMesh((4, 2), ["batch", "model"], keras.distribution.list_devices("cpu"))
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*value/kernel"] = (None, None, None, "model")
    distributed(keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
    got, got_y, layer = trained()
    assert {shard.data.shape for shard in layer.value.kernel.value.addressable_shards} == {(1, 1, 12, 3)}
    for name, array in params.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(got_y, y, rtol=1e-5, atol=1e-5)
