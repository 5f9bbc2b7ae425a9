"""The 1×1 convolutions of the layers, for NNX and for Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

from selfattn_flax.pointwise import pointwise

__all__ = ["LinenProjection", "NNXProjection", "project"]


class NNXProjection(nnx.Conv):
    """A 1×1 `nnx.Conv` without strides or a mask, the gradient of whose bias is summed in at least float32.

    Example:
        >>> NNXProjection(6, 3, (1, 1), rngs=nnx.Rngs(0))(jnp.ones((1, 2, 2, 6))).shape
        (1, 2, 2, 3)
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The convolution of the inputs (…, C_in), on an explicit mesh sharded as `out_sharding` says."""
        bias = None if self.bias is None else self.bias[...]
        return project(inputs, self.kernel[...], bias, self.dtype, self.precision, out_sharding)


class LinenProjection(nn.Conv):
    """A 1×1 `nn.Conv` without strides or a mask, the gradient of whose bias is summed in at least float32.

    Example:
        >>> x = jnp.ones((1, 2, 2, 6))
        >>> LinenProjection(3, (1, 1)).init_with_output(jax.random.key(0), x)[0].shape
        (1, 2, 2, 3)
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The convolution of the inputs (…, C_in)."""
        widths = (inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, (1, 1, *widths), self.param_dtype)
        bias = self.param("bias", self.bias_init, widths[1:], self.param_dtype) if self.use_bias else None
        return project(inputs, kernel, bias, self.dtype, self.precision)


def project(
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    out_sharding: Any = None,
) -> jax.Array:
    """What `Conv` does with a 1×1 kernel.

    Args:
        inputs: (…, C_in).
        kernel: (1, 1, C_in, C_out).
        bias: (C_out,), or None.
        dtype: of the computation; by default promoted from the others.
        precision: of the product.
        out_sharding: of the result, on an explicit mesh.

    Returns:
        (…, C_out).

    Example:
        >>> project(jnp.ones((2, 5, 7, 3)), jnp.ones((1, 1, 3, 4)), jnp.ones(4))[0, 0, 0]
        Array([4., 4., 4., 4.], dtype=float32)
    """
    inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=dtype)
    outputs = pointwise(inputs, kernel, precision=precision, out_sharding=out_sharding)
    if bias is None:
        return outputs
    # The gradient of what is broadcast is a sum over all positions, and in 16 bits XLA's stands still at a few hundred.
    wide = jnp.promote_types(outputs.dtype, jnp.float32)
    return (outputs.astype(wide) + bias.astype(wide)).astype(outputs.dtype)
