"""The code blocks of the README are run as a reader would run them, one process a block."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import blocks_of, failures

ROOT = Path(__file__).parents[1]
BLOCKS = [(block.title, block.code) for block in blocks_of(ROOT / "README.md") if block.language == "python"]


@pytest.mark.parametrize(
    "backend",
    [
        "jax",
        pytest.param("tensorflow", marks=pytest.mark.slow),
        pytest.param("torch", marks=pytest.mark.slow),
    ],
)
def test_the_keras_block(backend):
    assert not failures([block for block in BLOCKS if block[0] == "keras"], KERAS_BACKEND=backend)


@pytest.mark.parametrize(
    ("label", "code"), [block for block in BLOCKS if block[0] != "keras"], ids=lambda text: text[:11]
)
def test_the_other_blocks(label, code):
    assert not failures([(label, code)])


def test_every_framework_has_a_block():
    assert {label for label, _ in BLOCKS} == {"torch", "keras", "flax", "torch flax", "core"}


def test_the_backend_of_the_readme_is_conformant(tmp_path):
    (code,) = [code for label, code in BLOCKS if label == "core"]
    (tmp_path / "readme_backend.py").write_text(code, encoding="utf-8")
    command = "from selfattn_core.cli import main; main(['conform', 'readme_backend:Backend'])"
    result = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_targets_of_the_makefile_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    named = set(re.findall(r"`make ([a-z]+)`", text)) | set(re.findall(r"^make ([a-z]+)", text, re.M))
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.M))
