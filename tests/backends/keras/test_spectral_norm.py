"""Spectral norm in the Keras layer: state and mode, through Keras' machinery, against the specification."""

import keras
import numpy as np
import pytest
from keras import ops

from selfattn_core import SelfAttentionConfig, parameter_table, spec, spectral_norm
from selfattn_core.params import fold_spectral_norm, projections, state_table
from selfattn_keras import SelfAttention2D, from_canonical, load, refresh_spectral_norm, save, to_canonical
from selfattn_keras.conformance.backend import backend
from selfattn_keras.conformance.mutants import MovesInEvaluation
from selfattn_keras.spectral_norm import SpectralConv2D
from selfattn_keras.weights import variable
from tests.support import NORMALISED, assert_near, designed, to_numpy, wide

FRAMEWORK = keras.backend.backend()
# float64 exists in JAX only where the process asked for it, which this one has not.
DTYPE = "float32" if FRAMEWORK == "jax" else "float64"
EPS = float(np.finfo(DTYPE).eps)
# Ulps that a function of the layer may be off: the norms of the kernels add theirs.
OUTPUT = 256


def assert_state(layer, want):
    got = to_canonical(layer)
    for name in state_table(layer.config):
        assert_near(got[name], want[name], 32, DTYPE)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_a_training_call_moves_the_state_once_and_others_do_not(data_format):
    params, x, _ = designed(NORMALISED, DTYPE)
    layer = from_canonical(NORMALISED, params, data_format=data_format)
    maps = x if data_format == "channels_last" else x.transpose(0, 3, 1, 2)

    def forward(**mode):
        y = to_numpy(layer(maps, **mode))
        return y if data_format == "channels_last" else y.transpose(0, 2, 3, 1)

    exact, wide_x = wide(params), wide(x)
    for mode in ({}, {"training": False}):
        assert_near(forward(**mode), spec.forward(NORMALISED, exact, wide_x), OUTPUT, DTYPE)
        assert all(np.array_equal(to_canonical(layer)[name], array) for name, array in params.items())
    moved = spec.power_iteration(NORMALISED, exact)
    assert_near(forward(training=True), spec.forward(NORMALISED, moved, wide_x), OUTPUT, DTYPE)
    assert_state(layer, moved)
    _, attention = layer(maps, return_attention_scores=True)
    assert_near(to_numpy(attention), spec.attention_map(NORMALISED, moved, wide_x), OUTPUT, DTYPE)
    assert_state(layer, moved)
    np.testing.assert_array_equal(to_canonical(layer)["query.kernel"], params["query.kernel"])


def test_the_state_is_saved_but_not_trained():
    layer = from_canonical(NORMALISED, designed(NORMALISED, DTYPE)[0])
    assert {each.path.removeprefix(layer.name + "/") for each in layer.non_trainable_variables} == {
        name.replace(".", "/") for name in state_table(NORMALISED)
    }
    assert {each.path.removeprefix(layer.name + "/") for each in layer.trainable_variables} == {
        name.replace(".", "/") for name in parameter_table(NORMALISED)
    }
    assert all(isinstance(getattr(layer, name), SpectralConv2D) for name in projections(NORMALISED))


