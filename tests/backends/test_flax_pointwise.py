"""A 1×1 convolution as a product: the same numbers as JAX's convolution, in what the layers' children call."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selfattn_flax import SelfAttention2D
from selfattn_flax.linen import SelfAttention2D as LinenSelfAttention2D
from selfattn_flax.pointwise import pointwise


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
    got, pull_back_product = jax.vjp(lambda x, kernel: pointwise(x, kernel, (1, 1), "SAME"), x, kernel)
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    for one, other in zip((got, *pull_back_product(cotangent)), (want, *pull_back(cotangent)), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        scale = float(np.abs(np.asarray(other, np.float64)).max(initial=1))
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=0, atol=tolerance * scale
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
