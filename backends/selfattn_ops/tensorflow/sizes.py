"""Sizes of tensors: an int, or a scalar int64 tensor for a size that only the running graph knows."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

__all__ = ["Size", "largest", "shape_of", "sizes_of", "smallest"]

Size = Any


def sizes_of(tensor: tf.Tensor) -> list[Size]:
    """The sizes of a tensor."""
    known = tensor.shape.as_list()
    if None not in known:
        return known
    # Products of sizes can exceed 32 bits, so sizes are int64. A single size cannot: slices count in 32 bits, and tf.shape
    # refuses larger sizes.
    running = tf.cast(tf.shape(tensor), tf.int64)
    return [running[axis] if size is None else size for axis, size in enumerate(known)]


def shape_of(sizes: Sequence[Size], dtype: tf.DType = tf.int64) -> tf.Tensor:
    """Sizes as a tensor."""
    if all(isinstance(size, int) for size in sizes):
        return tf.constant(sizes, dtype)
    return tf.stack([tf.cast(size, dtype) for size in sizes])


def largest(one: Size, other: Size) -> Size:
    """The larger of two sizes."""
    known = isinstance(one, int) and isinstance(other, int)
    return max(one, other) if known else tf.maximum(tf.cast(one, tf.int64), tf.cast(other, tf.int64))


def smallest(one: Size, other: Size) -> Size:
    """The smaller of two sizes."""
    known = isinstance(one, int) and isinstance(other, int)
    return min(one, other) if known else tf.minimum(tf.cast(one, tf.int64), tf.cast(other, tf.int64))
