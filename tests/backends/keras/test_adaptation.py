"""What Keras does to a finished layer: low-rank adaptation, quantization, masks. Where it does nothing, it says so."""

import keras
import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, spec
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_keras import SelfAttention2D, from_canonical, to_canonical
from tests.support import OUTPUT, assert_near, to_numpy, wide

CONFIG = SelfAttentionConfig(11, 3, 6, out_projection=True)
GIVEN = inputs(Case("adaptation", "forward", "", CONFIG, (2, 5, 7)), "float32")


def specified(params, x=GIVEN.x):
    return spec.forward(CONFIG, wide(params), wide(x))


def assert_right(y, want):
    assert_near(to_numpy(y), want, OUTPUT)


def adapted():
    """A layer of which query and out have a low-rank part that is not zero."""
    layer = from_canonical(CONFIG, GIVEN.params, data_format="channels_last")
    generator = np.random.default_rng(4)
    for child in (layer.query, layer.out):
        child.enable_lora(2)
        for variable in (child.lora_kernel_a, child.lora_kernel_b):
            variable.assign(generator.standard_normal(variable.shape))
    return layer


def test_low_rank_adaptation_is_used_and_exported():
    layer = adapted()
    merged = to_canonical(layer)
    for name in ("query.kernel", "out.kernel"):
        child = getattr(layer, name.partition(".")[0])
        update = to_numpy(child.lora_kernel_a)[0, 0] @ to_numpy(child.lora_kernel_b)
        np.testing.assert_allclose(merged[name], GIVEN.params[name] + update, rtol=1e-5, atol=1e-5)
    assert_right(layer(GIVEN.x), specified(merged))
    assert np.abs(specified(merged) - specified(GIVEN.params)).max() > 0.1


def test_low_rank_adaptation_trains_the_low_rank_part_alone():
    layer = adapted()
    x = keras.Input((None, None, 11))
    model = keras.Model(x, layer(x))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    frozen, low_rank = to_numpy(layer.query._kernel), to_numpy(layer.query.lora_kernel_b)
    model.fit(GIVEN.x, GIVEN.dy, verbose=0)
    np.testing.assert_array_equal(to_numpy(layer.query._kernel), frozen)
    assert not np.array_equal(to_numpy(layer.query.lora_kernel_b), low_rank)


def test_a_saved_model_has_the_low_rank_part_in_its_kernels(tmp_path):
    layer = adapted()
    x = keras.Input((None, None, 11))
    model = keras.Model(x, layer(x))
    model.save_weights(tmp_path / "model.weights.h5")
    plain = SelfAttention2D.from_spec(CONFIG, data_format="channels_last")
    twin = keras.Model(x, plain(x))
    twin.load_weights(tmp_path / "model.weights.h5")
    for name, array in to_canonical(layer).items():
        np.testing.assert_array_equal(to_canonical(plain)[name], array)


def test_int8_quantizes_dense_layers_only_and_says_so():
    layer = from_canonical(CONFIG, GIVEN.params, data_format="channels_last")
    x = keras.Input((None, None, 11))
    dense = keras.layers.Dense(11)
    model = keras.Model(x, dense(layer(x)))
    with pytest.warns(UserWarning, match="quantize") as warned:
        model.quantize("int8")
    assert len([warning for warning in warned if "Projection" in str(warning.message)]) == 4
    assert dense.quantization_mode == "int8"
    for name, array in to_canonical(layer).items():
        np.testing.assert_array_equal(array, GIVEN.params[name])
    assert_right(layer(GIVEN.x), specified(GIVEN.params))
    with pytest.raises(NotImplementedError, match="quantize"):
        layer.quantize("int8")


def test_a_mask_is_not_used_and_keras_says_so():
    layer = from_canonical(CONFIG, GIVEN.params, data_format="channels_last")
    x = keras.Input((None, None, 11))
    masked = keras.layers.Masking(mask_value=0.0)(x)
    with pytest.warns(UserWarning, match="does not support masking and will therefore destroy the mask"):
        y = layer(masked)
    assert getattr(y, "_keras_mask", None) is None
    with pytest.warns(UserWarning, match="does not support masking and will therefore destroy the mask"):
        got = keras.Model(x, y)(GIVEN.x)
    assert_right(got, specified(GIVEN.params))
    with pytest.raises(TypeError, match="mask"):
        layer(GIVEN.x, mask=np.ones((2, 5, 7), bool))


def test_the_map_of_a_finished_model():
    """Keras' models drop keywords that they do not know: give the layer what it gets in the model."""
    x = keras.Input((None, None, 11))
    layer = from_canonical(CONFIG, GIVEN.params, data_format="channels_last")
    model = keras.Model(x, layer(keras.layers.ReLU()(x)))
    assert_right(
        model(GIVEN.x, return_attention_scores=True), specified(GIVEN.params, np.maximum(GIVEN.x, 0))
    )
    features = keras.Model(model.input, layer.input)(GIVEN.x)
    _, A = layer(features, return_attention_scores=True)
    exact = wide(GIVEN.params)
    assert_right(A, spec.attention_map(CONFIG, exact, np.float64(np.maximum(GIVEN.x, 0))))
