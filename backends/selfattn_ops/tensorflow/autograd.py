"""The attention with custom gradients for TensorFlow, which work in blocks."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from selfattn_ops.tensorflow.derivatives import backward, forward, second

__all__ = ["attend_in_blocks"]


def attend_in_blocks(block_size: int | None, *operands: tf.Tensor) -> tf.Tensor:
    """(B, N, Dk), (B, M, Dk), (B, M, Dv) -> (B, N, Dv), in blocks, with derivatives in blocks.

    Every differentiated tensor is an argument, because TensorFlow drops the gradients of tensors in the closure.
    `tf.identity` makes each one a tensor of the current graph, which may belong to a derivative or to a branch. Without
    it the next derivative fails. `tf.stop_gradient` keeps the tapes from recording, and so from keeping, each block.
    """
    results: list[tf.Tensor] = []

    @tf.custom_gradient
    def output(*operands: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        def gradient(cotangent: tf.Tensor) -> Any:
            return _gradients(block_size, *operands, results[-1], cotangent)

        results.append(forward(block_size, *map(tf.stop_gradient, operands)))
        return results[0], gradient

    # The derivatives read this one, which has derivatives itself. Forward mode asks for them before it exists.
    results.append(output(*map(tf.identity, operands)))
    return results[-1]


def _gradients(block_size: int | None, *operands: tf.Tensor) -> Any:
    """The three gradients for (q, k, v, o, G), which have a custom gradient themselves."""

    @tf.custom_gradient
    def gradients(*operands: tf.Tensor) -> tuple[Any, Callable[..., Any]]:
        def gradient(*cotangents: tf.Tensor) -> Any:
            to_q, to_k, to_v, to_g = second(block_size, *operands, *cotangents)
            return to_q, to_k, to_v, None, to_g

        return backward(block_size, *map(tf.stop_gradient, operands)), gradient

    return gradients(*map(tf.identity, operands))
