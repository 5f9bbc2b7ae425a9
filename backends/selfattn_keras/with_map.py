"""The layer for code that expects (y, A)."""

from typing import Any

import keras

from selfattn_keras.layer import SelfAttention2D, Shape, Tensor

__all__ = ["SelfAttention2DWithMap"]


@keras.saving.register_keras_serializable(package="selfattn")
class SelfAttention2DWithMap(SelfAttention2D):
    """`SelfAttention2D` that returns (y, A) by default, as many published layers do.

    `selfattn_keras.convert` replaces such layers by this one, so that code that unpacks the pair still works. Every call
    computes the whole map, N·M numbers for each sample. If memory matters, change the callers to use y alone, and use
    `SelfAttention2D`. The arguments and the weights are the same.

    Example:
        >>> y, A = SelfAttention2DWithMap(data_format="channels_last")(keras.random.normal((2, 3, 4, 16)))
        >>> tuple(A.shape)
        (2, 12, 12)
    """

    def call(self, x: Tensor, *, return_attention_scores: bool = True, training: bool | None = None) -> Any:
        """The output and the map, or the output alone.

        Args:
            x: (B, H, W, C), or (B, C, H, W) with "channels_first".
            return_attention_scores: whether to return (y, A) instead of y.
            training: whether this is a step of training. Only spectral norm uses it.
        """
        return super().call(x, return_attention_scores=return_attention_scores, training=training)

    def compute_output_spec(
        self, x: Tensor, *, return_attention_scores: bool = True, training: bool | None = None
    ) -> Any:
        """Shapes and dtypes of the result of `call`. Sizes that are not known yet stay None."""
        return super().compute_output_spec(
            x, return_attention_scores=return_attention_scores, training=training
        )

    def compute_output_shape(self, input_shape: Shape) -> Any:
        """The shapes of y and A."""
        y, attention = self.compute_output_spec(keras.KerasTensor(input_shape, dtype=self.compute_dtype))
        return tuple(y.shape), tuple(attention.shape)
