"""Measures how close the right implementations come to the limits.

    python -m selfattn_core.conformance.release.right [HOME …]

Every right implementation answers the runs of the calibration for 200 seeds: derivatives in float32 and 16 bits at every
seed, all other values at every tenth. The floors of float64 come from those of float32, and values of the function are in
every derivative. Trainings are not included, because the six backends answer them.

The result is the part "right" of `calibration.json`: for each implementation the worst error of each dtype in noise floors,
and the false alarms. There must be none. It is written after every tenth seed, so that a measurement that is interrupted is
a measurement of fewer seeds. If homes are named, only their implementations are measured again.
"""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selfattn_core.conformance.backends import REGISTRY
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.execution.environment import environment
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.release.calibrate import (
    SEEDS,
    calibrated_runs,
    kept_results,
    measured_here,
    write_results,
)
from selfattn_core.conformance.right import RightImplementation

__all__ = ["HOMES", "VALUE_TURNS", "implementations", "measure", "tried_runs"]

HOMES: Mapping[str, str] = {
    "selfattn_core.conformance.right": "",
    "selfattn_torch.conformance.right": "torch",
}
"""The modules with right implementations, and the built-in backend in whose environment they run. Empty for numpy."""

VALUE_TURNS = 10


def implementations(home: str) -> tuple[RightImplementation, ...]:
    """The right implementations of a module.

    Args:
        home: one of `HOMES`.

    Example:
        >>> len(implementations("selfattn_core.conformance.right")) > 20
        True
    """
    found: tuple[RightImplementation, ...] = importlib.import_module(home).RIGHT
    return found


def tried_runs(seed: int) -> list[Run]:
    """The runs that right implementations answer at a seed.

    Args:
        seed: the seed.
    """
    return [
        run
        for run in calibrated_runs()
        if run.case.computation != "trajectory"
        and ((run.case.order and run.dtype != "float64") or seed % VALUE_TURNS == 0)
    ]


def measure(
    rights: Sequence[RightImplementation],
    seeds: Sequence[int],
    runs: Sequence[Run] | None = None,
    *,
    tell: Callable[[str], None] = lambda _: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """The worst errors of right implementations, by name, in this process.

    Args:
        rights: the implementations.
        seeds: the seeds.
        runs: the runs at each seed. By default `tried_runs`.
        tell: called with each false alarm at once.
        keep: called with the result so far after every tenth seed.
    """
    backends = {right.name: right.make() for right in rights}
    found: dict[str, Any] = {
        name: {"seeds": 0, "runs": 0, "false_alarms": [], "worst": {}} for name in backends
    }
    for seed in seeds:
        asked = tried_runs(seed) if runs is None else runs
        for name, backend in backends.items():
            kept = found[name]
            kept["seeds"] += 1
            for outcome in judge_in_process(backend, asked, seed):
                if outcome.status == "unclaimed":
                    continue
                kept["runs"] += 1
                if outcome.status != "pass":
                    alarm = f"{outcome.run.id}, seed {seed}: {outcome.message}"
                    kept["false_alarms"].append(alarm)
                    tell(f"{name}: {alarm}")
                before = kept["worst"].get(outcome.run.dtype, {"floors": 0.0})["floors"]
                if outcome.verdicts and outcome.ratio >= before:
                    verdict = max(outcome.verdicts, key=lambda verdict: verdict.ratio)
                    kept["worst"][outcome.run.dtype] = {
                        "floors": round(outcome.ratio, 3),
                        "case": outcome.run.case.id,
                        "quantity": verdict.quantity,
                        "seed": seed,
                    }
        if seed % VALUE_TURNS == 0:
            keep(found)
    keep(found)
    return found


def main() -> int:
    """Measure each home in a separate process, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "homes", nargs="*", metavar="HOME", help=f"some of {', '.join(HOMES)}; by default all"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--in-process", metavar="HOME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        measure(implementations(options.in_process), range(1, options.seeds + 1), tell=_tell, keep=_print)
        return 0
    if unknown := [home for home in options.homes if home not in HOMES]:
        parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(HOMES)}")
    for home in options.homes or HOMES:
        backend = HOMES[home]
        command = [sys.executable, "-m", __spec__.name, "--in-process", home, "--seeds", str(options.seeds)]
        variables = environment(REGISTRY[backend].in_full if backend else {})
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                found = json.loads(line)
                _keep(home, found)
        if process.returncode:
            return process.returncode
        alarms = sum(len(each["false_alarms"]) for each in found.values())
        runs = sum(each["runs"] for each in found.values())
        sys.stdout.write(f"{home}: {len(found)} implementations, {runs} runs, {alarms} false alarms\n")
        sys.stdout.flush()
    kept = kept_results()["right"]["implementations"]
    return int(any(each["false_alarms"] for each in kept.values()))


def _keep(home: str, found: Mapping[str, Any]) -> None:
    results = kept_results()
    others = results.get("right", {}).get("implementations", {})
    merged = {name: each for name, each in others.items() if each["home"] != home}
    merged |= {name: {"home": home, **each} for name, each in found.items()}
    right = {**measured_here(), "implementations": dict(sorted(merged.items()))}
    write_results({**results, "right": right})


def _print(found: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def _tell(alarm: str) -> None:
    sys.stderr.write(f"{alarm}\n")


if __name__ == "__main__":
    sys.exit(main())
