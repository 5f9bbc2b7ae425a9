"""1×1 convolution as a product of matrices."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["pointwise"]


def pointwise(
    inputs: jax.Array,
    kernel: jax.Array,
    *,
    precision: jax.lax.PrecisionLike = None,
    out_sharding: Any = None,
) -> jax.Array:
    """What `jax.lax.conv_general_dilated` gives for a 1×1 window, in a third of the time of its gradient on a CPU.

    All positions are rows of one matrix: with several axes of them XLA's CPU library is slower at the gradient of the
    kernel.

    Args:
        inputs: (…, C_in).
        kernel: (1, 1, C_in, C_out).
        precision: of the product.
        out_sharding: of the result, on an explicit mesh.

    Returns:
        (…, C_out).

    Example:
        >>> pointwise(jnp.ones((2, 5, 7, 3)), jnp.ones((1, 1, 3, 4)))[0, 0, 0]
        Array([3., 3., 3., 3.], dtype=float32)
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    product = jnp.dot(rows, kernel.reshape(kernel.shape[-2:]), precision=precision)
    return product.reshape((*inputs.shape[:-1], kernel.shape[-1]), out_sharding=out_sharding)
