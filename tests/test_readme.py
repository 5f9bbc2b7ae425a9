"""The code blocks of the README are run as a reader would run them, one process a block."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"^```python ?([^\n]*)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
)


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "backend",
    [
        "jax",
        pytest.param("tensorflow", marks=pytest.mark.slow),
        pytest.param("torch", marks=pytest.mark.slow),
    ],
)
def test_the_keras_block(tmp_path, backend):
    (code,) = [code for label, code in BLOCKS if label == "keras"]
    result = run(code, tmp_path, KERAS_BACKEND=backend)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("label", "code"), [block for block in BLOCKS if block[0] != "keras"], ids=lambda text: text[:11]
)
def test_the_other_blocks(tmp_path, label, code):
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_every_framework_has_a_block():
    assert {label for label, _ in BLOCKS} == {"torch", "keras", "flax"}


def test_the_targets_of_the_makefile_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    named = set(re.findall(r"`make ([a-z]+)`", text)) | set(re.findall(r"^make ([a-z]+)", text, re.M))
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.M))


def test_it_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
