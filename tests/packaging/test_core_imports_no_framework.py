"""`import selfattn_core`, all of it, loads no framework; and this proof can fail."""

import subprocess
import sys

FRAMEWORKS = ("torch", "tensorflow", "jax", "keras", "flax", "matplotlib", "h5py", "ml_dtypes")

SCRIPT = """
import importlib, pkgutil, sys
{before}
import selfattn_core
for module in pkgutil.walk_packages(selfattn_core.__path__, "selfattn_core."):
    importlib.import_module(module.name)
print(sorted(set({frameworks!r}) & {{name.partition(".")[0] for name in sys.modules}}))
"""


def frameworks_loaded(before: str = "") -> str:
    script = SCRIPT.format(before=before, frameworks=FRAMEWORKS)
    return subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_core_imports_no_framework():
    assert frameworks_loaded() == "[]"


def test_the_proof_can_fail():
    assert frameworks_loaded(before="import jax") != "[]"
