"""The examples in docstrings are run, each package in a process of its own; those of Keras in `backends/keras`."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import doctest, importlib, pkgutil, sys
failed = tried = 0
package = importlib.import_module(sys.argv[1])
names = [package.__name__]
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    names.append(module.name)
for name in names if len(sys.argv) == 2 else sys.argv[2:]:
    result = doctest.testmod(importlib.import_module(name))
    failed, tried = failed + result.failed, tried + result.attempted
print(tried)
sys.exit(failed > 0)
"""


def examples_of(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Warnings are errors here too; the frameworks' own, raised while they are imported, are not ours to mend.
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | environment,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["selfattn_core"],
        ["selfattn_ops", "selfattn_ops.blocks", "selfattn_ops.torch", "selfattn_ops.devices.torch"],
        ["selfattn_ops", "selfattn_ops.devices.hosts", "selfattn_ops.devices.placed"],
        ["selfattn_ops", "selfattn_ops.jax", "selfattn_ops.devices.jax"],
        ["selfattn_ops", "selfattn_ops.tensorflow", "selfattn_ops.devices.tensorflow"],
        ["selfattn_torch"],
        ["selfattn_flax"],
    ],
    ids=" ".join,
)
def test_examples(arguments):
    result = examples_of(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[-1]) > 0


def test_a_wrong_example_is_noticed(tmp_path):
    package = tmp_path / "wrong_package"
    package.mkdir()
    (package / "__init__.py").write_text('"""Wrong.\n\n>>> 1 + 1\n3\n"""\n', encoding="utf-8")
    assert examples_of("wrong_package", PYTHONPATH=str(tmp_path)).returncode == 1
