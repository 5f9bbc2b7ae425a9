"""`selfattn_keras.convert`: models of somebody else's with our layer in the place of theirs, on one backend of Keras."""

import random

import keras
import numpy as np
import pytest
from keras import layers, ops

from selfattn_core.porting.networks.conversion import ConversionError
from selfattn_keras import SelfAttention2D, SelfAttention2DWithMap, convert
from tests.porting.keras.foreign import (
    DENSE,
    EPS,
    FRAMEWORK,
    Book,
    Dense,
    Flat,
    Generator,
    Normalised,
    Small,
    Stopped,
    arrays,
    assert_same_function,
    assert_untouched,
    functional,
    image,
    output,
    shaken,
)


def test_a_functional_model_with_everything():
    old = functional()
    x = {"picture": image(2, 5, 4, 3), "label": image(2, 4)}
    before = arrays(old)
    state = random.getstate()
    report = convert(old, dialect="keras", match=Flat)
    assert random.getstate() == state
    new = report.model
    assert report.passed
    assert [(each.names, each.was, each.returns_map) for each in report.layers] == [
        (("attention",), "Flat", False),
        (("trunk/inner",), "Flat", False),
        (("pair",), "Flat", True),
        (("block/attention",), "Flat", False),
    ]
    for layer in report.layers:
        for errors in (layer.old, layer.new):
            assert {"y", "x", "query.kernel", "key.bias", "value.kernel", "gamma"} <= set(errors)
            assert max(errors.values()) <= 8
        assert ("map" in layer.old) == layer.returns_map
    assert_same_function(old, new, x)
    assert_untouched(old, before)
    assert type(new) is type(old)
    assert new.name == "whole"
    assert [each.name for each in new.layers] == [each.name for each in old.layers]
    assert [type(new.get_layer(name)) for name in ("attention", "pair")] == [
        SelfAttention2D,
        SelfAttention2DWithMap,
    ]
    assert type(new.get_layer("trunk").layers[0]) is SelfAttention2D
    assert type(new.get_layer("block").attention) is SelfAttention2D
    flags = {each.path: each.trainable for each in old.variables}
    others = [each for each in new.variables if each.path in flags]
    assert len(others) >= 14
    assert all(each.trainable == flags[each.path] for each in others)
    assert not new.get_layer("frozen").trainable
    assert not {id(each) for each in new.variables} & {id(each) for each in old.variables}
    assert not {id(each) for each in new._flatten_layers()} & {id(each) for each in old._flatten_layers()}


def test_the_copy_is_trained_and_the_old_model_stays():
    frozen = layers.Conv2D(16, 1, name="frozen", trainable=False)
    half = layers.Conv2D(16, 1, name="half")
    old = shaken(keras.Sequential([keras.Input((5, 4, 16)), frozen, Flat(16), half]))
    half.bias.trainable = False
    old.compile("sgd", "mse")
    report = convert(old, dialect="keras", match=Flat)
    assert "compile" in report.layers[0].notes[-1]
    assert old.compiled
    new = report.model
    assert not new.compiled
    before = arrays(old)
    start = dict(arrays(new))
    new.compile(keras.optimizers.SGD(1e-2), "mse")
    new.fit(image(4, 5, 4, 16), np.zeros((4, 5, 4, 16)), verbose=0)
    assert_untouched(old, before)
    moved = {each.path for each in new.variables if (ops.convert_to_numpy(each) != start[each.path]).any()}
    trained = {each.path for each in new.trainable_variables}
    assert len(trained) == 8
    assert moved >= {path for path in trained if "key/bias" not in path}
    assert not {path for path in moved if "frozen" in path or path == "half/bias"}


def test_what_is_built_for_one_size_is_found_by_its_keys():
    old = shaken(keras.Sequential([keras.Input((6, 4, 3)), layers.Conv2D(16, 1), Book(16, name="book")]))
    report = convert(old, dialect="keras-book")
    (layer,) = report.layers
    assert layer.names == ("book",)
    assert layer.config["kv_pool"] == 2
    assert layer.config["out_projection"]
    assert "6×4" in layer.notes[0]
    assert_same_function(old, report.model, image(2, 6, 4, 3))
    assert report.model.name == old.name


