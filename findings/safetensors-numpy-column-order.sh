#!/usr/bin/env bash
# safetensors 0.8.0 writes a numpy array that is not in C order with its values in the wrong places.
#
# One would guess: safetensors.numpy.save writes the values that the array shows, as 0.7.0 did, or refuses the array, as
# safetensors.torch does with a tensor that is not contiguous.
# What happens: 0.8.0 takes the memory as it lies and the shape as the array has it. A transposed array or one in Fortran
# order comes back with the right shape and its values permuted. No warning, no error. scikit-learn's PCA gives such
# arrays, and so does a kernel that was transposed on its way to another framework.
# What helps: numpy.ascontiguousarray before saving.
#
# Versions: safetensors 0.7.0 and 0.8.0, numpy 2.4.0.
# Sources: https://github.com/safetensors/safetensors/issues/825
#
# Output seen (the transpose of [[0, 1, 2], [3, 4, 5]]):
#   0.7.0: [[0, 3], [1, 4], [2, 5]]
#   0.8.0: [[0, 1], [2, 3], [4, 5]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
seen=$(for version in 0.7.0 0.8.0; do
    env/bin/python -m pip install --quiet "safetensors==$version" numpy==2.4.0
    env/bin/python - <<'PY'
import numpy
import safetensors
from safetensors.numpy import load, save

transposed = numpy.arange(6, dtype="float32").reshape(2, 3).T
print(f"{safetensors.__version__}: {load(save({'a': transposed}))['a'].astype(int).tolist()}")
PY
done)
echo "$seen"
expected='0.7.0: [[0, 3], [1, 4], [2, 5]]
0.8.0: [[0, 1], [2, 3], [4, 5]]'
[ "$seen" = "$expected" ] || { echo "this has changed; expected:"; echo "$expected"; exit 1; }