def _steps(layer, run):
    """One descent per step, written with the framework's own derivatives: both terms share one forward pass."""
    names = list(parameter_table(run.config))
    variables = [variable(layer, name) for name in names]
    if FRAMEWORK == "tensorflow":
        import tensorflow as tf

        @tf.function
        def step(x, w):
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(w * layer(x, training=True))
                dx = inner.gradient(loss, x)
                total = loss + run.penalty * tf.reduce_sum(tf.square(dx))
            sources = [each.value for each in variables]
            for each, gradient in zip(
                variables, outer.gradient(total, sources, unconnected_gradients="zero"), strict=True
            ):
                each.assign(each.value - run.rate * gradient)

        for x, w in run.steps:
            step(tf.constant(x), tf.constant(w))
    elif FRAMEWORK == "torch":
        import torch

        for x, w in run.steps:
            maps = torch.from_numpy(x).requires_grad_()
            loss = (torch.from_numpy(w) * layer(maps, training=True)).sum()
            (dx,) = torch.autograd.grad(loss, maps, create_graph=True)
            total = loss + run.penalty * dx.square().sum()
            sources = [each.value for each in variables]
            for each, gradient in zip(variables, torch.autograd.grad(total, sources), strict=True):
                each.assign(each.value.detach() - run.rate * gradient)
    else:
        import jax

        def losses(trainable, state, x, w):
            def scalar(x):
                y, moved = layer.stateless_call(trainable, state, x, training=True)
                return ops.sum(w * y), moved

            (loss, moved), dx = jax.value_and_grad(scalar, has_aux=True)(x)
            return loss + run.penalty * ops.sum(dx * dx), moved

        @jax.jit
        def step(trainable, state, x, w):
            gradients, moved = jax.grad(losses, has_aux=True)(trainable, state, x, w)
            return [each - run.rate * by for each, by in zip(trainable, gradients, strict=True)], moved

        trainable, state = (
            [each.value for each in variables]
            for variables in (layer.trainable_variables, layer.non_trainable_variables)
        )
        for x, w in run.steps:
            trainable, state = step(trainable, state, x, w)
        for each, value in zip(
            layer.trainable_variables + layer.non_trainable_variables, trainable + state, strict=True
        ):
            each.assign(value)


def test_training_follows_the_specification(training_run):
    run = training_run(DTYPE)
    layer = from_canonical(run.config, run.start)
    _steps(layer, run)
    run.check(to_canonical(layer))


def model_of(**options):
    return keras.Sequential(
        [
            keras.Input((None, None, 11)),
            SelfAttention2D(3, spectral_norm=True, name="attention", **options),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1),
        ]
    )


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_moves_the_state_and_predict_does_not(jit_compile):
    if jit_compile and FRAMEWORK == "torch":
        pytest.skip("Keras compiles nothing on torch's CPU without a C++ compiler to be found")
    model = model_of()
    layer = model.get_layer("attention")
    layer.gamma.assign([0.5])
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((6, 3, 4, 11)), generator.standard_normal((6, 1))
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", jit_compile=jit_compile)
    before = to_canonical(layer)
    model.predict(x, verbose=0)
    assert all(np.array_equal(to_canonical(layer)[name], before[name]) for name in before)
    model.fit(x, y, batch_size=3, epochs=2, verbose=0)
    after = to_canonical(layer)
    assert all(
        not np.array_equal(after[name], before[name]) for name in ("query.v", "value.u", "value.kernel")
    )
    model.evaluate(x, y, verbose=0)
    assert all(np.array_equal(to_canonical(layer)[name], after[name]) for name in after)
    # The state that fit leaves is that of the kernel before the last step.
    assert np.linalg.norm(after["value.kernel"], 2) < 1.2 * _sigma(after, "value")


