"""The devices that each framework sees. Only a process that imports the framework can list them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from selfattn_core.conformance.execution.environment import shared_accelerator

__all__ = ["devices_of", "seen"]

_LONGEST_SECONDS = 120


def devices_of(frameworks: Sequence[str]) -> dict[str, str]:
    """A description of the devices that each framework sees, or the reason why they are unknown.

    Args:
        frameworks: the installed frameworks.

    Example:
        >>> devices_of([])
        {}
    """
    if not frameworks:
        return {}
    with ThreadPoolExecutor(len(frameworks)) as pool:
        return dict(zip(frameworks, pool.map(_in_words, frameworks), strict=True))


def seen(framework: str, variables: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """The devices that a framework sees, with their kinds in the framework's words and their models.

    Args:
        framework: an installed framework. A separate process imports it.
        variables: further environment variables of that process. None removes a variable.

    Returns:
        {"kinds": {word: names}, "models": {name: model}}.

    Raises:
        RuntimeError: if the process does not answer.
    """
    quiet = {**shared_accelerator(), **os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(variables or {})}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "selfattn_ops.devices", framework],
            env={name: value for name, value in quiet.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=_LONGEST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"its devices are not known: no answer in {_LONGEST_SECONDS} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise RuntimeError(f"its devices are not known: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _in_words(framework: str) -> str:
    try:
        models = seen(framework)["models"]
    except RuntimeError as error:
        return str(error)
    return "on " + ", ".join(f"{name} ({model})" for name, model in models.items())
