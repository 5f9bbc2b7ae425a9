"""What a Keras user expects of a layer: configuration, building, saving, policies, training."""

import inspect
import random

import keras
import numpy as np
import pytest

import selfattn_keras
from selfattn_core import SelfAttentionConfig, init_params, parameter_table, spec
from selfattn_keras import SelfAttention2D, from_canonical, to_canonical
from tests.support import OUTPUT, POOLED, assert_near, to_numpy, wide

FRAMEWORK = keras.backend.backend()
EPS = float(np.finfo("float32").eps)


def moved(config, seed=0):
    """Parameters away from their initial values, float32."""
    generator = np.random.default_rng(seed)
    table = parameter_table(config)
    params = {name: generator.standard_normal(row.shape).astype("float32") for name, row in table.items()}
    return params | {"gamma": np.array([0.7], "float32")}


def test_signature():
    expected = (
        "(qk_channels: int | None = None, value_channels: int | None = None, *, out_projection: bool = False, "
        "use_bias: bool = True, kv_pool: int = 1, spectral_norm: bool = False, block_size: int | None = None, "
        "data_format: str | None = None, "
        "kernel_initializer: Any = 'glorot_uniform', bias_initializer: Any = 'zeros', gamma_initializer: Any = 'zeros', "
        "kernel_regularizer: Any = None, bias_regularizer: Any = None, gamma_regularizer: Any = None, "
        "kernel_constraint: Any = None, bias_constraint: Any = None, gamma_constraint: Any = None, **kwargs: Any)"
    )
    signature = str(inspect.signature(SelfAttention2D.__init__)).replace("typing.", "")
    assert signature == expected.replace("(qk", "(self, qk") + " -> None"
    assert selfattn_keras.__all__ == [
        "SelfAttention2D",
        "SelfAttention2DWithMap",
        "__version__",
        "attention_grid",
        "convert",
        "from_canonical",
        "load",
        "refresh_spectral_norm",
        "save",
        "to_canonical",
    ]
    layer_options = list(inspect.signature(SelfAttention2D).parameters)[6:]
    assert list(inspect.signature(SelfAttention2D.from_spec).parameters) == ["config", *layer_options]


EVERY_OPTION = {
    "qk_channels": 3,
    "value_channels": 5,
    "out_projection": True,
    "use_bias": False,
    "kv_pool": 2,
    "spectral_norm": True,
    "block_size": 6,
    "data_format": "channels_first",
    "kernel_initializer": keras.initializers.HeNormal(seed=3),
    "bias_initializer": keras.initializers.Constant(0.25),
    "gamma_initializer": keras.initializers.Constant(0.5),
    "kernel_regularizer": keras.regularizers.L2(0.125),
    "bias_regularizer": keras.regularizers.L1(0.25),
    "gamma_regularizer": keras.regularizers.L2(0.5),
    "kernel_constraint": keras.constraints.MaxNorm(2),
    "bias_constraint": keras.constraints.NonNeg(),
    "gamma_constraint": keras.constraints.MaxNorm(3),
    "name": "attention",
    "dtype": "mixed_bfloat16",
    "trainable": False,
}


def test_every_argument_goes_round_through_the_configuration():
    named = set(inspect.signature(SelfAttention2D).parameters) - {"kwargs"}
    assert named <= set(EVERY_OPTION)
    layer = SelfAttention2D(**EVERY_OPTION)
    config = layer.get_config()
    again = SelfAttention2D.from_config(config)
    assert again.get_config() == config
    assert set(config) == set(EVERY_OPTION)
    default = SelfAttention2D().get_config()
    unchanged = [name for name in EVERY_OPTION if config[name] == default[name]]
    assert unchanged == []
    plain = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert plain.get_config() == config


def test_registered_name():
    assert keras.saving.get_registered_name(SelfAttention2D) == "selfattn>SelfAttention2D"
    assert keras.saving.get_registered_object("selfattn>SelfAttention2D") is SelfAttention2D


