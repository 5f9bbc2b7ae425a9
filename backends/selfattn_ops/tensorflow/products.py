"""The factors of products with the map and its derivatives: their dtype, and a row's shift as further columns."""

import os
from functools import cache
from pathlib import Path

import tensorflow as tf

from selfattn_ops.tensorflow.blocks import device_kind
from selfattn_ops.tensorflow.dense import arithmetic_of

__all__ = ["factor_of", "multiplies_bfloat16", "reads_output", "with_ones", "with_shift"]

# As many keep rows of bfloat16 aligned to 16 bytes. Products of rows that are not take a tenth longer.
_NARROW_COLUMNS = 8

# A bfloat16 holds 8 bits of the fraction, so three of them hold a float32.
_PARTS = 3

# Wider outputs take longer to compute than they save, where only a derivative needs them.
_WIDEST_OUTPUT = 256


def factor_of(operand: tf.Tensor) -> tf.DType:
    """The dtype of factors of products with the map and its derivatives, in a derivative of this operand.

    It is bfloat16 where the device multiplies that faster, and else at least float32. The choice is that of the machine
    that traces a `tf.function`. Another machine computes the same, perhaps more slowly.
    """
    if operand.dtype == tf.bfloat16 and (device_kind(operand) != "cpu" or multiplies_bfloat16()):
        return tf.bfloat16
    return arithmetic_of(operand.dtype)


@cache
def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is worth its casts on this processor. It is with AMX, and not with AVX512_BF16 alone.

    TensorFlow does not tell, so this reads what the processor has, and the variables that hold TensorFlow and oneDNN back.
    """
    information = Path("/proc/cpuinfo")
    has_tiles = information.exists() and " amx_bf16" in information.read_text(encoding="utf-8")
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    uses_tiles = held in ("", "ALL", "DEFAULT") or "AMX" in held
    return has_tiles and uses_tiles and os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"


def reads_output(output: tf.Tensor, factor: tf.DType) -> bool:
    """Whether derivatives compute D from the output, which saves passes over the scores.

    An output of fewer bits than the factors would lose what they keep.
    """
    width = output.shape[-1]
    narrow_enough = factor == tf.bfloat16 or (width is not None and width <= _WIDEST_OUTPUT)
    return output.dtype == factor and narrow_enough


def with_ones(rows: tf.Tensor) -> tf.Tensor:
    """(B, M, D) to (B, M, D + columns), for a product with the result of `with_shift`."""
    return tf.concat([rows, *[tf.ones_like(rows[..., :1])] * _columns(rows.dtype)], -1)


def with_shift(rows: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """(B, N, D) and (B, N, 1) to (B, N, D + columns), whose product with `with_ones(other)` is rows · otherᵀ − shift.

    In bfloat16 the shift is a sum of columns, as exact as float32. The difference is then rounded once, after the terms
    have cancelled, and takes no pass over the scores.
    """
    if rows.dtype == shift.dtype:
        return tf.concat([rows, -shift], -1)
    columns = []
    for _ in range(_PARTS):
        column = tf.cast(shift, rows.dtype)
        columns.append(-column)
        shift = shift - tf.cast(column, shift.dtype)
    unused = [tf.zeros_like(columns[0])] * (_NARROW_COLUMNS - _PARTS)
    return tf.concat([rows, *columns, *unused], -1)


def _columns(dtype: tf.DType) -> int:
    return _NARROW_COLUMNS if dtype == tf.bfloat16 else 1
