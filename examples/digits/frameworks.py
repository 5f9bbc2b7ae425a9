"""The logits of the held-out images from each framework, computed in separate processes."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.digits import files
from selfattn_core.conformance.backends import REGISTRY
from selfattn_core.installed import missing_modules

Array = NDArray[Any]

PROGRAMS: Mapping[str, str] = {
    "torch": "examples.digits.torch_model",
    "keras-tensorflow": "examples.digits.keras_model",
    "keras-jax": "examples.digits.keras_model",
    "keras-torch": "examples.digits.keras_model",
    "flax-nnx": "examples.digits.nnx_model",
    "flax-linen": "examples.digits.linen_model",
}
"""The program that scores the images, by the framework's name in `selfattn backends`."""

_ENVIRONMENT: Mapping[str, str] = {
    # Accelerators round float32 products by default, but this example compares the last bits.
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_ROOT = Path(__file__).parents[2]
_TIMEOUT = 300.0


@dataclass(frozen=True)
class Answer:
    """The answer of a framework.

    Args:
        framework: name of the framework.
        logits: (B, 10), or None if there are none.
        problem: why there are none.
        missing: whether the framework is not installed.
    """

    framework: str
    logits: Array | None = None
    problem: str = ""
    missing: bool = False


def ask(framework: str, folder: Path) -> Answer:
    """Start the framework's program and wait for its logits.

    Args:
        framework: one of `PROGRAMS`.
        folder: folder with the files that `files` describes.
    """
    registered = REGISTRY[framework]
    if missing := missing_modules(registered.requires):
        install = f"pip install 'selfattn[{registered.extra}]'"
        return Answer(framework, problem=f"{', '.join(missing)} not installed: {install}", missing=True)
    result = files.logits_file(folder, framework)
    # Remove the answer of an earlier run, so that it cannot replace a missing answer.
    result.unlink(missing_ok=True)
    log = folder / f"{framework}.log"
    with log.open("wb") as output:
        try:
            process = subprocess.run(
                [sys.executable, "-m", PROGRAMS[framework], str(folder.resolve()), framework],
                cwd=_ROOT,
                env={**os.environ, **_ENVIRONMENT, **registered.in_full},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Answer(framework, problem=f"no answer in {_TIMEOUT:g} s, see {log}")
    if process.returncode != 0 or not result.exists():
        return Answer(framework, problem=f"{_last_line(log)} (exit code {process.returncode}, see {log})")
    return Answer(framework, np.load(result))


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