def _sigma(params, name):
    return params[f"{name}.v"] @ params[f"{name}.kernel"] @ params[f"{name}.u"]


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_native_files_carry_the_state(tmp_path, suffix):
    model = model_of(use_bias=False)
    layer = model.get_layer("attention")
    layer.gamma.assign([0.5])
    x = np.random.default_rng(1).standard_normal((2, 5, 3, 11)).astype("float32")
    model(x, training=True)
    path = tmp_path / f"model{suffix}"
    if suffix == ".keras":
        model.save(path)
        back = keras.saving.load_model(path)
    else:
        model.save_weights(path)
        back = model_of(use_bias=False)
        back.load_weights(path)
    for name, array in to_canonical(layer).items():
        np.testing.assert_array_equal(to_canonical(back.get_layer("attention"))[name], array)
    np.testing.assert_array_equal(back.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize("dtype", sorted({DTYPE, "float32", "float16"}))
def test_canonical_arrays_and_files_carry_the_state(tmp_path, dtype):
    params, *_ = designed(NORMALISED, dtype)
    save(from_canonical(NORMALISED, params), tmp_path / "layer.safetensors")
    layer = load(tmp_path / "layer.safetensors")
    assert layer.config == NORMALISED
    assert layer.get_config()["spectral_norm"] is True
    got = to_canonical(layer)
    assert list(got) == list(params)
    assert all(got[name].tobytes() == array.tobytes() for name, array in params.items())


def test_a_new_layer_has_been_warmed_up():
    layer = SelfAttention2D.from_spec(
        SelfAttentionConfig(64, spectral_norm=True),
        kernel_initializer=keras.initializers.GlorotUniform(seed=3),
    )
    params = to_canonical(layer)
    for name in projections(layer.config):
        ratio = _sigma(params, name) / np.linalg.norm(params[f"{name}.kernel"], 2)
        assert 0.9 < ratio < 1.00001
        for part in ("u", "v"):
            np.testing.assert_allclose(np.linalg.norm(params[f"{name}.{part}"]), 1, rtol=1e-5)
    again = SelfAttention2D.from_spec(
        layer.config, kernel_initializer=keras.initializers.GlorotUniform(seed=3)
    )
    assert all(np.array_equal(to_canonical(again)[name], array) for name, array in params.items())


def test_a_child_is_the_projection_that_the_layer_applies():
    params, x, _ = designed(NORMALISED, DTYPE)
    layer = from_canonical(NORMALISED, params)
    _, folded = fold_spectral_norm(NORMALISED, params)
    assert_near(to_numpy(layer.value(x)), x @ folded["value.kernel"] + folded["value.bias"], 64, DTYPE)


def test_mixed_precision_keeps_the_norm_in_float32():
    params, x, _ = designed(NORMALISED)
    layer = from_canonical(NORMALISED, params, dtype="mixed_bfloat16")
    y = layer(x, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    moved = spec.power_iteration(NORMALISED, wide(params))
    for name in state_table(NORMALISED):
        np.testing.assert_allclose(to_canonical(layer)[name], moved[name], atol=1e-5)
    want = spec.forward(NORMALISED, moved, wide(x))
    assert np.abs(np.float64(to_numpy(ops.cast(y, "float32"))) - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize("outer", ["train", "eval"])
def test_other_calls_before_the_gradient_do_not_disturb_it(outer):
    """On torch and TensorFlow, whose variables change in place."""
    if FRAMEWORK == "jax":
        pytest.skip("arrays of JAX do not change")
    params, x, _ = designed(NORMALISED, DTYPE)
    layer, twin = from_canonical(NORMALISED, params), from_canonical(NORMALISED, params)

    def gradient(layer, between):
        kernel = variable(layer, "query.kernel")
        if FRAMEWORK == "torch":
            import torch

            y = layer(x, training=outer == "train")
            between()
            (found,) = torch.autograd.grad(y.sum(), kernel.value)
            return found.numpy()
        import tensorflow as tf

        with tf.GradientTape() as tape:
            y = layer(x, training=outer == "train")
            between()
            total = tf.reduce_sum(y)
        return tape.gradient(total, kernel.value).numpy()

    want = gradient(twin, lambda: None)
    np.testing.assert_array_equal(gradient(layer, lambda: layer(x[::-1].copy(), training=True)), want)


def test_rematerialisation_moves_the_state_once_or_is_refused():
    params, x, _ = designed(SelfAttentionConfig(11, 3, spectral_norm=True), shape=(2, 5, 7))
    with keras.RematScope(mode="full"):
        layer = from_canonical(SelfAttentionConfig(11, 3, spectral_norm=True), params)
        model = keras.Sequential([keras.Input((5, 7, 11)), layer, keras.layers.GlobalAveragePooling2D()])
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=False)
    if FRAMEWORK != "torch":
        # Keras' own refusals: a keyword argument to custom_gradient, a traced `training`.
        with pytest.raises((ValueError, RuntimeError)):
            model.fit(x, np.zeros((2, 11)), verbose=0)
        return
    model.fit(x, np.zeros((2, 11)), verbose=0)
    moved = spec.power_iteration(layer.config, wide(params))
    for name in state_table(layer.config):
        np.testing.assert_allclose(to_canonical(layer)[name], moved[name], rtol=1e-5, atol=1e-5)


def test_the_option_is_checked_and_kept():
    with pytest.raises(ValueError, match="spectral_norm=1 must be True or False"):
        SelfAttention2D(spectral_norm=1)
    layer = SelfAttention2D(3, spectral_norm=True)
    assert SelfAttention2D.from_config(layer.get_config()).spectral_norm is True


@pytest.mark.parametrize("call", ["forward", "vjp"])
def test_the_kit_sees_the_state_that_a_call_moves(call):
    """By its own backend, of a layer that moves what an evaluation should leave alone."""
    params, x, _ = designed(NORMALISED, DTYPE)
    for kit, moves in ((MovesInEvaluation(), True), (backend, False)):
        model = kit.build(NORMALISED, params, DTYPE, "channels_last")
        getattr(kit, call)(model, *((x,) if call == "forward" else (x, x)))
        assert (kit.params(model)["query.u"] != params["query.u"]).any() == moves


def shares(layer):
    params = to_canonical(layer)
    return [
        spectral_norm.share(*(params[f"{name}.{part}"] for part in ("kernel", "u", "v")))
        for name in projections(layer.config)
    ]


def test_kernels_from_outside_are_refreshed():
    layer = from_canonical(NORMALISED, designed(NORMALISED, DTYPE)[0])
    layer.query.kernel.assign(5 * to_numpy(layer.query.kernel)[..., ::-1, :])
    assert min(shares(layer)) < 0.9
    refresh_spectral_norm(layer)
    np.testing.assert_allclose(shares(layer), 1, rtol=16 * EPS)


def test_a_file_without_state_loads_with_that_of_its_kernels(tmp_path):
    plain = keras.Sequential([keras.Input((None, None, 11)), SelfAttention2D(3, name="attention")])
    model = keras.Sequential(
        [keras.Input((None, None, 11)), SelfAttention2D(3, name="attention", spectral_norm=True)]
    )
    plain.save_weights(tmp_path / "plain.weights.h5")
    with pytest.warns(UserWarning, match="got weights without u and v"):
        model.load_weights(tmp_path / "plain.weights.h5")
    layer = model.get_layer("attention")
    np.testing.assert_array_equal(
        to_canonical(layer)["key.kernel"], to_canonical(plain.get_layer("attention"))["key.kernel"]
    )
    np.testing.assert_allclose(shares(layer), 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_a_new_layer_with_kernels_of_zeros_trains(dtype):
    model = keras.Sequential(
        [
            keras.Input((3, 4, 11)),
            SelfAttention2D(
                3, spectral_norm=True, kernel_initializer="zeros", gamma_initializer="ones", dtype=dtype
            ),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1),
        ]
    )
    layer = model.layers[0]
    np.testing.assert_allclose(np.linalg.norm(to_canonical(layer)["value.v"]), 1, rtol=1e-2)
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((6, 3, 4, 11)), generator.standard_normal((6, 1))
    model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse", jit_compile=False)
    model.fit(x, y, batch_size=3, epochs=3, verbose=0)
    params = to_canonical(layer)
    assert params["value.kernel"].any()
    assert all(np.isfinite(array).all() for array in params.values())
    assert _sigma(params, "value") > 0.8 * np.linalg.norm(params["value.kernel"], 2)
