"""Keras on one framework imports neither of the other two: `selfattn[keras-jax]` needs no TensorFlow."""

import os
import subprocess
import sys

import pytest

FRAMEWORKS = ("tensorflow", "jax", "torch")

# The others are on this disk, so they are hidden as if they were not.
SCRIPT = """
import importlib, importlib.machinery, pkgutil, sys
others = {others!r}
find = importlib.machinery.PathFinder.find_spec
def find_no_other(name, *rest):
    return None if name.partition(".")[0] in others else find(name, *rest)
importlib.machinery.PathFinder.find_spec = find_no_other

import keras, numpy as np, selfattn_keras
for module in pkgutil.walk_packages(selfattn_keras.__path__, "selfattn_keras."):
    if module.name.rpartition(".")[2] not in others:
        importlib.import_module(module.name)
{planted}
x = np.random.default_rng(0).standard_normal((2, 6, 4, 8)).astype("float32")
layer = selfattn_keras.SelfAttention2D(kv_pool=2, spectral_norm=True, gamma_initializer="ones")
model = keras.Sequential([keras.Input((None, None, 8)), layer])
model.compile("sgd", "mse")
model.fit(x, x + 1, verbose=0)
y, A = layer(x, return_attention_scores=True)
selfattn_keras.attention_grid(layer, x)
selfattn_keras.save(layer, sys.argv[1] + "/a.safetensors")
twin = selfattn_keras.load(sys.argv[1] + "/a.safetensors")
model.save(sys.argv[1] + "/a.keras")
again = keras.saving.load_model(sys.argv[1] + "/a.keras")
want = selfattn_keras.to_canonical(layer)
for other in (twin, again.layers[-1]):
    assert all((array == want[name]).all() for name, array in selfattn_keras.to_canonical(other).items())
from selfattn_core.conformance.backends import resolve
resolve("selfattn_keras.conformance.backend:backend").versions()
assert not others & set(sys.modules), others & set(sys.modules)
"""


def run(backend: str, folder, planted: str = "") -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(others=set(FRAMEWORKS) - {backend}, planted=planted)
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "backend", [FRAMEWORKS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FRAMEWORKS[1:])]
)
def test_the_other_frameworks_are_not_needed(backend, tmp_path):
    done = run(backend, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_proof_can_fail(tmp_path):
    done = run("jax", tmp_path, planted="import tensorflow")
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'tensorflow'"