def test_a_dialect_of_ones_own(tmp_path):
    file = tmp_path / "dense.toml"
    file.write_text(DENSE, encoding="utf-8")
    old = shaken(keras.Sequential([keras.Input((5, 4, 8)), Dense(8)]))
    report = convert(old, dialect=str(file), match=Dense)
    assert {"query.kernel", "gamma"} <= set(report.layers[0].old)
    assert_same_function(old, report.model, image(3, 5, 4, 8))


@pytest.mark.parametrize("inplace", [False, True])
def test_attributes(inplace):
    old = Generator(16)
    old(image(1, 5, 4, 3))
    shaken(old)
    old.named["norm"].trainable = False
    old.stages[2][0].query.trainable = False
    x = image(2, 5, 4, 3)
    want = output(old, x)
    before = arrays(old)
    inside = {
        id(one) for each in old._flatten_layers() if isinstance(each, Flat) for one in each._flatten_layers()
    }
    kept = [id(each) for each in old._flatten_layers() if id(each) not in inside]
    report = convert(old, dialect="keras", match=Flat, inplace=inplace)
    new = report.model
    assert (new is old) == inplace
    assert [each.names for each in report.layers] == [
        ("stages/1", "named/again"),
        ("stages/2/0",),
        ("several/0",),
        ("_last",),
    ]
    assert new.stages[1] is new.named["again"]
    assert isinstance(new.several, tuple)
    assert [type(each) for each in (new.stages[1], new.stages[2][0], new.several[0], new._last)] == [
        SelfAttention2D,
        SelfAttention2D,
        SelfAttention2DWithMap,
        SelfAttention2D,
    ]
    ours = [each.name for each in new._flatten_layers() if isinstance(each, SelfAttention2D)]
    assert sorted(ours) == ["a", "b", "c", "d"]
    assert not any(isinstance(each, Flat) for each in new._flatten_layers())
    assert not new.named["norm"].trainable
    assert not new.stages[2][0].query.kernel.trainable
    assert new.stages[2][0].key.kernel.trainable
    if inplace:
        assert kept == [id(each) for each in new._flatten_layers() if id(each) in set(kept)]
        got = output(new, x)
        twin = Generator(16)
        twin(x)
        for variable, (_, array) in zip(twin.variables, before, strict=True):
            variable.assign(array)
        assert_same_function(twin, new, x)
    else:
        assert_untouched(old, before)
        assert_same_function(old, new, x)
        got = output(new, x)
    assert np.abs(got[0] - want[0]).max() < 1e-3 * np.abs(want[0]).max()
    if FRAMEWORK == "torch":
        mine = {id(each) for each in new.parameters()}
        assert mine == {id(each.value) for each in new.variables}


def test_a_model_replaced_in_place_forgets_what_was_compiled_and_can_be_saved(tmp_path):
    x, wanted = image(2, 5, 4, 16), np.zeros((2, 5, 4, 16))
    old = Small()
    old.compile("sgd", "mse")
    old.fit(x, wanted, verbose=0)
    shaken(old)
    first = old.predict(x, verbose=0)
    report = convert(old, dialect="keras", match=Flat, inplace=True)
    assert "compile" in report.layers[0].notes[-1]
    assert not old.compiled
    assert old.optimizer is None
    old.attention.gamma.assign([0.0])
    np.testing.assert_array_equal(old.predict(x, verbose=0), x)
    assert np.abs(first - x).max() > 1e-2
    old.compile("sgd", "mse")
    old.fit(x, wanted, verbose=0)
    assert (ops.convert_to_numpy(old.attention.gamma) != 0).all()
    old.save_weights(tmp_path / "model.weights.h5")
    again = Small()
    again(x)
    convert(again, dialect="keras", match=Flat, inplace=True)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(output(again, x)[0], output(old, x)[0])


def test_a_converted_model_goes_through_a_file(tmp_path):
    old = shaken(keras.Sequential([keras.Input((5, 4, 16)), Flat(16, pair=False, name="a")]))
    new = convert(old, dialect="keras", match="a").model
    new.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    x = image(2, 5, 4, 16)
    np.testing.assert_array_equal(output(again, x)[0], output(new, x)[0])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float64"])
