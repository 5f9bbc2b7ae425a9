"""An editable install, as a type checker sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USER = """
from selfattn_core import SelfAttentionConfig
from selfattn_torch import SelfAttention2d

layer = SelfAttention2d(64)
right: SelfAttentionConfig = layer.config
wrong: str = layer.config.channels
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment that has the checkout installed as editable."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", "-e", ROOT], check=True
    )
    return python


def test_an_editable_install_shows_the_same_names(python, tmp_path):
    script = """
from importlib.util import find_spec
names = ["core", "ops", "torch", "keras", "flax"]
print(*(name for name in ["selfattn", *(f"selfattn_{name}" for name in names)] if find_spec(name)))
print(*(name for name in ("backends", "tests", "benchmarks", "examples", "docs") if find_spec(name)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "selfattn selfattn_core selfattn_ops selfattn_torch selfattn_keras selfattn_flax\n\n"
    )


def errors(python: Path, folder: Path, **environment: str) -> list[str]:
    """The codes of what mypy has against a user's file."""
    (folder / "user.py").write_text(USER, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "--follow-imports", "silent"]
    done = subprocess.run(
        [*command, "user.py"],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return [line.rpartition("[")[2].rstrip("]") for line in done.stdout.splitlines() if "error:" in line]


def test_mypy_follows_an_editable_install_by_mypypath(python, tmp_path):
    # If this changes, CONTRIBUTING need not tell of MYPYPATH any more.
    assert errors(python, tmp_path) == ["import-not-found", "import-not-found"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    assert errors(python, tmp_path, MYPYPATH=path) == ["assignment"]
