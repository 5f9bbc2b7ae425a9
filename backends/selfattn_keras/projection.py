"""A 1×1 convolution of Keras, in the form that is fastest on the framework underneath."""

from typing import Any

import keras
from keras import ops

__all__ = ["Projection"]

# Tensors of the backend; Keras has no common type for them.
Tensor = Any


@keras.saving.register_keras_serializable(package="selfattn")
class Projection(keras.layers.Conv2D):
    """A `keras.layers.Conv2D`, of which JAX computes 1×1 kernels as one product of matrices.

    All positions are rows of one matrix: XLA's CPU library takes longer for the gradients of a convolution, and longer
    to compile them. TensorFlow and PyTorch gain nothing from it. Results are those of a `Conv2D`, to rounding.

    The arguments are those of `keras.layers.Conv2D`.

    Example:
        >>> projection = Projection(3, 1)
        >>> tuple(projection(keras.random.normal((2, 5, 7, 6))).shape)
        (2, 5, 7, 3)
    """

    def convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """The convolution of the inputs (B, H, W, C_in), without bias; what Keras' own `call` calls.

        Args:
            inputs: the maps.
            kernel: (1, 1, C_in, C_out).
        """
        if keras.backend.backend() != "jax" or not self._is_product():
            return super().convolution_op(inputs, kernel)
        *grid, channels = inputs.shape
        product = ops.matmul(
            ops.reshape(inputs, (-1, channels)), ops.reshape(kernel, (channels, self.filters))
        )
        return ops.reshape(product, (*grid, self.filters))

    def _is_product(self) -> bool:
        once = (self.kernel_size, self.strides, self.groups) == ((1, 1), (1, 1), 1)
        return once and self.data_format == "channels_last"
