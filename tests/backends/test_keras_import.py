"""What `import selfattn_keras` needs, says and changes on each Keras backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*arguments, **environment):
    """Run a Python process that finds the packages as this one does."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_X64"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


# As if the module were not on the disk; None in sys.modules would make of it one that is there and no package.
HIDE = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
def find_all_but_one(name, *rest):
    return None if name in {modules!r} else find(name, *rest)
importlib.machinery.PathFinder.find_spec = find_all_but_one
import selfattn_keras
"""


@pytest.mark.parametrize(
    ("backend", "modules", "help_"),
    [
        ("tensorflow", ["keras"], "'selfattn[keras-tensorflow]'"),
        ("jax", ["keras"], "'selfattn[keras-jax]'"),
        ("", ["keras"], "'selfattn[keras]'"),
        (
            "tensorflow",
            ["tensorflow"],
            "'selfattn[keras-tensorflow]', or set KERAS_BACKEND to jax or torch, which Keras can run on here",
        ),
        (
            "",
            ["tensorflow", "torch"],
            "'selfattn[keras-tensorflow]', or set KERAS_BACKEND to jax, which Keras can run on here",
        ),
        ("jax", ["jax", "tensorflow", "torch"], "'selfattn[keras-jax]'"),
        ("torch", ["torch", "tensorflow", "jax"], "'selfattn[keras-torch]'"),
    ],
)
def test_what_is_not_installed_is_named(backend, modules, help_):
    done = python("-c", HIDE.format(modules=modules), KERAS_BACKEND=backend)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"selfattn_core.installed.NotInstalledError: selfattn_keras needs {modules[0]}, which is not installed: pip install {help_}"
    )


def test_another_missing_module_speaks_for_itself():
    done = python("-c", HIDE.format(modules=["optree"]), KERAS_BACKEND="tensorflow")
    assert done.returncode == 1
    assert "optree" in done.stderr
    assert "selfattn[" not in done.stderr


def test_a_keras_backend_that_has_no_core_is_refused():
    done = python("-c", "import selfattn_keras", KERAS_BACKEND="numpy")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: selfattn_keras: got the Keras backend 'numpy'; expected tensorflow, jax or torch: "
        "set KERAS_BACKEND to one of them before keras is imported."
    )


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_importing_changes_no_setting_and_loads_one_core(backend):
    script = """
import random, sys, keras
settings = lambda: (keras.config.floatx(), keras.config.image_data_format(), keras.config.dtype_policy().name,
                    keras.config.epsilon(), random.getstate())
before = settings()
import selfattn_keras
assert settings() == before
print(*sorted({name.split(".")[1] for name in sys.modules if name.startswith("selfattn_ops.")}))
"""
    done = python("-c", script, KERAS_BACKEND=backend)
    assert done.stdout.split() == sorted(["blocks", backend]), done.stderr
