"""Attention that computes the whole map at once, in plain operations."""

import tensorflow as tf

__all__ = ["arithmetic_of", "dense_attention", "softmax_scores"]


def dense_attention(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The output and the map."""
    wide = arithmetic_of(query.dtype)
    attention = tf.cast(softmax_scores(tf.cast(query, wide), tf.cast(key, wide)), value.dtype)
    return tf.matmul(attention, value), attention


def arithmetic_of(dtype: tf.DType) -> tf.DType:
    """The dtype of the computation, which is at least float32."""
    return dtype if dtype.size > 2 else tf.float32


def softmax_scores(query: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """softmax(q kᵀ)."""
    return tf.nn.softmax(tf.matmul(query, key, transpose_b=True))
