"""Measures how close correct backends come to the limits.

    python -m selfattn_core.conformance.release.calibrate [--added] [BACKEND …]

Every backend answers every case that has a noise floor, in each of its dtypes, for 200 seeds. The layout alternates. A
training trajectory has 200 steps, so it runs only for every tenth seed. The result is `calibration.json` in this folder:
the worst error in noise floors by backend, family and dtype, and the false alarms. There must be no false alarms. If
backends are named, only their parts of the file are replaced.

With `--added`, only the runs that the last measurement of all backends did not ask are measured, for fewer seeds. They are
the part "added" of the file, until all backends are measured again.
"""

import argparse
import datetime as dt
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.backends import REGISTRY, resolve
from selfattn_core.conformance.cases.case import LAYOUTS, Run
from selfattn_core.conformance.cases.computations import COMPUTATIONS
from selfattn_core.conformance.cases.families import FAMILIES
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.environment import cores, environment
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.protocol import Backend, Build
from selfattn_core.conformance.verdicts.tolerance import (
    ALLOWANCES,
    CAPS,
    DEVIATION,
    FACTORS,
    NARROW_ALLOWANCE,
    NARROW_DEVIATION,
    TERMS_CAP,
)
from selfattn_core.files.writing import write_atomically

__all__ = [
    "ADDED_SEEDS",
    "RESULT",
    "SEEDS",
    "TRAJECTORY_TURNS",
    "added_runs",
    "calibrated_runs",
    "kept_results",
    "measure",
    "measured_here",
    "names_of",
    "policy",
    "write_results",
]

RESULT = Path(__file__).with_name("calibration.json")
SEEDS = 200
ADDED_SEEDS = 20
TRAJECTORY_TURNS = 10

_MOST_POSITIONS = 100


def calibrated_runs() -> list[Run]:
    """The calibrated runs: values, at sizes that are fast enough for 200 seeds, and one layout for each dtype."""
    return [
        run
        for run in all_runs()
        if FAMILIES[run.case.family].calibrated
        and COMPUTATIONS[run.case.computation].values
        and run.case.shape[1] * run.case.shape[2] <= _MOST_POSITIONS
        and run.layout == LAYOUTS[0]
    ]


def names_of(runs: Sequence[Run]) -> list[str]:
    """The runs as the file names them: case and dtype.

    Args:
        runs: runs in one layout for each dtype.
    """
    return [f"{run.case.id}/{run.dtype}" for run in runs]


def added_runs() -> list[Run]:
    """The calibrated runs that the last measurement of all backends did not ask."""
    asked = set(kept_results()["asked"])
    runs = calibrated_runs()
    return [run for run, name in zip(runs, names_of(runs), strict=True) if name not in asked]


def policy() -> dict[str, dict[str, float]]:
    """The calibrated limits. The file stores them, because its errors mean nothing for other limits.

    The limits of the family "shipped" are not included, because it is not calibrated.
    """
    return {
        "limits": dict(FACTORS),
        "allowances": {**ALLOWANCES, "16 bits": NARROW_ALLOWANCE},
        "deviations": {"terms": DEVIATION, "terms in 16 bits": NARROW_DEVIATION},
        "caps": {**CAPS, "terms": TERMS_CAP},
    }


def measure(backend: Backend, seeds: int, runs: Sequence[Run] | None = None) -> dict[str, Any]:
    """The worst errors of a backend, in this process.

    Args:
        backend: the backend.
        seeds: the number of seeds.
        runs: the runs. By default `calibrated_runs()`.
    """
    began = time.monotonic()
    layouts, builds = backend.layouts(), _one_layer_for_each(backend)
    asked_for = calibrated_runs() if runs is None else runs
    worst: dict[str, dict[str, Any]] = {}
    alarms: list[str] = []
    asked = 0
    for seed in range(1, seeds + 1):
        layout = layouts[seed % len(layouts)]
        turn = [
            replace(run, layout=layout)
            for run in asked_for
            if run.case.computation != "trajectory" or seed % TRAJECTORY_TURNS == 0
        ]
        for outcome in judge_in_process(backend, turn, seed, builds=builds):
            run = outcome.run
            if outcome.status == "unclaimed":
                continue
            asked += 1
            key = f"{run.case.family}/{run.dtype}"
            if outcome.status != "pass":
                alarms.append(f"{run.id}, seed {seed}: {outcome.message}")
            if outcome.verdicts and outcome.ratio >= worst.get(key, {"floors": 0.0})["floors"]:
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


