"""The devices that each framework sees, which only a process that imports it can say."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from selfattn_core.conformance.environment import shared_accelerator

__all__ = ["devices_of"]

_LONGEST_SECONDS = 120


def devices_of(frameworks: Sequence[str]) -> dict[str, str]:
    """What each framework sees, in words: the names of devices and their models, or why that cannot be said.

    Args:
        frameworks: that are installed; each is imported in a process of its own, in the environment of this one.

    Example:
        >>> devices_of([])
        {}
    """
    if not frameworks:
        return {}
    with ThreadPoolExecutor(len(frameworks)) as pool:
        return dict(zip(frameworks, pool.map(_seen, frameworks), strict=True))


def _seen(framework: str) -> str:
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "selfattn_ops.devices", framework],
            env={**shared_accelerator(), **os.environ, **quiet},
            capture_output=True,
            text=True,
            timeout=_LONGEST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"its devices are not known: no answer in {_LONGEST_SECONDS} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return f"its devices are not known: {last}"
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return "on " + ", ".join(f"{name} ({model})" for name, model in found.items())