def test_options_reach_the_children_and_gamma():
    layer = SelfAttention2D(**EVERY_OPTION | {"use_bias": True, "trainable": True})
    layer.build((None, 11, 6, 6))
    for child in (layer.query, layer.key, layer.value, layer.out):
        assert isinstance(child, keras.layers.Conv2D)
        assert child.dtype_policy == layer.dtype_policy
        assert child.kernel_regularizer.l2 == np.float32(0.125)
        assert child.bias_regularizer.l1 == np.float32(0.25)
        assert child.kernel_constraint.max_value == 2
        assert isinstance(child.bias_constraint, keras.constraints.NonNeg)
        np.testing.assert_array_equal(to_numpy(child.bias), np.full(child.bias.shape, 0.25))
        for option in ("kernel_initializer", "bias_initializer", "kernel_regularizer", "kernel_constraint"):
            assert getattr(child, option) is not getattr(layer, option)
    np.testing.assert_array_equal(to_numpy(layer.gamma), [0.5])
    assert layer.gamma.regularizer.l2 == np.float32(0.5)
    assert layer.gamma.constraint.max_value == 3
    assert len(layer.losses) == 9
    assert layer.input_spec.ndim == 4
    assert layer.input_spec.axes == {1: 11}
    assert layer.supports_masking is False


def test_from_spec_is_built_and_has_the_config():
    layer = SelfAttention2D.from_spec(POOLED, data_format="channels_first", block_size=7, name="here")
    assert layer.built
    assert layer.config == POOLED
    assert (layer.block_size, layer.data_format, layer.name) == (7, "channels_first", "here")
    flat = SelfAttention2D.from_spec(SelfAttentionConfig(16))
    assert flat.config == SelfAttentionConfig(16)


def test_new_layers_have_the_initial_values_of_the_family():
    config = SelfAttentionConfig(512, 64, 256, out_projection=True)
    keras.utils.set_random_seed(7)
    params = to_canonical(SelfAttention2D.from_spec(config))
    kernels = []
    for name, row in parameter_table(config).items():
        assert params[name].dtype == np.float32
        if row.initial == "zeros":
            assert not params[name].any(), name
        else:
            limit = np.sqrt(6 / sum(row.shape))
            assert np.abs(params[name]).max() <= limit * (1 + EPS), name
            np.testing.assert_allclose(params[name].std(), limit / np.sqrt(3), rtol=0.01, err_msg=name)
            assert abs(params[name].mean()) < 0.02 * limit, name
            kernels.append(params[name].ravel()[:1000])
    correlations = np.corrcoef(kernels) - np.eye(4)
    assert np.abs(correlations).max() < 0.15
    keras.utils.set_random_seed(7)
    again = to_canonical(SelfAttention2D.from_spec(config))
    for name in params:
        np.testing.assert_array_equal(again[name], params[name])
    another = to_canonical(SelfAttention2D.from_spec(config))
    assert not np.array_equal(another["query.kernel"], params["query.kernel"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: "glorot_uniform",
        keras.initializers.GlorotUniform,
        lambda: keras.initializers.GlorotUniform(seed=1),
        lambda: keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(1)),
    ],
    ids=["by name", "unseeded", "seeded", "seed generator"],
)
def test_query_and_key_never_start_equal(make):
    layer = SelfAttention2D(kernel_initializer=make(), data_format="channels_last")
    layer.build((None, None, None, 16))
    params = to_canonical(layer)
    assert not np.array_equal(params["query.kernel"], params["key.kernel"])
    correlation = np.corrcoef(params["query.kernel"].ravel(), params["key.kernel"].ravel())[0, 1]
    assert abs(correlation) < 0.6


def test_a_seed_makes_the_layer_reproducible():
    def kernels(seed):
        layer = SelfAttention2D.from_spec(
            SelfAttentionConfig(16), kernel_initializer=keras.initializers.GlorotUniform(seed=seed)
        )
        return to_canonical(layer)

    first, again, other = kernels(1), kernels(1), kernels(2)
    for name in ("query.kernel", "key.kernel", "value.kernel"):
        np.testing.assert_array_equal(again[name], first[name])
        assert not np.array_equal(other[name], first[name])
    assert not np.array_equal(other["query.kernel"], first["key.kernel"])


def test_a_function_may_be_an_initializer():
    layer = SelfAttention2D(kernel_initializer=lambda shape, dtype=None: keras.ops.ones(shape, dtype))
    layer.build((None, 8, 8, 8))
    assert (to_canonical(layer)["query.kernel"] == 1).all()


