"""The function and its first and second derivatives, computed one block of query rows at a time."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from selfattn_ops.tensorflow.blocks import Parts, in_blocks
from selfattn_ops.tensorflow.dense import arithmetic_of, softmax_scores
from selfattn_ops.tensorflow.products import factor_of, reads_output, with_ones, with_shift
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
    block_size: int | None,
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    output: tf.Tensor,
    g: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    """The gradients of o = A v: dS = A∘(dA − D) with D = rowsum(A∘dA) = rowsum(o∘G)."""
    dtype, wide, narrow = query.dtype, arithmetic_of(query.dtype), factor_of(query)
    shifted, values, centre = _centring(output, tf.cast(g, narrow), tf.cast(value, narrow))

    def block(by_row: Sequence[tf.Tensor], by_element: Sequence[tf.Tensor]) -> Parts:
        (q, g, shifted), (k, wide_k, values) = by_row, by_element
        a = tf.cast(softmax_scores(tf.cast(q, wide), wide_k), narrow)
        ds = a * centre(a, shifted, values)
        # dk is summed as (Dk, M). As (M, Dk) this product takes twice the time, because Dk is small.
        return [tf.matmul(ds, k)], [
            tf.cast(tf.matmul(q, ds, transpose_a=True), wide),
            tf.cast(tf.matmul(a, g, transpose_a=True), wide),
        ]

    query, factor, value, g = (tf.cast(operand, narrow) for operand in (query, key, value, g))
    by_row = [query, g, shifted]
    by_element = [factor, tf.cast(key, wide), values]
    sums = [sizes_of(key)[:0:-1], sizes_of(value)[1:]]
    dq, dk, dv = in_blocks(block_size, block, by_row, by_element, [narrow], sums, wide)
    return tuple(tf.cast(gradient, dtype) for gradient in (dq, _turned(dk), dv))


def second(
    block_size: int | None,
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    output: tf.Tensor,
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
    dtype, wide, narrow = query.dtype, arithmetic_of(query.dtype), factor_of(query)
    shifted, values, centre = _centring(output, tf.cast(g, narrow), tf.cast(value, narrow))

    def block(by_row: Sequence[tf.Tensor], by_element: Sequence[tf.Tensor]) -> Parts:
        (q, g, q_dot, shifted), (k, wide_k, v, k_dot, v_dot, both_keys, keys, values, values_dot) = (
            by_row,
            by_element,
        )
        a = tf.cast(softmax_scores(tf.cast(q, wide), wide_k), narrow)
        centred = centre(a, shifted, values)
        both = tf.concat([q_dot, q], -1)
        u = _rowsum(tf.cast(both, wide) * tf.cast(tf.matmul(a, both_keys), wide))
        a_dot = a * tf.matmul(with_shift(both, u), keys, transpose_b=True)
        o_dot = tf.cast(tf.matmul(a_dot, v), wide) + tf.cast(tf.matmul(a, v_dot), wide)
        x = _rowsum(tf.cast(g, wide) * o_dot)
        ds_dot = a_dot * centred + a * tf.matmul(with_shift(g, x), values_dot, transpose_b=True)
        ds = a * centred
        return (
            [tf.cast(tf.matmul(ds_dot, k), wide) + tf.cast(tf.matmul(ds, k_dot), wide), o_dot],
            [
                tf.cast(tf.matmul(q, ds_dot, transpose_a=True), wide)
                + tf.cast(tf.matmul(q_dot, ds, transpose_a=True), wide),
                tf.cast(tf.matmul(a_dot, g, transpose_a=True), wide),
            ],
        )

    query, factor, value, g, q_dot, k_dot, v_dot = (
        tf.cast(operand, narrow) for operand in (query, key, value, g, q_dot, k_dot, v_dot)
    )
    keys = tf.concat([factor, k_dot], -1)
    by_row = [query, g, q_dot, shifted]
    by_element = [
        factor,
        tf.cast(key, wide),
        value,
        k_dot,
        v_dot,
        keys,
        with_ones(keys),
        values,
        with_ones(v_dot),
    ]
    sums = [sizes_of(key)[:0:-1], sizes_of(value)[1:]]
    to_q, to_g, to_k, to_v = in_blocks(block_size, block, by_row, by_element, [wide, wide], sums, wide)
    return tuple(tf.cast(gradient, dtype) for gradient in (to_q, _turned(to_k), to_v, to_g))


def _centring(
    output: tf.Tensor, g: tf.Tensor, value: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]]:
    """Operands by row and by element, and the function that makes dA − D of a map and blocks of the two."""
    if reads_output(output, g.dtype):
        wide = arithmetic_of(g.dtype)
        shift = _rowsum(tf.cast(output, wide) * tf.cast(g, wide))
        return with_shift(g, shift), with_ones(value), lambda _, g, v: tf.matmul(g, v, transpose_b=True)

    def centre(a: tf.Tensor, g: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        da = tf.matmul(g, v, transpose_b=True)
        return da - _rowsum(a * da)

    return g, value, centre


def _rowsum(scores: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(scores, axis=-1, keepdims=True)


def _turned(matrix: tf.Tensor) -> tf.Tensor:
    return tf.linalg.matrix_transpose(matrix)
