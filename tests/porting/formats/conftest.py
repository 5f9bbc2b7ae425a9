import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """A folder of small checkpoints, each by its own library."""
    folder = tmp_path_factory.mktemp("samples")
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    commands = [
        [sys.executable, "-m", "tests.porting.formats.samples", library, str(folder)]
        for library in ("safetensors", "npz", "torch", "flax", "keras")
    ]
    for command in commands:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
    return folder
