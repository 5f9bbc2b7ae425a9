#!/usr/bin/env bash
# Under XLA, the second derivative of TensorFlow's max pooling chooses the largest entry of a window in 16 bits.
#
# One would guess: tf.function(jit_compile=True) gives the derivatives of the same function as without it.
# What happens: the output and the first derivative are right. The second derivative finds the largest entry of a window
# by the upper 16 bits of each float32 number. If the two largest entries agree in these, it may take the other one, whose
# first derivative is zero: the window's contribution is missing. No warning. A gradient penalty through a max pooling
# meets this in a few windows of a thousand. In other dtypes than float32 the function does not compile.
# What helps: without jit_compile the second derivative is right. So is a maximum of slices (tf.maximum).
#
# Versions: tensorflow 2.21.0 on a CPU.
# Sources: MaxPoolGradGradOp in tensorflow/compiler/tf2xla/kernels/pooling_ops.cc, where a comment calls it a hack: the
# upper half of a 32-bit number holds the entry, the lower half one half of the gradient.
#
# Output seen (windows (1.000, 1.001, 0, 0), then (1.00, 1.01, 0, 0); the derivative belongs to the second entry):
#   eager 1.001: output [1.001], first [0, 2.002, 0, 0], second [0, 8.008, 0, 0]
#   XLA   1.001: output [1.001], first [0, 2.002, 0, 0], second [0, 0, 0, 0]
#   eager 1.010: output [1.010], first [0, 2.020, 0, 0], second [0, 8.080, 0, 0]
#   XLA   1.010: output [1.010], first [0, 2.020, 0, 0], second [0, 8.080, 0, 0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet tensorflow==2.21.0
cat > ask.py <<'PY'
import tensorflow as tf


def derivatives(x):
    """The pooled maximum m, the gradient of m², and the gradient of that gradient's squared length."""
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            pooled = tf.nn.max_pool2d(x, 2, 2, "VALID")
            square = tf.reduce_sum(pooled**2)
        first = inner.gradient(square, x)
        length = tf.reduce_sum(first**2)
    return pooled, first, outer.gradient(length, x)


def listed(values):
    return "[" + ", ".join(f"{value:.3f}" if value else "0" for value in values.numpy().ravel()) + "]"


for largest in (1.001, 1.01):
    x = tf.reshape(tf.constant([1.0, largest, 0.0, 0.0]), (1, 2, 2, 1))
    for name, ask in (("eager", derivatives), ("XLA  ", tf.function(derivatives, jit_compile=True))):
        pooled, first, second = ask(x)
        print(f"{name} {largest:.3f}: output {listed(pooled)}, first {listed(first)}, second {listed(second)}")
PY
seen=$(TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES='' env/bin/python ask.py 2> errors.log)
echo "$seen"
expected='eager 1.001: output [1.001], first [0, 2.002, 0, 0], second [0, 8.008, 0, 0]
XLA   1.001: output [1.001], first [0, 2.002, 0, 0], second [0, 0, 0, 0]
eager 1.010: output [1.010], first [0, 2.020, 0, 0], second [0, 8.080, 0, 0]
XLA   1.010: output [1.010], first [0, 2.020, 0, 0], second [0, 8.080, 0, 0]'
[ "$seen" = "$expected" ] || { echo "this has changed; expected:"; echo "$expected"; exit 1; }
