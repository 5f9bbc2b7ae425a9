"""A 1×1 convolution of Keras, in the form that is fastest on the framework underneath."""

from functools import cache
from pathlib import Path
from typing import Any

import keras
from keras import ops

__all__ = ["Projection", "add_bias"]

# Tensors of the backend; Keras has no common type for them.
Tensor = Any

_NARROW = ("bfloat16", "float16")


@keras.saving.register_keras_serializable(package="selfattn")
class Projection(keras.layers.Conv2D):
    """A `keras.layers.Conv2D`, of which JAX computes 1×1 kernels as one product of matrices.

    All positions are rows of one matrix: XLA's CPU library takes longer for the gradients of a convolution, and longer
    to compile them. TensorFlow and PyTorch gain nothing from it. Results are those of a `Conv2D`, to rounding, but the
    gradient of the bias is summed in at least float32.

    The arguments are those of `keras.layers.Conv2D`.

    Example:
        >>> projection = Projection(3, 1)
        >>> tuple(projection(keras.random.normal((2, 5, 7, 6))).shape)
        (2, 5, 7, 3)
    """

    def call(self, inputs: Tensor) -> Tensor:
        """The convolution of the inputs (B, H, W, C_in), and the bias."""
        return self.project(inputs, self.kernel)

    def project(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """What `call` computes, with this kernel.

        Args:
            inputs: the maps.
            kernel: (1, 1, C_in, C_out).
        """
        outputs = self.convolution_op(inputs, kernel)
        if self.use_bias:
            last = self.data_format == "channels_last"
            outputs = add_bias(outputs if last else ops.moveaxis(outputs, 1, -1), self.bias)
            outputs = outputs if last else ops.moveaxis(outputs, -1, 1)
        return outputs if self.activation is None else self.activation(outputs)

    def convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """The convolution of the inputs (B, H, W, C_in), without bias; what Keras' own `call` calls.

        Args:
            inputs: the maps.
            kernel: (1, 1, C_in, C_out).
        """
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        if keras.backend.backend() == "tensorflow" and dtype in _NARROW and _adds_up_in_16_bits():
            wide = (ops.cast(tensor, "float32") for tensor in (inputs, kernel))
            return ops.cast(super().convolution_op(*wide), dtype)
        if keras.backend.backend() != "jax" or not self._is_product(inputs):
            return super().convolution_op(inputs, kernel)
        *grid, channels = inputs.shape
        product = ops.matmul(
            ops.reshape(inputs, (-1, channels)), ops.reshape(kernel, (channels, self.filters))
        )
        return ops.reshape(product, (*grid, self.filters))

    def _is_product(self, inputs: Tensor) -> bool:
        once = (self.kernel_size, self.strides, self.groups) == ((1, 1), (1, 1), 1)
        return once and self.data_format == "channels_last" and len(inputs.shape) == 4


@cache
def _adds_up_in_16_bits() -> bool:
    """Whether TensorFlow's 16-bit convolutions sum in 16 bits here: on a processor without AVX-512 they do (2.21)."""
    import tensorflow as tf  # noqa: PLC0415 - Keras on another framework has none

    information = Path("/proc/cpuinfo")
    known = information.exists() and " avx512f" in information.read_text(encoding="utf-8")
    return not known and not tf.config.list_physical_devices("GPU")


def add_bias(outputs: Tensor, bias: Tensor) -> Tensor:
    """A bias along the last axis, added to 16 bits in float32.

    Args:
        outputs: of a convolution, (…, C_out).
        bias: (C_out,).

    Returns:
        The sum, in the dtype of `outputs`.

    Example:
        >>> keras.backend.standardize_dtype(add_bias(ops.ones((2, 3), "bfloat16"), ops.ones(3)).dtype)
        'bfloat16'
    """
    dtype = keras.backend.standardize_dtype(outputs.dtype)
    bias = ops.cast(bias, dtype)
    if dtype not in _NARROW:
        return ops.add(outputs, bias)
    # The gradient of what is broadcast is a sum over all positions, and in 16 bits XLA's stands still at a few hundred.
    return ops.cast(ops.cast(outputs, "float32") + ops.cast(bias, "float32"), dtype)
