"""Training the layer in every way that Keras trains: compiled, in mixed precision, with penalties and constraints."""

import functools

import keras
import numpy as np

from selfattn_core import SelfAttentionConfig
from selfattn_keras import SelfAttention2D, to_canonical
from tests.support import to_numpy

FRAMEWORK = keras.backend.backend()


def data():
    """Images of H ≠ W, and whether each is bright."""
    x = np.random.default_rng(0).standard_normal((12, 6, 8, 1)).astype("float32")
    return x, (x.mean((1, 2, 3)) > 0).astype("int32")


@keras.saving.register_keras_serializable("selfattn_checks")
class Subclass(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        common = {"dtype": self.dtype_policy}
        self.stem = keras.layers.Conv2D(9, 3, activation="relu", data_format="channels_last", **common)
        self.attention = SelfAttention2D(2, data_format="channels_last", **common)
        self.pool = keras.layers.GlobalAveragePooling2D(data_format="channels_last", **common)
        self.head = keras.layers.Dense(2, **common)

    def call(self, x, *, return_attention_scores=False):
        maps = self.stem(x)
        if not return_attention_scores:
            return self.head(self.pool(self.attention(maps)))
        y, A = self.attention(maps, return_attention_scores=True)
        return self.head(self.pool(y)), A


def functional(attention):
    x = keras.Input((None, None, 1))
    maps = keras.layers.Conv2D(9, 3, activation="relu", data_format="channels_last")(x)
    pooled = keras.layers.GlobalAveragePooling2D(data_format="channels_last")(attention(maps))
    return keras.Model(x, keras.layers.Dense(2)(pooled))


def compiled(model, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss, **options)
    return model


def assert_trained(layer, before):
    after = to_canonical(layer)
    assert abs(after["gamma"][0]) > 0.01
    for name, array in after.items():
        assert np.isfinite(array).all(), name
        if name != "key.bias":
            assert not np.array_equal(array, before[name]), name


def test_a_subclassed_model_trains_in_float16_gives_its_map_and_is_saved(tmp_path):
    keras.utils.set_random_seed(0)
    x, labels = data()
    model = Subclass(dtype="mixed_float16")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05)), loss)
    model(x)
    before = to_canonical(model.attention)
    model.fit(x, labels, batch_size=6, epochs=2, verbose=0)
    assert_trained(model.attention, before)
    _, A = model(x, return_attention_scores=True)
    assert tuple(A.shape) == (12, 24, 24)
    assert keras.backend.standardize_dtype(A.dtype) == "float16"
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_compiled_training_in_mixed_bfloat16(monkeypatch):
    if FRAMEWORK == "torch":
        import torch

        # PyTorch's compiler, less the code that it would write in C++: what a layer can break is the trace.
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    keras.utils.set_random_seed(0)
    layer = SelfAttention2D(
        2, 5, out_projection=True, kv_pool=2, dtype="mixed_bfloat16", data_format="channels_last"
    )
    model = keras.Sequential([keras.Input((6, 8, 9)), layer])
    model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=True)
    before = to_canonical(layer)
    x, y = np.random.default_rng(0).standard_normal((2, 4, 6, 8, 9)).astype("float32")
    model.fit(x, y, batch_size=2, epochs=2, verbose=0)
    assert {variable.dtype for variable in layer.variables} == {"float32"}
    assert_trained(layer, before)


def test_penalties_count_and_constraints_hold():
    keras.utils.set_random_seed(0)
    x, labels = data()
    layer = SelfAttention2D(
        2,
        data_format="channels_last",
        gamma_initializer=keras.initializers.Constant(0.5),
        kernel_regularizer=keras.regularizers.L2(0.25),
        gamma_regularizer=keras.regularizers.L1(2.0),
        kernel_constraint=keras.constraints.MaxNorm(0.5, axis=[0, 1, 2]),
        gamma_constraint=keras.constraints.NonNeg(),
    )
    model = compiled(functional(layer))
    params = to_canonical(layer)
    kernels = ("query.kernel", "key.kernel", "value.kernel")
    want = 0.25 * sum(np.square(params[name]).sum() for name in kernels) + 2.0 * 0.5
    np.testing.assert_allclose(sum(to_numpy(loss) for loss in layer.losses), want, rtol=1e-6)
    penalised = model.evaluate(x, labels, verbose=0)
    logits = to_numpy(model(x)).astype("float64")
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(penalised, want - logits[np.arange(12), labels].mean(), rtol=1e-5)
    model.fit(x, labels, batch_size=6, epochs=12, verbose=0)
    params = to_canonical(layer)
    for name in kernels:
        assert np.linalg.norm(params[name], axis=0).max() <= 0.5 * (1 + 1e-6), name
    # The penalty drives gamma below zero, and the constraint does not let it.
    assert params["gamma"] == 0


def test_a_layer_used_twice_has_one_set_of_weights():
    layer = SelfAttention2D(2, data_format="channels_last")
    one, other = keras.Input((None, None, 9)), keras.Input((4, 6, 9))
    model = keras.Model([one, other], [layer(one), layer(layer(other))])
    assert len(model.weights) == len(layer.weights) == 7


def test_more_leading_axes_through_time_distributed():
    layer = SelfAttention2D.from_spec(SelfAttentionConfig(9, 2), data_format="channels_last")
    layer.gamma.assign([0.7])
    x = np.random.default_rng(3).standard_normal((2, 3, 4, 5, 9)).astype("float32")
    y = keras.layers.TimeDistributed(layer)(x)
    want = layer(x.reshape(6, 4, 5, 9))
    np.testing.assert_allclose(to_numpy(y), to_numpy(want).reshape(x.shape), rtol=1e-5, atol=1e-5)
