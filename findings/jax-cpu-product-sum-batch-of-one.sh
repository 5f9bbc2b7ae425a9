#!/usr/bin/env bash
# On a CPU, JAX takes several times longer for the rows' dot products of one matrix than for those of two.
#
# One would guess: jit fuses (a * b).sum(-1) into one pass over the memory, and a batch of one takes half the time of two.
# What happens: a batch of one takes longer than a batch of two matrices of the same size. XLA gives both, and the
# contraction below, to its CPU library YNNPACK as one fused product and sum. That library is slow at reducing the last axis
# of an array whose first has size 1, and fast where XLA has merged the two. A feature map of one image is such an array.
# What helps: a contraction, jnp.einsum("...ij,...ij->...i", a, b).
#
# Versions: jax 0.10.2 and jaxlib 0.10.2 on a CPU.
# Sources: the compiled programs (`jax.jit(…).lower(…).compile().as_text()`, where the fusion is called ynn_fusion), and
# times of three programs taken by turns in one process.
#
# Output seen (the program prints its own times to standard error):
#   a batch of one takes longer than a batch of two: yes
#   einsum of the batch of one takes less than half of that: yes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet jax==0.10.2 jaxlib==0.10.2
cat > ask.py <<'PY'
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy


def summed(a, b):
    return (a * b).sum(-1)


def contracted(a, b):
    return jnp.einsum("...ij,...ij->...i", a, b)


random = numpy.random.default_rng(0)
arrays = {size: jnp.asarray(random.normal(size=(size, 512, 4096)).astype("float32")) for size in (1, 2)}
programs = {
    "sum of one": (jax.jit(summed), arrays[1]),
    "sum of two": (jax.jit(summed), arrays[2]),
    "einsum of one": (jax.jit(contracted), arrays[1]),
}
times = {name: [] for name in programs}
for turn in range(21):
    for name, (program, array) in programs.items():
        start = time.perf_counter()
        program(array, array).block_until_ready()
        if turn:
            times[name].append(time.perf_counter() - start)
medians = {name: statistics.median(taken) for name, taken in times.items()}
print({name: f"{median * 1000:.2f} ms" for name, median in medians.items()}, file=sys.stderr)


def answer(holds):
    return "yes" if holds else "no"


print("a batch of one takes longer than a batch of two:", answer(medians["sum of one"] > medians["sum of two"]))
print(
    "einsum of the batch of one takes less than half of that:",
    answer(medians["einsum of one"] < medians["sum of one"] / 2),
)
PY
seen=$(JAX_PLATFORMS=cpu env/bin/python ask.py)
echo "$seen"
expected='a batch of one takes longer than a batch of two: yes
einsum of the batch of one takes less than half of that: yes'
[ "$seen" = "$expected" ] || { echo "this has changed; expected:"; echo "$expected"; exit 1; }
