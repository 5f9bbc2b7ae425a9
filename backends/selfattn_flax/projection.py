"""The 1×1 convolutions of the layers, for NNX and for Linen, as products of matrices."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

__all__ = ["KERNEL_INIT", "ZEROS_INIT", "LinenProjection", "NNXProjection", "pointwise", "project"]

KERNEL_INIT: Initializer = jax.nn.initializers.glorot_uniform()
ZEROS_INIT: Initializer = jax.nn.initializers.zeros


class NNXProjection(nnx.Conv):
    """A 1×1 `nnx.Conv` that sums the gradient of its bias in at least float32.

    It takes only the arguments below: no strides, groups or mask, and no custom convolution or dtype promotion.

    Args:
        in_features: C_in.
        out_features: C_out.
        use_bias: whether there is a bias.
        dtype: dtype of the computation, by default promoted from the inputs and the parameters.
        param_dtype: dtype of the parameters.
        precision: precision of the product of inputs and kernel.
        kernel_init: initialiser of the kernel, by default that of Glorot and Bengio.
        bias_init: initialiser of the bias.
        rngs: source of the initial parameters.

    Example:
        >>> NNXProjection(6, 3, rngs=nnx.Rngs(0))(jnp.ones((1, 2, 2, 6))).shape
        (1, 2, 2, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = ZEROS_INIT,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            (1, 1),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The convolution of the inputs (…, C_in). On an explicit mesh, `out_sharding` is its sharding."""
        bias = None if self.bias is None else self.bias[...]
        return project(inputs, self.kernel[...], bias, self.dtype, self.precision, out_sharding)


class LinenProjection(nn.Conv):
    """A 1×1 `nn.Conv` that sums the gradient of its bias in at least float32.

    Like `NNXProjection` it has no strides, groups or mask, and no custom convolution or dtype promotion. These fields of
    `nn.Conv` keep their defaults.

    Args:
        features: C_out.
        use_bias: whether there is a bias.
        dtype: dtype of the computation, by default promoted from the inputs and the parameters.
        param_dtype: dtype of the parameters.
        precision: precision of the product of inputs and kernel.
        kernel_init: initialiser of the kernel, by default that of Glorot and Bengio.
        bias_init: initialiser of the bias.

    Example:
        >>> x = jnp.ones((1, 2, 2, 6))
        >>> LinenProjection(3).init_with_output(jax.random.key(0), x)[0].shape
        (1, 2, 2, 3)
    """

    kernel_size: int | Sequence[int] = field(default=(1, 1), init=False)
    strides: int | Sequence[int] | None = field(default=1, init=False)
    padding: Any = field(default="SAME", init=False)
    input_dilation: int | Sequence[int] | None = field(default=1, init=False)
    kernel_dilation: int | Sequence[int] | None = field(default=1, init=False)
    feature_group_count: int = field(default=1, init=False)
    mask: jax.Array | None = field(default=None, init=False)
    promote_dtype: Any = field(default_factory=lambda: promote_dtype, init=False)
    conv_general_dilated: Any = field(default=None, init=False)
    conv_general_dilated_cls: Any = field(default=None, init=False)
    # By name only, because the second positional argument of `nn.Conv` is its window.
    _: KW_ONLY
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer = KERNEL_INIT
    bias_init: Initializer = ZEROS_INIT

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The convolution of the inputs (…, C_in)."""
        kernel, bias = self.weights(inputs.shape[-1])
        return project(inputs, kernel, bias, self.dtype, self.precision)

    def weights(self, in_features: int) -> tuple[jax.Array, jax.Array | None]:
        """The parameters: kernel (1, 1, C_in, C_out), and bias (C_out,) if there is one."""
        shape = (1, 1, in_features, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", self.bias_init, shape[-1:], self.param_dtype)


def project(
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    out_sharding: Any = None,
) -> jax.Array:
    """The result of `Conv` for a 1×1 kernel.

    Args:
        inputs: (…, C_in).
        kernel: (1, 1, C_in, C_out).
        bias: (C_out,), or None.
        dtype: dtype of the computation, by default promoted from the others.
        precision: precision of the product.
        out_sharding: sharding of the result, on an explicit mesh.

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
    # The gradient of a broadcast bias is a sum over all positions. In 16 bits XLA's sum stops growing at a few hundred.
    wide = jnp.promote_types(outputs.dtype, jnp.float32)
    return (outputs.astype(wide) + bias.astype(wide)).astype(outputs.dtype)


def pointwise(
    inputs: jax.Array,
    kernel: jax.Array,
    *,
    precision: jax.lax.PrecisionLike = None,
    out_sharding: Any = None,
) -> jax.Array:
    """The result of `jax.lax.conv_general_dilated` for a 1×1 window. On a CPU its gradient takes a third of the time.

    All positions are rows of one matrix. With several axes of positions, XLA's CPU library is slower at the gradient of the
    kernel.

    Args:
        inputs: (…, C_in).
        kernel: (1, 1, C_in, C_out).
        precision: precision of the product.
        out_sharding: sharding of the result, on an explicit mesh.

    Returns:
        (…, C_out).

    Example:
        >>> pointwise(jnp.ones((2, 5, 7, 3)), jnp.ones((1, 1, 3, 4)))[0, 0, 0]
        Array([3., 3., 3., 3.], dtype=float32)
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    product = jnp.dot(rows, kernel.reshape(kernel.shape[-2:]), precision=precision)
    return product.reshape((*inputs.shape[:-1], kernel.shape[-1]), out_sharding=out_sharding)
