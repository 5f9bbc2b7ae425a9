"""The projections are what `keras.layers.Conv2D` computes, in the form that suits the framework."""

import keras
import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, init_params
from selfattn_core.params import projections
from selfattn_keras import SelfAttention2D, from_canonical
from selfattn_keras.projection import Projection
from selfattn_keras.spectral_norm import SpectralConv2D
from tests.ops.rounded_logits import rounding_of_sum

FRAMEWORK = keras.backend.backend()
FULL = SelfAttentionConfig(12, 3, 5, out_projection=True)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 5, 7, 6), {"kernel_size": 1}),
        ((0, 5, 7, 6), {"kernel_size": 1}),
        ((2, 5, 7, 6), {"kernel_size": 1, "use_bias": False, "activation": "relu"}),
        ((2, 5, 7, 6), {"kernel_size": (1, 3)}),
        ((2, 5, 7, 6), {"kernel_size": 1, "strides": (1, 2)}),
        ((2, 5, 7, 6), {"kernel_size": 1, "groups": 2}),
        ((2, 6, 5, 7), {"kernel_size": 1, "data_format": "channels_first"}),
    ],
)
def test_it_is_a_convolution(shape, options):
    if FRAMEWORK == "tensorflow" and (0 in shape or "groups" in options or "data_format" in options):
        pytest.skip("TensorFlow's CPU has no such convolution")
    options = {"data_format": "channels_last", **options}
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    convolution, projection = keras.layers.Conv2D(4, **options), Projection(4, **options)
    want = keras.ops.convert_to_numpy(convolution(x))
    projection(x)
    projection.set_weights([weight + 0 for weight in convolution.get_weights()])
    got = keras.ops.convert_to_numpy(projection(x))
    assert got.shape == want.shape
    assert (np.abs(got - want) <= 2 * rounding(convolution, options, x)).all()


def rounding(convolution, options, x):
    """How far each number of a convolution can be off in float32; the bias is one term more."""
    sizes = keras.layers.Conv2D(4, **options | {"activation": None})
    sizes.build(x.shape)
    weights = convolution.get_weights()
    sizes.set_weights([np.abs(weight) for weight in weights])
    terms = np.prod(weights[0].shape[:3]) + 1
    return rounding_of_sum(terms, 2.0**-23) * keras.ops.convert_to_numpy(sizes(np.abs(x)))


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"use_bias": False}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_float16"])
def test_it_is_a_convolution_in_other_dtypes(dtype, options):
    x = np.random.default_rng(1).standard_normal((2, 5, 7, 6)).astype(np.float32)
    options = {"data_format": "channels_last", "bias_initializer": "ones", "dtype": dtype, **options}
    convolution, projection = keras.layers.Conv2D(4, 1, **options), Projection(4, 1, **options)
    want = convolution(x)
    projection(x)
    projection.set_weights([weight + 0 for weight in convolution.get_weights()])
    got = projection(x)
    narrow = keras.backend.standardize_dtype(want.dtype)
    assert keras.backend.standardize_dtype(got.dtype) == narrow == convolution.compute_dtype
    got, want = (keras.ops.convert_to_numpy(keras.ops.cast(each, "float32")) for each in (got, want))
    eps = {"bfloat16": 2**-7, "float16": 2**-10}[narrow]
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * eps * np.abs(want).max())


@pytest.mark.parametrize("conv", [Projection, SpectralConv2D])
def test_it_refuses_another_rank_as_a_convolution_does(conv):
    def refusal(convolution):
        convolution.build((None, None, None, 6))
        with pytest.raises(Exception, match=r"\w") as caught:
            convolution(np.ones((1, 2, 5, 7, 6), np.float32))
        return type(caught.value)

    assert refusal(conv(4, 1, data_format="channels_last")) is refusal(
        keras.layers.Conv2D(4, 1, data_format="channels_last")
    )


def test_its_config_makes_another():
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(Projection(4, 1)))
    assert type(twin) is Projection
    assert twin.filters == 4


@pytest.mark.skipif(FRAMEWORK != "jax", reason="the form is JAX's alone")
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_no_convolution_is_left_on_jax(spectral_norm):
    import jax

    layer = SelfAttention2D.from_spec(
        SelfAttentionConfig(12, 3, 5, out_projection=True, spectral_norm=spectral_norm)
    )
    program = str(jax.make_jaxpr(layer)(np.ones((2, 5, 7, 12), np.float32)))
    assert "dot_general" in program
    assert "conv_general_dilated" not in program


def test_a_loaded_layer_has_the_initializers_of_any_other():
    """Its weights are not drawn only to be overwritten; another layer of its config draws its own."""
    loaded, new = from_canonical(FULL, init_params(FULL, seed=1)), SelfAttention2D.from_spec(FULL)
    for name in ("kernel_initializer", "bias_initializer", "gamma_initializer"):
        assert type(getattr(loaded, name)) is type(getattr(new, name))
    seeds = set()
    for name in projections(FULL):
        one, other = getattr(loaded, name), getattr(new, name)
        assert type(one.kernel_initializer) is type(other.kernel_initializer)
        assert type(one.bias_initializer) is type(other.bias_initializer)
        seeds.add(one.kernel_initializer.seed)
    assert len(seeds) == len(projections(FULL))


def test_loading_draws_nothing(monkeypatch):
    def draw(*args, **kwargs):
        raise AssertionError("a draw whose values are overwritten at once")

    for name in ("normal", "uniform", "truncated_normal"):
        monkeypatch.setattr(keras.random, name, draw)
        monkeypatch.setattr(f"keras.src.backend.random.{name}", draw)
    with pytest.raises(AssertionError, match="overwritten"):
        SelfAttention2D.from_spec(FULL)
    from_canonical(FULL, init_params(FULL, seed=1))


def test_a_layer_made_of_the_config_of_a_loaded_one_draws():
    loaded = from_canonical(FULL, init_params(FULL, seed=1))
    twin = SelfAttention2D.from_config(loaded.get_config())
    twin.build((None, None, None, 12) if twin.data_format == "channels_last" else (None, 12, None, None))
    assert all(keras.ops.any(getattr(twin, name).kernel != 0) for name in projections(FULL))
