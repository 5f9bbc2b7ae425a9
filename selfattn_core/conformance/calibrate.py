"""How near right backends come to the limits: `python -m selfattn_core.conformance.calibrate [BACKEND …]`.

Every backend answers 200 seeds, each a quarter of the cases in turns, so that a case meets 50 of them. The result is
`calibration.json` beside this file: the worst error in noise floors by backend, family and dtype, and the number of
false alarms, which is to be 0. Where a backend is named, its part of the file alone is measured anew.
"""

import argparse
import datetime as dt
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.answers import answers
from selfattn_core.conformance.backend import REGISTRY, Backend, dtypes_of, resolve
from selfattn_core.conformance.cases import Family, Inputs, inputs
from selfattn_core.conformance.compare import compare
from selfattn_core.conformance.environment import environment
from selfattn_core.conformance.runs import LAYOUTS, Run, all_runs, is_claimed
from selfattn_core.conformance.tolerance import FACTORS
from selfattn_core.weights import write_atomically

Array = NDArray[Any]

__all__ = ["RESULT", "calibrated_runs", "measure"]

RESULT = Path(__file__).with_name("calibration.json")
SEEDS = 200
TURNS = 4

_FAMILIES: tuple[Family, ...] = ("forward", "map", "vjp", "r1", "mixed", "dtype")
_MOST_POSITIONS = 100


def calibrated_runs() -> list[Run]:
    """The runs that are calibrated: values, at sizes that 200 seeds can be had of."""
    return [
        run
        for run in all_runs()
        if run.case.family in _FAMILIES
        and run.case.shape[1] * run.case.shape[2] <= _MOST_POSITIONS
        and run.layout == LAYOUTS[0]
    ]


def measure(backend: Backend, seeds: int) -> dict[str, Any]:
    """The worst errors of a backend, in this process.

    Args:
        backend: which.
        seeds: how many.
    """
    began = time.monotonic()
    claims, layouts, dtypes = backend.claims(), backend.layouts(), dtypes_of(backend)
    runs = [run for run in calibrated_runs() if is_claimed(run, claims, layouts, dtypes)]
    worst: dict[str, dict[str, Any]] = {}
    alarms: list[str] = []
    asked = 0
    kept = _Kept(backend, layouts[0])
    for seed in range(1, seeds + 1):
        for index, run in enumerate(runs):
            if (index + seed) % TURNS:
                continue
            given = inputs(run.case, run.dtype, seed)
            outcome = compare(run, kept.answers(run, given), seed)
            asked += 1
            key = f"{run.case.family}/{run.dtype}"
            if outcome.status != "pass":
                alarms.append(f"{run.id}, seed {seed}: {outcome.message}")
            if outcome.ratio >= worst.get(key, {"floors": 0.0})["floors"]:
                verdict = max(outcome.verdicts, key=lambda verdict: verdict.ratio)
                worst[key] = {
                    "floors": round(outcome.ratio, 3),
                    "case": run.case.id,
                    "quantity": verdict.quantity,
                    "seed": seed,
                }
    return {
        "versions": dict(backend.versions()),
        "seeds": seeds,
        "runs": asked,
        "false_alarms": alarms,
        "worst": dict(sorted(worst.items())),
        "seconds": round(time.monotonic() - began),
    }


class _Kept:
    """A backend that, where it can give other weights to a layer, builds one layer for each case and dtype.

    What a framework has compiled for that layer then serves every seed.
    """

    def __init__(self, backend: Backend, layout: str) -> None:
        self.backend, self.layout = backend, layout
        self.models: dict[tuple[str, str], Any] = {}

    def answers(self, run: Run, given: Inputs) -> Mapping[str, Any]:
        """What the backend says to a run."""
        return answers(_Once(self, run), run.case, given, run.dtype, self.layout)

    def build(self, run: Run, config: SelfAttentionConfig, params: Mapping[str, Array]) -> Any:
        key = (run.case.id, run.dtype)
        backend: Any = self.backend
        if key not in self.models or not hasattr(backend, "update"):
            self.models[key] = backend.build(config, params, run.dtype, self.layout)
            # Operation by operation, JAX compiles anew at every call.
            if "jax" in backend.versions():
                self.models[key] = backend.compiled(self.models[key])
        if hasattr(backend, "update"):
            self.models[key] = backend.update(self.models[key], params)
        return self.models[key]


class _Once:
    """The backend of a `_Kept` for one run."""

    def __init__(self, kept: _Kept, run: Run) -> None:
        self.kept, self.run = kept, run

    def build(self, config: SelfAttentionConfig, params: Mapping[str, Array], *_: str) -> Any:
        return self.kept.build(self.run, config, params)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kept.backend, name)


def main() -> int:
    """Measure backends, each in a process of its own, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "backends", nargs="*", metavar="BACKEND", help=f"of {', '.join(REGISTRY)}; by default all"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--in-process", metavar="TARGET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        sys.stdout.write("\n" + json.dumps(measure(resolve(options.in_process), options.seeds)))
        return 0
    if unknown := [name for name in options.backends if name not in REGISTRY]:
        parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(REGISTRY)}")
    for name in options.backends or REGISTRY:
        registered = REGISTRY[name]
        command = [sys.executable, "-m", __spec__.name, "--in-process", registered.target]
        done = subprocess.run(
            [*command, "--seeds", str(options.seeds)],
            env=environment(registered.environment),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        sys.stdout.write(f"{name}: {found['runs']} runs, {len(found['false_alarms'])} false alarms\n")
        _keep(name, found)
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    return int(any(found["false_alarms"] for found in kept["backends"].values()))


def _keep(name: str, found: Mapping[str, Any]) -> None:
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"backends": {}}
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    measured = {
        "date": today,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    backends = kept["backends"] | {name: {**measured, **found}}
    content = {
        "limits": dict(FACTORS),
        "backends": {each: backends[each] for each in REGISTRY if each in backends},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_atomically(RESULT, f"{text}\n".encode(), overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