def test_shapes_are_known_before_anything_is_computed():
    layer = SelfAttention2D.from_spec(POOLED, data_format="channels_last")
    for shape, map_shape in (
        ((2, 5, 7, 11), (2, 35, 6)),
        ((None, 5, 7, 11), (None, 35, 6)),
        ((None, None, 7, 11), (None, None, None)),
        ((3, None, None, 11), (3, None, None)),
    ):
        y, A = layer(keras.KerasTensor(shape), return_attention_scores=True)
        assert (y.shape, A.shape) == (shape, map_shape)
        assert layer(keras.KerasTensor(shape)).shape == shape
        assert layer.compute_output_shape(shape) == shape
    first = SelfAttention2D.from_spec(POOLED, data_format="channels_first", dtype="mixed_float16")
    y, A = first(keras.KerasTensor((None, 11, 5, 7)), return_attention_scores=True)
    assert (y.shape, A.shape) == ((None, 11, 5, 7), (None, 35, 6))
    assert y.dtype == A.dtype == "float16"


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize("scores", [False, True], ids=["y", "y and A"])
def test_functional_model_of_unknown_sizes(layout, scores):
    params = moved(POOLED)
    layer = from_canonical(POOLED, params, data_format=layout)
    axes = (0, 1, 2, 3) if layout == "channels_last" else (0, 3, 1, 2)
    inputs = keras.Input((None, None, 11) if layout == "channels_last" else (11, None, None))
    model = keras.Model(inputs, layer(inputs, return_attention_scores=scores))
    for shape in ((3, 5, 7, 11), (2, 6, 4, 11)):
        x = np.random.default_rng(1).standard_normal(shape).astype("float32")
        outputs = model.predict(x.transpose(axes), verbose=0)
        y, A = outputs if scores else (outputs, None)
        want = spec.forward(POOLED, wide(params), wide(x))
        assert_near(y.transpose(np.argsort(axes)), want, OUTPUT)
        if A is not None:
            want = spec.attention_map(POOLED, wide(params), wide(x))
            assert_near(A, want, OUTPUT)


def small_model(attention):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu", data_format="channels_last"),
            attention,
            keras.layers.GlobalAveragePooling2D(data_format="channels_last"),
            keras.layers.Dense(2),
        ]
    )


def test_fit_moves_gamma_and_every_kernel():
    keras.utils.set_random_seed(0)
    attention = SelfAttention2D(data_format="channels_last")
    model = small_model(attention)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss)
    before = to_canonical(attention)
    x = np.random.default_rng(0).standard_normal((20, 8, 8, 1)).astype("float32")
    labels = (x.mean((1, 2, 3)) > 0).astype("int32")
    model.fit(x, labels, batch_size=8, epochs=2, verbose=0)
    after = to_canonical(attention)
    assert abs(after["gamma"][0]) > 0.01
    for name in before:
        if name != "key.bias":
            assert not np.array_equal(after[name], before[name]), name


def test_models_are_saved_exactly(tmp_path):
    attention = SelfAttention2D(value_channels=8, out_projection=True, kv_pool=2, data_format="channels_last")
    model = small_model(attention)
    for variable in attention.variables:
        variable.assign(np.random.default_rng(5).standard_normal(variable.shape))
    x = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype("float32")
    y = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    cloned = keras.models.clone_model(model)
    assert not np.array_equal(cloned.predict(x, verbose=0), y)
    cloned.load_weights(tmp_path / "model.weights.h5")
    want = to_canonical(attention)
    for twin in (loaded, cloned):
        assert type(twin.layers[1]) is SelfAttention2D
        assert twin.layers[1].config == attention.config
        got = to_canonical(twin.layers[1])
        for name, array in want.items():
            assert got[name].tobytes() == array.tobytes(), name
        np.testing.assert_array_equal(twin.predict(x, verbose=0), y)


def test_names_on_disk(tmp_path):
    """These names are the file format of every `.weights.h5` ever written: they must not change."""
    import h5py

    model = keras.Sequential([keras.Input((4, 4, 16)), SelfAttention2D(out_projection=True, name="mine")])
    model.save_weights(tmp_path / "model.weights.h5")
    found = {}
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(lambda name, item: found.update({name: item.shape} if hasattr(item, "shape") else {}))
    assert found == {
        "layers/self_attention2d/vars/0": (1,),
        **{
            f"layers/self_attention2d/{child}/vars/{index}": shape
            for child, width in (("query", 2), ("key", 2), ("value", 16), ("out", 16))
            for index, shape in enumerate([(1, 1, 16, width), (width,)])
        },
    }
    layer = SelfAttention2D.from_spec(SelfAttentionConfig(16, out_projection=True), name="mine")
    assert [variable.path for variable in layer.variables] == [
        "mine/gamma",
        *(
            f"mine/{child}/{part}"
            for child in ("query", "key", "value", "out")
            for part in ("kernel", "bias")
        ),
    ]


