"""Attention without a scale, for TensorFlow: softmax(q kᵀ) v with logits and softmax in at least float32."""

import tensorflow as tf

from selfattn_ops.blocks import block_rows, check_operands

__all__ = ["attend", "attend_with_map"]


def attend(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, *, block_size: int | None = None) -> tf.Tensor:
    """Softmax over keys of q kᵀ, times v; no 1/sqrt(d).

    Args:
        query: (…, N, Dk).
        key: (…, M, Dk).
        value: (…, M, Dv).
        block_size: query rows at a time; None chooses by size.

    Returns:
        (…, N, Dv), in the dtype of the operands.

    Raises:
        ValueError: if the operands do not belong together, or `block_size` is not a positive integer.

    Example:
        >>> attend(tf.zeros((1, 6, 2)), tf.zeros((1, 4, 2)), tf.ones((1, 4, 3))).shape
        TensorShape([1, 6, 3])
    """
    return attend_with_map(query, key, value, block_size=block_size)[0]


def attend_with_map(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, *, block_size: int | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """As `attend`, and the map (…, N, M), whose rows are output positions and sum to 1.

    Example:
        >>> attend_with_map(tf.zeros((1, 6, 2)), tf.zeros((1, 4, 2)), tf.ones((1, 4, 3)))[1].shape
        TensorShape([1, 6, 4])
    """
    operands = (query, key, value)
    check_operands(*(operand.shape for operand in operands), dtypes=[operand.dtype for operand in operands])
    block_rows(block_size, 1, 1, 1)
    arithmetic = query.dtype if query.dtype.size > 2 else tf.float32
    scores = tf.matmul(tf.cast(query, arithmetic), tf.cast(key, arithmetic), transpose_b=True)
    attention = tf.cast(tf.nn.softmax(scores, axis=-1), value.dtype)
    return tf.matmul(attention, value), attention
