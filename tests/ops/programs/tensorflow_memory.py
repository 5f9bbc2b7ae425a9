"""Peak memory above the inputs, in bytes, of first and then second derivatives at ascending sizes, as JSON."""

import ctypes
import json
import sys
from functools import partial

import numpy as np
import tensorflow as tf

from selfattn_core.conformance.questions.peak_memory import peak_growth
from selfattn_ops.tensorflow import attend

QK_WIDTH, VALUE_WIDTH = 4, 24


def operands(positions):
    rng = np.random.default_rng(7)
    widths = (QK_WIDTH, QK_WIDTH, VALUE_WIDTH, VALUE_WIDTH)
    return [tf.constant(rng.normal(size=(1, positions, width)), tf.float32) for width in widths]


def derivative(order, attend):
    def first(query, key, value, cotangent):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            output = attend(query, key, value)
        return tape.gradient(output, [query, key, value], output_gradients=cotangent)

    def second(query, key, value, cotangent):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value, cotangent])
            gradients = first(query, key, value, cotangent)
            penalty = tf.add_n([tf.reduce_sum(gradient**2) for gradient in gradients])
        return tape.gradient(penalty, [query, key, value, cotangent])

    return first if order == 1 else second


def main(mode, *sizes):
    answer = {}
    for order in (1, 2):
        run = derivative(order, tf.function(attend) if mode == "inside" else attend)
        if mode == "function":
            run = tf.function(run)
        run(*operands(64))
        inputs = {size: operands(size) for size in map(int, sizes)}
        for size, each in inputs.items():
            # Or what earlier calls have freed would be taken again, and not be seen.
            ctypes.CDLL(None).malloc_trim(0)
            answer[f"{order} {size}"] = peak_growth(partial(run, *each))
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
