"""Reading gamma and a map while `fit` runs, and weights that Keras' optimiser averages."""

import keras
import numpy as np
import pytest

from selfattn_core.params import projections
from selfattn_keras import SelfAttention2D, to_canonical

FRAMEWORK = keras.backend.backend()
X = np.random.default_rng(0).standard_normal((12, 3, 4, 11)).astype("float32")


def model_of(optimizer):
    model = keras.Sequential(
        [
            keras.Input((3, 4, 11)),
            SelfAttention2D(
                3,
                spectral_norm=True,
                gamma_initializer="ones",
                name="attention",
                kernel_initializer=keras.initializers.GlorotUniform(seed=1),
            ),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1, kernel_initializer=keras.initializers.GlorotUniform(seed=2)),
        ]
    )
    model.compile(optimizer=optimizer, loss="mse")
    return model


def shortfall(layer):
    params = to_canonical(layer)
    return max(
        1
        - params[f"{name}.v"]
        @ params[f"{name}.kernel"]
        @ params[f"{name}.u"]
        / np.linalg.norm(params[f"{name}.kernel"], 2)
        for name in projections(layer.config)
    )


def test_gamma_and_the_map_are_read_through_the_model_and_averages_are_settled():
    keras.utils.set_random_seed(0)
    kept = []
    found = {"gamma": [], "map": [], "kept": []}

    class Log(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            try:
                found["kept"].append(float(keras.ops.convert_to_numpy(kept[0].gamma)[0]))
            except TypeError as error:
                found["kept"].append(str(error))
            layer = self.model.get_layer("attention")
            found["gamma"].append(float(keras.ops.convert_to_numpy(layer.gamma)[0]))
            found["map"].append(layer(X[:2], return_attention_scores=True)[1].shape)

    model = model_of(keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9))
    layer = model.get_layer("attention")
    kept.append(layer)
    generator = np.random.default_rng(3)
    for name in projections(layer.config):
        # A largest singular value well above the others: the iteration converges as fast as they are apart.
        kernel = getattr(layer, name).kernel
        spike = np.outer(*(generator.standard_normal(side) for side in kernel.shape[2:]))
        kernel.assign(keras.ops.convert_to_numpy(kernel) + 4 * (spike / np.linalg.norm(spike))[None, None])
    model.fit(X, X.std((1, 2, 3))[:, None], batch_size=2, epochs=3, verbose=0, callbacks=[Log()])
    assert len(set(found["gamma"])) == 18
    assert set(map(tuple, found["map"])) == {(2, 12, 12)}
    if FRAMEWORK == "jax":
        assert set(found["kept"]) == {"'NoneType' object is not callable"}
    else:
        assert found["kept"] == found["gamma"]

    assert len(model.optimizer._model_variables_moving_average) == len(model.trainable_variables)
    kernel = to_canonical(layer)["value.kernel"]
    assert shortfall(layer) > 1e-5
    for _ in range(50):
        model(X[:2], training=True)
    assert shortfall(layer) < 1e-6
    np.testing.assert_array_equal(to_canonical(layer)["value.kernel"], kernel)


@pytest.mark.parametrize("excluded", [False, True])
def test_gamma_is_excluded_from_decay_by_name(excluded):
    layer = SelfAttention2D(3, gamma_initializer="ones")
    layer.build((None, 3, 4, 11))
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    if excluded:
        optimizer.exclude_from_weight_decay(var_names=["gamma", "bias"])
    optimizer.build(layer.trainable_variables)
    zeros = [keras.ops.zeros(each.shape) for each in layer.trainable_variables]
    optimizer.apply(zeros, layer.trainable_variables)
    gamma = float(keras.ops.convert_to_numpy(layer.gamma)[0])
    assert gamma == pytest.approx(1.0 if excluded else 0.95)
