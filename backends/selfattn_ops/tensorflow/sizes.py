"""Sizes that may be known only when a graph runs: an int where a size is known, a scalar int64 tensor where it is not."""

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
    # Products of sizes pass 32 bits, a size does not: slices count in 32, and tf.shape refuses what is beyond them.
    running = tf.cast(tf.shape(tensor), tf.int64)
    return [running[axis] if size is None else size for axis, size in enumerate(known)]


def shape_of(sizes: Sequence[Size], dtype: tf.DType = tf.int64) -> tf.Tensor:
    """Sizes as a tensor."""
    return tf.stack([tf.cast(size, dtype) for size in sizes])


def largest(one: Size, other: Size) -> Size:
    """The larger of two sizes."""
    known = isinstance(one, int) and isinstance(other, int)
    return max(one, other) if known else tf.maximum(tf.cast(one, tf.int64), tf.cast(other, tf.int64))


def smallest(one: Size, other: Size) -> Size:
    """The smaller of two sizes."""
    known = isinstance(one, int) and isinstance(other, int)
    return min(one, other) if known else tf.minimum(tf.cast(one, tf.int64), tf.cast(other, tf.int64))
