"""A 1×1 convolution as a product: the same numbers as JAX's convolution, in what the layers' children call."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selfattn_flax import SelfAttention2D
from selfattn_flax.linen import SelfAttention2D as LinenSelfAttention2D
from selfattn_flax.projection import LinenProjection, NNXProjection, pointwise
from selfattn_flax.spectral_norm import LinenSpectralConv, NNXSpectralConv


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 3), (0, 4, 6)])
def test_it_is_the_convolution(shape, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*shape, 6), dtype)
    kernel = jax.random.normal(keys[1], (1, 1, 6, 4), dtype)
    cotangent = jax.random.normal(keys[2], (*shape, 4), dtype)

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    want, pull_back = jax.vjp(convolution, x, kernel)
    got, pull_back_product = jax.vjp(pointwise, x, kernel)
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    for one, other in zip((got, *pull_back_product(cotangent)), (want, *pull_back(cotangent)), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        scale = float(np.abs(np.asarray(other, np.float64)).max(initial=1))
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=0, atol=tolerance * scale
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("ours", "flax"), [(NNXProjection, nnx.Conv), (LinenProjection, nn.Conv)], ids=["nnx", "linen"]
)
def test_the_gradient_of_a_bias_is_a_sum_that_does_not_stand_still(ours, flax, dtype):
    x = jax.random.normal(jax.random.key(0), (1, 64, 64, 6), dtype)

    def run(conv):
        size = () if conv is ours else ((1, 1),)
        options = {"param_dtype": dtype, "kernel_init": jax.nn.initializers.ones}
        if issubclass(conv, nnx.Module):
            graph, tree = nnx.split(conv(6, 4, *size, **options, rngs=nnx.Rngs(0)))
            y, pull = jax.vjp(lambda tree: nnx.merge(graph, tree)(x), tree)
            return y, pull(jnp.ones_like(y))[0]["bias"][...]
        module = conv(4, *size, **options)
        y, pull = jax.vjp(lambda tree: module.apply(tree, x), module.init(jax.random.key(0), x))
        return y, pull(jnp.ones_like(y))[0]["params"]["bias"]

    y, gradient = run(ours)
    assert y.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, 64 * 64)
    np.testing.assert_allclose(
        y.astype(jnp.float32), run(flax)[0].astype(jnp.float32), atol=4 * float(jnp.finfo(dtype).eps)
    )


def test_the_children_compute_products_and_are_called():
    x = jax.random.normal(jax.random.key(1), (2, 5, 7, 16))
    layer = SelfAttention2D(16, out_projection=True, rngs=nnx.Rngs(0))
    module = LinenSelfAttention2D(out_projection=True)
    variables = module.init(jax.random.key(0), x)
    for program in (jax.make_jaxpr(layer)(x), jax.make_jaxpr(module.apply)(variables, x)):
        assert "conv_general_dilated" not in str(program)
    seen = []

    def watch(run, args, kwargs, context):
        seen.append(context.module.name)
        return run(*args, **kwargs)

    with nn.intercept_methods(watch):
        module.apply(variables, x)
    assert {"query", "key", "value", "out"} < set(seen)
    layer.key = lambda maps: jnp.zeros((*maps.shape[:-1], 2))
    _, sown = nnx.capture(layer, nnx.Intermediate)(x, sow_weights=True)
    np.testing.assert_allclose(sown["attention_weights"][0], 1 / 35, rtol=1e-6)


def test_a_projection_takes_the_sharding_of_its_result():
    """As `nnx.Conv` does, on a mesh whose axes are explicit."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        projection = NNXProjection(6, 4, rngs=nnx.Rngs(0))
        y = projection(jnp.ones((2, 3, 5, 6)), out_sharding=jax.sharding.PartitionSpec("d"))
    assert jax.typeof(y).sharding.spec == jax.sharding.PartitionSpec("d", None, None, None)


OURS = (NNXProjection, NNXSpectralConv, LinenProjection, LinenSpectralConv)
USED = {"use_bias", "dtype", "param_dtype", "precision", "kernel_init", "bias_init", "rngs", "parent", "name"}


@pytest.mark.parametrize("conv", OURS)
def test_a_projection_refuses_what_it_would_not_do(conv):
    flax, features, rngs = (nn.Conv, (4,), {})
    if issubclass(conv, nnx.Module):
        flax, features, rngs = (nnx.Conv, (6, 4), {"rngs": nnx.Rngs(0)})
    options = set(list(inspect.signature(flax.__init__).parameters)[1 + len(features) :]) - USED
    assert {"kernel_size", "strides", "mask", "promote_dtype", "conv_general_dilated"} < options
    for option in options:
        with pytest.raises(TypeError, match=option):
            conv(*features, **{option: None}, **rngs)
    for window in (3, (3, 3)):
        with pytest.raises(TypeError, match="positional"):
            conv(*features, window, **rngs)


@pytest.mark.parametrize(
    "conv", [NNXProjection(6, 4, rngs=nnx.Rngs(0)), LinenProjection(4)], ids=["nnx", "linen"]
)
def test_a_projection_is_a_convolution_of_one_position(conv):
    """What looks at the layers of a model by their class and fields finds what it knows."""
    assert isinstance(conv, nnx.Conv | nn.Conv)
    flax = nn.Conv(4, (1, 1)) if isinstance(conv, nn.Module) else nnx.Conv(6, 4, (1, 1), rngs=nnx.Rngs(0))
    for name in ("kernel_size", "strides", "padding", "feature_group_count", "mask", "promote_dtype"):
        assert getattr(conv, name) == getattr(flax, name)
    if isinstance(conv, nn.Module):
        assert conv.clone(features=5) == LinenProjection(5)
