#!/usr/bin/env bash
# Keras on PyTorch: matrix products of float64 tensors are float32, with float32's error.
#
# One would guess: keras.ops keep the dtype of their operands on PyTorch, which has float64, as ops.add does.
# What happens: ops.matmul, ops.dot and ops.tensordot cast both operands to float32. ops.einsum, ops.add and ops.softmax
# keep float64. On TensorFlow all of them do. A float64 Dense layer adds a float64 bias to a float32 product: its result is
# float64 by name and has the error of float32.
# What helps: ops.einsum, or the product of torch itself.
#
# Versions: keras 3.15.1 on torch 2.13.0.
# Sources: https://github.com/keras-team/keras/issues/23704, which plans another change: later versions give float32 from
# ops.add as well.
#
# Output seen (the largest error of a 3×200 by 200×4 product, rounded to a power of ten):
#   matmul float32, dot float32, tensordot float32, einsum float64, add float64
#   Dense: float64, error 1e-5; einsum: error 1e-14
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet keras==3.15.1 torch==2.13.0
cat > ask.py <<'PY'
import math

import keras
import numpy

random = numpy.random.default_rng(0)
a, b = random.normal(size=(3, 200)), random.normal(size=(200, 4))
x, w = (keras.ops.convert_to_tensor(array, dtype="float64") for array in (a, b))
products = {
    "matmul": keras.ops.matmul(x, w),
    "dot": keras.ops.dot(x, w),
    "tensordot": keras.ops.tensordot(x, w, 1),
    "einsum": keras.ops.einsum("ij,jk->ik", x, w),
    "add": keras.ops.add(x, x),
}
print(", ".join(f"{name} {keras.backend.standardize_dtype(y.dtype)}" for name, y in products.items()))
layer = keras.layers.Dense(4, dtype="float64")
layer.build((None, 200))
layer.kernel.assign(b)
dense = layer(x)


def error(y):
    worst = numpy.abs(keras.ops.convert_to_numpy(y).astype("float64") - a @ b).max()
    return f"1e{round(math.log10(worst))}" if worst else "0"


print(f"Dense: {keras.backend.standardize_dtype(dense.dtype)}, error {error(dense)}; einsum: error {error(products['einsum'])}")
PY
seen=$(KERAS_BACKEND=torch env/bin/python ask.py 2> errors.log)
echo "$seen"
expected='matmul float32, dot float32, tensordot float32, einsum float64, add float64
Dense: float64, error 1e-5; einsum: error 1e-14'
[ "$seen" = "$expected" ] || { echo "this has changed; expected:"; echo "$expected"; exit 1; }
