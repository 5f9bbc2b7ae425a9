"""torch → Keras → NNX → Linen → torch, through files: not one bit changes.

Keras fixes its backend at import, so each of its three has a process of its own.
"""

import inspect
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import selfattn_core
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES

CHAIN = (
    ("selfattn_torch", {}),
    ("selfattn_keras", {"KERAS_BACKEND": "tensorflow"}),
    ("selfattn_keras", {"KERAS_BACKEND": "jax", "JAX_ENABLE_X64": "1"}),
    ("selfattn_keras", {"KERAS_BACKEND": "torch"}),
    ("selfattn_flax", {}),
    ("selfattn_flax.linen", {}),
    ("selfattn_torch", {}),
)
DTYPES = (np.float32, np.float64, np.float16)
# The kit's vectors of spectral norm are of any length, so that whoever makes unit vectors of them is seen.
pytestmark = pytest.mark.filterwarnings("ignore:.*should have the length 1:UserWarning")


def pass_through(adapter, files):
    """Load the first, third, … of the files, and save each to the one that follows it."""
    import importlib

    module = importlib.import_module(adapter)
    for source, target in zip(files[::2], files[1::2], strict=True):
        loaded = module.load(source)
        module.save(*(loaded if isinstance(loaded, tuple) else (loaded,)), target, source=adapter)


def pass_through_process(environment, adapter, files):
    script = f"import sys\n{inspect.getsource(pass_through)}\npass_through(sys.argv[1], sys.argv[2:])"
    result = subprocess.run(
        [sys.executable, "-c", script, adapter, *files],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{adapter} {environment}: {result.stderr}"


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """{(case id, dtype): (parameters put in, parameters that came out)}."""
    folder = tmp_path_factory.mktemp("chain")
    cases = [case for case in CASES if "params" in (case.family, case.of)]
    given = {
        (case.id, np.dtype(dtype).name): (case, inputs(case, dtype).params)
        for case in cases
        for dtype in DTYPES
    }
    for (case_id, dtype), (case, params) in given.items():
        selfattn_core.save(folder / f"0-{case_id}-{dtype}.safetensors", case.config, params)
    for step, (adapter, environment) in enumerate(CHAIN):
        files = [
            str(folder / f"{number}-{case_id}-{dtype}.safetensors")
            for case_id, dtype in given
            for number in (step, step + 1)
        ]
        if environment:
            pass_through_process(environment, adapter, files)
        else:
            with jax.enable_x64(True):
                pass_through(adapter, files)
    return {
        key: (params, selfattn_core.load(folder / f"{len(CHAIN)}-{key[0]}-{key[1]}.safetensors"), case.config)
        for key, (case, params) in given.items()
    }


@pytest.mark.parametrize("dtype", [np.dtype(dtype).name for dtype in DTYPES])
@pytest.mark.parametrize("case_id", [case.id for case in CASES if "params" in (case.family, case.of)])
def test_not_one_bit_changes(ends, case_id, dtype):
    given, (config, found), wanted = ends[case_id, dtype]
    assert config == wanted
    assert list(found) == list(given)
    for name, array in given.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes(), name
