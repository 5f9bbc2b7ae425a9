"""The function and its first and second derivatives, computed one block of query rows at a time."""

from collections.abc import Sequence

import tensorflow as tf

from selfattn_ops.tensorflow.blocks import Parts, in_blocks
from selfattn_ops.tensorflow.dense import arithmetic_of, softmax_scores
from selfattn_ops.tensorflow.sizes import sizes_of

__all__ = ["backward", "forward", "second"]


def forward(block_size: int | None, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """The output."""
    wide = arithmetic_of(query.dtype)

    def block(by_row: Sequence[tf.Tensor], by_element: Sequence[tf.Tensor]) -> Parts:
        (q,), (k, v) = by_row, by_element
        return [tf.matmul(tf.cast(softmax_scores(q, k), v.dtype), v)], []

    return in_blocks(block_size, block, [tf.cast(query, wide)], [tf.cast(key, wide), value], [value.dtype])[0]


def backward(
    block_size: int | None, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, g: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """The gradients of o = A v: with D = rowsum(A∘dA), dS = A∘(dA − D)."""
    dtype, wide = query.dtype, arithmetic_of(query.dtype)

    def block(by_row: Sequence[tf.Tensor], by_element: Sequence[tf.Tensor]) -> Parts:
        (q, g), (k, v) = by_row, by_element
        a = softmax_scores(q, k)
        da = tf.matmul(g, v, transpose_b=True)
        ds = a * (da - _rowsum(a * da))
        # dk is summed as (Dk, M). As (M, Dk) this product takes twice the time, because Dk is small.
        return [tf.matmul(ds, k)], [tf.matmul(q, ds, transpose_a=True), tf.matmul(a, g, transpose_a=True)]

    query, key, value, g = (tf.cast(operand, wide) for operand in (query, key, value, g))
    sums = [sizes_of(key)[:0:-1], sizes_of(value)[1:]]
    dq, dk, dv = in_blocks(block_size, block, [query, g], [key, value], [wide], sums)
    return tuple(tf.cast(gradient, dtype) for gradient in (dq, _turned(dk), dv))


def second(
    block_size: int | None,
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    g: tf.Tensor,
    q_dot: tf.Tensor,
    k_dot: tf.Tensor,
    v_dot: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    """The gradients of `backward` for q, k, v and G, given cotangents q̇, k̇, v̇ of dq, dk, dv.

        U = q̇ kᵀ + q k̇ᵀ    Ȧ = A∘(U − rowsum(A∘U))    X = (U − u)∘(dA − D) + G v̇ᵀ    dṠ = A∘(X − rowsum(A∘X))
        dṠ k + dS k̇    dṠᵀ q + dSᵀ q̇    Ȧᵀ G    Ȧ v + A v̇

    It consists of plain operations, so that a third derivative exists. The third derivative keeps every block.
    """
    dtype, wide = query.dtype, arithmetic_of(query.dtype)

    def block(by_row: Sequence[tf.Tensor], by_element: Sequence[tf.Tensor]) -> Parts:
        (q, g, q_dot), (k, v, k_dot, v_dot, both_keys, keys, values) = by_row, by_element
        a = softmax_scores(q, k)
        da = tf.matmul(g, v, transpose_b=True)
        centred = da - _rowsum(a * da)
        ds = a * centred
        both = tf.concat([q_dot, q], -1)
        u = _rowsum(both * tf.matmul(a, both_keys))
        a_dot = a * tf.matmul(tf.concat([both, -u], -1), keys, transpose_b=True)
        o_dot = tf.matmul(a_dot, v) + tf.matmul(a, v_dot)
        x = _rowsum(g * o_dot)
        ds_dot = a_dot * centred + a * tf.matmul(tf.concat([g, -x], -1), values, transpose_b=True)
        return (
            [tf.matmul(ds_dot, k) + tf.matmul(ds, k_dot), o_dot],
            [
                tf.matmul(q, ds_dot, transpose_a=True) + tf.matmul(q_dot, ds, transpose_a=True),
                tf.matmul(a_dot, g, transpose_a=True),
            ],
        )

    query, key, value, g, q_dot, k_dot, v_dot = (
        tf.cast(operand, wide) for operand in (query, key, value, g, q_dot, k_dot, v_dot)
    )
    ones = tf.ones_like(key[..., :1])
    keys = tf.concat([key, k_dot], -1)
    by_element = [key, value, k_dot, v_dot, keys, tf.concat([keys, ones], -1), tf.concat([v_dot, ones], -1)]
    sums = [sizes_of(key)[:0:-1], sizes_of(value)[1:]]
    to_q, to_g, to_k, to_v = in_blocks(block_size, block, [query, g, q_dot], by_element, [wide, wide], sums)
    return tuple(tf.cast(gradient, dtype) for gradient in (to_q, _turned(to_k), to_v, to_g))


def _rowsum(scores: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(scores, axis=-1, keepdims=True)


def _turned(matrix: tf.Tensor) -> tf.Tensor:
    return tf.linalg.matrix_transpose(matrix)
