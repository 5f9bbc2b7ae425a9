"""Layers with spectral norm as PyTorch computes it.

Flax's own `nnx.SpectralNorm` overwrites the kernel at every call, so that a training in PyTorch cannot go on with it.
"""

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["SpectralConv", "SpectralLinear"]

_EPS = 1e-12


class _Spectral(nnx.Module):
    """A raw kernel with the vectors of its power iteration.

    Args:
        shape: of the kernel, output channels last.
        rngs: where the initial values come from.
    """

    def __init__(self, shape: tuple[int, ...], *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(nnx.initializers.glorot_uniform()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(shape[-1:]))
        self.u = nnx.BatchStat(_normalised(jax.random.normal(rngs.params(), shape[-1:])))
        self.v = nnx.BatchStat(_normalised(jax.random.normal(rngs.params(), shape[:-1])))
        # `train()` and `eval()` of a module set this attribute, as for batch norm.
        self.use_running_average = False

    def normalised_kernel(self) -> jax.Array:
        """The kernel divided by its largest singular value; in training mode after one more power iteration."""
        kernel = self.kernel[...]
        inputs = tuple(range(kernel.ndim - 1))
        if not self.use_running_average:
            fixed = jax.lax.stop_gradient(kernel)
            self.u[...] = _normalised(jnp.tensordot(self.v[...], fixed, (inputs, inputs)))
            self.v[...] = _normalised(fixed @ self.u[...])
        return kernel / jnp.sum(self.v[...] * (kernel @ self.u[...]))


class SpectralConv(_Spectral):
    """A 3×3 convolution with a border of zeros.

    Args:
        channels_in: of the input.
        channels_out: of the output.
        stride: in both directions.
        rngs: where the initial values come from.
    """

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1, rngs: nnx.Rngs) -> None:
        super().__init__((3, 3, channels_in, channels_out), rngs=rngs)
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C_in) to (B, H/stride, W/stride, C_out)."""
        # With a stride, "SAME" would pad at the other end than torch does.
        convolved = jax.lax.conv_general_dilated(
            x,
            self.normalised_kernel(),
            (self.stride, self.stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return convolved + self.bias[...]


class SpectralLinear(_Spectral):
    """A dense layer.

    Args:
        channels_in: of the input.
        channels_out: of the output.
        rngs: where the initial values come from.
    """

    def __init__(self, channels_in: int, channels_out: int, *, rngs: nnx.Rngs) -> None:
        super().__init__((channels_in, channels_out), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, C_in) to (B, C_out)."""
        return x @ self.normalised_kernel() + self.bias[...]


def _normalised(vector: jax.Array) -> jax.Array:
    return vector / jnp.maximum(jnp.linalg.norm(vector), _EPS)
