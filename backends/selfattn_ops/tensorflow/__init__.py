"""Attention without a scale, for TensorFlow: softmax(q kᵀ) v in memory linear in N, through second derivatives.

Scores exist for one block of query rows at a time, against all keys. Each derivative computes them again, so only query,
key and value are kept. If one block holds everything, plain operations compute the output.
"""

import math

from selfattn_core.installed import require

require("selfattn_ops.tensorflow", ["tensorflow"], "tensorflow")

import tensorflow as tf  # noqa: E402 - the message above must come first

from selfattn_ops.blocks import check_block_size, check_operands  # noqa: E402
from selfattn_ops.tensorflow.autograd import attend_in_blocks  # noqa: E402
from selfattn_ops.tensorflow.blocks import is_single  # noqa: E402
from selfattn_ops.tensorflow.dense import dense_attention  # noqa: E402
from selfattn_ops.tensorflow.sizes import shape_of, sizes_of  # noqa: E402

__all__ = ["attend", "attend_with_map"]


@tf.autograph.experimental.do_not_convert
def attend(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, *, block_size: int | None = None) -> tf.Tensor:
    """Softmax over keys of q kᵀ, times v; no 1/sqrt(d).

    Logits and softmax are computed in at least float32. First and second derivatives never hold more scores than
    one block of query rows. When a `tf.function` is traced, sizes may be unknown but ranks must be known.

    Args:
        query: (…, N, Dk).
        key: (…, M, Dk).
        value: (…, M, Dv).
        block_size: query rows at a time. None chooses by size.

    Returns:
        (…, N, Dv), in the dtype of the operands.

    Raises:
        ValueError: if the operands do not belong together, or `block_size` is not a positive integer.

    Example:
        >>> attend(tf.zeros((1, 6, 2)), tf.zeros((1, 4, 2)), tf.ones((1, 4, 3))).shape
        TensorShape([1, 6, 3])
    """
    query, key, value = _checked(query, key, value, block_size=block_size)
    *leading, rows, _ = sizes_of(query)
    batch = math.prod(leading)
    if is_single(block_size, batch, rows, sizes_of(key)[-2]) is True:
        return dense_attention(query, key, value)[0]
    operands = [
        tf.reshape(operand, shape_of([batch, *sizes_of(operand)[-2:]])) for operand in (query, key, value)
    ]
    output = tf.reshape(
        attend_in_blocks(block_size, *operands), shape_of([*leading, rows, sizes_of(value)[-1]])
    )
    output.set_shape(query.shape[:-1] + value.shape[-1:])
    return output


@tf.autograph.experimental.do_not_convert
def attend_with_map(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, *, block_size: int | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """The output of `attend` and the map (…, N, M). Each row of the map belongs to an output position and sums to 1.

    The map takes quadratic memory, here and in the derivatives, whatever `block_size` is.

    Example:
        >>> attend_with_map(tf.zeros((1, 6, 2)), tf.zeros((1, 4, 2)), tf.ones((1, 4, 3)))[1].shape
        TensorShape([1, 6, 4])
    """
    return dense_attention(*_checked(query, key, value, block_size=block_size))


def _checked(*operands: tf.Tensor, block_size: int | None) -> list[tf.Tensor]:
    tensors = [tf.convert_to_tensor(operand) for operand in operands]
    if any(tensor.shape.rank is None for tensor in tensors):
        raise ValueError(
            "attend: an operand of unknown rank; give its rank with tf.ensure_shape, sizes may be None."
        )
    check_operands(*(tensor.shape for tensor in tensors), dtypes=[tensor.dtype for tensor in tensors])
    check_block_size(block_size)
    return tensors
