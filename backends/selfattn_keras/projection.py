"""The 1×1 convolution of the Keras layer, in the form that is fastest on the framework that Keras runs on."""

from functools import cache
from pathlib import Path
from typing import Any

import keras
from keras import ops

__all__ = ["Projection", "add_bias"]

# Tensors of the framework. Keras has no common type for them.
Tensor = Any

_NARROW = ("bfloat16", "float16")


@keras.saving.register_keras_serializable(package="selfattn")
class Projection(keras.layers.Conv2D):
    """A `keras.layers.Conv2D` that computes 1×1 kernels on JAX as one matrix product.

    All positions are rows of one matrix. With a convolution, XLA's CPU library takes longer for the gradients and for
    compiling them. TensorFlow and PyTorch would gain nothing. Results equal those of a `Conv2D` up to rounding, and the
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
        """The result of `call`, with this kernel.

        Args:
            inputs: feature maps (B, H, W, C_in).
            kernel: (1, 1, C_in, C_out).
        """
        outputs = self.convolution_op(inputs, kernel)
        if self.use_bias:
            last = self.data_format == "channels_last"
            outputs = add_bias(outputs if last else ops.moveaxis(outputs, 1, -1), self.bias)
            outputs = outputs if last else ops.moveaxis(outputs, -1, 1)
        return outputs if self.activation is None else self.activation(outputs)

    def convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """The convolution of the inputs (B, H, W, C_in), without bias. Keras' own `call` calls it.

        Args:
            inputs: feature maps (B, H, W, C_in).
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
    """Whether TensorFlow's 16-bit convolutions sum in 16 bits, as 2.21 does on a processor without AVX-512."""
    import tensorflow as tf  # noqa: PLC0415 - Keras on another framework has none

    information = Path("/proc/cpuinfo")
    known = information.exists() and " avx512f" in information.read_text(encoding="utf-8")
    return not known and not tf.config.list_physical_devices("GPU")


def add_bias(outputs: Tensor, bias: Tensor) -> Tensor:
    """Add a bias along the last axis. For 16-bit outputs, the sum is computed in float32.

    Args:
        outputs: outputs of a convolution, (…, C_out).
        bias: the bias, (C_out,).

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
    # The gradient of a broadcast bias is a sum over all positions. In 16 bits XLA's sum stops growing at a few hundred.
    return ops.cast(ops.cast(outputs, "float32") + ops.cast(bias, "float32"), dtype)