def test_float64_policy_is_float64_throughout():
    if FRAMEWORK == "jax":
        pytest.skip("this process has no 64 bits; test_layer.py runs where it has")
    layer = SelfAttention2D.from_spec(POOLED, dtype="float64", data_format="channels_last")
    y, A = layer(np.ones((1, 4, 4, 11)), return_attention_scores=True)
    assert {variable.dtype for variable in layer.variables} == {"float64"}
    assert keras.backend.standardize_dtype(y.dtype) == keras.backend.standardize_dtype(A.dtype) == "float64"


def test_children_can_be_replaced():
    """A child is called, not read: one of another kind takes its place."""
    layer = from_canonical(SelfAttentionConfig(8), moved(SelfAttentionConfig(8)), data_format="channels_last")
    calls = []
    original = layer.value.call
    layer.value.call = lambda maps: calls.append(tuple(maps.shape)) or original(maps)
    layer(np.ones((1, 2, 3, 8), "float32"))
    assert calls == [(1, 2, 3, 8)]


def test_low_rank_adaptation_of_a_child():
    config = SelfAttentionConfig(16)
    layer = from_canonical(config, init_params(config, seed=0), data_format="channels_last")
    layer.value.enable_lora(2)
    layer.value.lora_kernel_b.assign(np.ones(layer.value.lora_kernel_b.shape))
    merged = to_canonical(layer)["value.kernel"]
    assert merged.shape == (16, 16)
    assert not np.array_equal(merged, init_params(config, seed=0)["value.kernel"])


def test_summary():
    x = keras.Input((None, 7, 11))
    lines = []
    keras.Model(
        x, SelfAttention2D.from_spec(POOLED, data_format="channels_last", name="attention")(x)
    ).summary(print_fn=lambda text, **_: lines.append(text), line_length=100)
    text = "\n".join(lines)
    for words in ("attention (SelfAttention2D)", "(None, None, 7, 11)", "Total params: 177"):
        assert words in text, text


def test_no_fused_kernel_is_called(monkeypatch):
    """Those have no second derivative, or no map, or no room for narrow queries."""

    def fused(*arguments, **keywords):
        raise AssertionError("fused")

    monkeypatch.setattr(keras.ops, "dot_product_attention", fused)
    monkeypatch.setattr(keras.src.ops.nn, "dot_product_attention", fused)
    if FRAMEWORK == "torch":
        import torch

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    if FRAMEWORK == "jax":
        import jax

        monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    layer = SelfAttention2D.from_spec(POOLED, data_format="channels_last")
    x = np.ones((1, 4, 6, 11), "float32")
    assert np.isfinite(to_numpy(layer(x))).all()
    assert np.isfinite(to_numpy(layer(x, return_attention_scores=True)[1])).all()


PLAIN = {"qk_channels": 3}
REGULARIZED = {
    "qk_channels": 3,
    "value_channels": 5,
    "out_projection": True,
    "kv_pool": 2,
    "kernel_regularizer": "l2",
    "gamma_regularizer": "l2",
}


# Keras' own test gives `fit` a generator.
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed, but will be ignored:UserWarning")
@pytest.mark.parametrize(
    ("options", "layout", "scores"),
    [
        pytest.param(PLAIN, "channels_last", False, id="flat"),
        pytest.param(REGULARIZED, "channels_first", False, id="pooled, channels first"),
        pytest.param(PLAIN, "channels_first", True, id="flat with the map, channels first"),
        pytest.param(REGULARIZED, "channels_last", True, id="pooled with the map"),
    ],
)
def test_keras_own_layer_test(options, layout, scores):
    try:
        from keras.src.testing import TestCase
    except ImportError:
        pytest.skip("this Keras does not ship its private TestCase")
    state = random.getstate()
    try:
        shape = (2, 5, 7, 11) if layout == "channels_last" else (2, 11, 5, 7)
        keys = 35 if options.get("kv_pool", 1) == 1 else 6
        TestCase().run_layer_test(
            SelfAttention2D,
            init_kwargs=options | {"data_format": layout},
            input_shape=shape,
            call_kwargs={"return_attention_scores": True} if scores else {},
            expected_output_shape=(shape, (2, 35, keys)) if scores else shape,
            expected_output_dtype=("float32", "float32") if scores else "float32",
            expected_num_trainable_weights=9 if options is REGULARIZED else 7,
            expected_num_non_trainable_weights=0,
            expected_num_non_trainable_variables=0,
            expected_num_seed_generators=0,
            expected_num_losses=5 if options is REGULARIZED else 0,
            supports_masking=False,
            run_training_check=not scores,
            run_mixed_precision_check=True,
            assert_built_after_instantiation=False,
        )
    finally:
        random.setstate(state)