def _one_layer_for_each(backend: Backend) -> Callable[[Run], Build]:
    """Returns the function that builds the layer of a run. A backend with `update` keeps one layer for all seeds of a run.

    Its framework then compiles that layer only once.
    """
    kept: Any = backend
    if not hasattr(kept, "update"):
        return lambda _: backend.build
    models: dict[Run, Any] = {}

    def builds(run: Run) -> Build:
        def build(config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str) -> Any:
            if run not in models:
                models[run] = backend.build(config, params, dtype, layout)
            models[run] = kept.update(models[run], params)
            return models[run]

        return build

    return builds


def main() -> int:
    """Measure each backend in a separate process, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "backends", nargs="*", metavar="BACKEND", help=f"some of {', '.join(REGISTRY)}; by default all"
    )
    parser.add_argument("--added", action="store_true", help="only what the last measurement did not ask")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--in-process", metavar="TARGET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    seeds = options.seeds or (ADDED_SEEDS if options.added else SEEDS)
    if options.in_process:
        runs = added_runs() if options.added else None
        sys.stdout.write("\n" + json.dumps(measure(resolve(options.in_process), seeds, runs)))
        return 0
    if unknown := [name for name in options.backends if name not in REGISTRY]:
        parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(REGISTRY)}")
    names = options.backends or list(REGISTRY)
    processes = min(2, len(names), cores())

    def measured(name: str, programs: str) -> tuple[str, dict[str, Any]]:
        registered = REGISTRY[name]
        command = [sys.executable, "-m", __spec__.name, "--in-process", registered.target]
        done = subprocess.run(
            [*command, "--seeds", str(seeds), *(["--added"] if options.added else [])],
            env=environment(registered.in_full, processes=processes, programs=Path(programs)),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return name, json.loads(done.stdout.splitlines()[-1])

    with (
        tempfile.TemporaryDirectory(prefix="selfattn-programs-") as folder,
        ThreadPoolExecutor(processes) as pool,
    ):
        for name, found in pool.map(measured, names, repeat(folder)):
            sys.stdout.write(f"{name}: {found['runs']} runs, {len(found['false_alarms'])} false alarms\n")
            sys.stdout.flush()
            _keep(name, found, added=options.added)
    if names == list(REGISTRY) and not options.added:
        every = kept_results() | {"asked": names_of(calibrated_runs())}
        write_results({part: value for part, value in every.items() if part != "added"})
    kept = kept_results()
    measured_backends = [*kept["backends"].values(), *kept.get("added", {}).values()]
    return int(any(found["false_alarms"] for found in measured_backends))


def kept_results() -> dict[str, Any]:
    """The content of `calibration.json`."""
    kept: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    return kept


def write_results(results: Mapping[str, Any]) -> None:
    """Write `calibration.json` with the limits of today.

    Args:
        results: "backends" by name, "asked" of them, "added" by name of a backend, and "right" from `release.right`.
    """

    def in_order(part: str) -> dict[str, Any]:
        measured = results.get(part, {})
        return {each: measured[each] for each in REGISTRY if each in measured}

    content = {
        **policy(),
        "backends": in_order("backends"),
        **({"added": in_order("added")} if "added" in results else {}),
        **{part: results[part] for part in ("asked", "right") if part in results},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_atomically(RESULT, f"{text}\n".encode(), overwrite=True)


def measured_here() -> dict[str, str]:
    """The day and the machine of a measurement."""
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _keep(name: str, found: Mapping[str, Any], *, added: bool = False) -> None:
    results = kept_results()
    part = "added" if added else "backends"
    write_results({**results, part: results.get(part, {}) | {name: {**measured_here(), **found}}})


if __name__ == "__main__":
    sys.exit(main())