def test_dtype_policies(policy):
    if policy == "float64" and FRAMEWORK != "tensorflow":
        pytest.skip(
            "JAX has no float64 unless it is told to, and Keras multiplies matrices of it in float32 on torch"
        )
    old = Flat(16, dtype=policy, name="a")
    old(ops.zeros((1, 5, 4, 16), old.compute_dtype))
    shaken(old)
    before = vars(old).copy()
    report = convert(old, dialect="keras", match=Flat)
    new = report.model
    assert new.name == "a"
    assert new.dtype_policy.name == policy
    assert old.dtype_policy.name == old.query.dtype_policy.name == policy
    assert vars(old) == before
    assert new.gamma.dtype == old.gamma.dtype
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(getattr(new, name).kernel), ops.convert_to_numpy(getattr(old, name).kernel)
        )
    x = ops.cast(image(2, 5, 4, 16), old.compute_dtype)
    assert keras.backend.standardize_dtype(new(x).dtype) == old.compute_dtype


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_data_formats(data_format):
    if data_format == "channels_first" and FRAMEWORK == "tensorflow":
        pytest.skip("a Conv2D of Keras does not run like this on TensorFlow's CPU")
    old = Flat(16, data_format=data_format, pair=True)
    shape = (2, 16, 5, 4) if data_format == "channels_first" else (2, 5, 4, 16)
    old(ops.zeros(shape))
    shaken(old)
    new = convert(old, dialect="keras", match=Flat).model
    assert new.data_format == data_format
    assert_same_function(old, new, image(*shape))
    single = convert(old, dialect="keras", match=Flat, returns="output")
    assert "change its callers" in " ".join(single.layers[0].notes)
    assert not isinstance(single.model(image(*shape)), tuple)


def test_a_dry_run_replaces_nothing():
    old = Generator(16)
    old(image(1, 5, 4, 3))
    held = old._flatten_layers()
    report = convert(old, dialect="keras", match=Flat, inplace=True, dry_run=True)
    assert report.model is None
    assert len(report.layers) == 4
    assert old._flatten_layers() == held
    assert "would be replaced" in str(report)


NORMALISED = """
[[kernels]]
axes = "HWIO"
kernel = "{path}/layer/kernel"
bias = "{path}/layer/bias"
ignore = ["{path}/vars/0", "{path}/vars/1"]
"""


def test_kernels_that_a_wrapper_of_keras_normalised(tmp_path):
    file = tmp_path / "normalised.toml"
    head = DENSE.partition("[[kernels]]")[0].replace("use_bias = false", "use_bias = true")
    for number, name in enumerate(("query", "key", "value")):
        head = head.replace(f"vars/{number}", name)
    only = '[[variants]]\nname = "only"\n'
    file.write_text(head.replace("vars/3", "gamma") + NORMALISED + only, encoding="utf-8")
    old = Normalised(16)
    old(image(1, 5, 4, 16), training=True)
    old.gamma.assign([0.7])
    new = convert(old, dialect=str(file), match=Flat, keep_spectral_norm=False).model
    x = image(2, 5, 4, 16)
    np.testing.assert_allclose(output(new, x)[0], output(old, x)[0], rtol=0, atol=32 * EPS * np.abs(x).max())


def test_gradients_are_compared_too():
    old = shaken(keras.Sequential([keras.Input((5, 4, 16)), Stopped(16, name="stopped")]))
    with pytest.raises(ConversionError) as caught:
        convert(old, dialect="keras", match=Flat)
    failures = caught.value.report.layers[0].failures
    assert failures
    assert all("key.kernel" in failure and " y " not in failure for failure in failures)


def test_inputs_stay_what_they_are():
    picture = keras.Input((5, 4, 16), optional=True)
    old = keras.Model(picture, Flat(16)(picture))
    new = convert(old, dialect="keras").model
    assert [each.name for each in new.layers] == [each.name for each in old.layers]
    assert new.layers[0].optional
