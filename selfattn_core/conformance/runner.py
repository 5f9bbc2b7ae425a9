"""Runs backends, each in its own process, and compares what they answer with the spec."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from selfattn_core.conformance.backend import REGISTRY, Registered
from selfattn_core.conformance.cases import CASES, DTYPES, Case, inputs
from selfattn_core.conformance.tolerance import Expectation, Verdict, expect, judge
from selfattn_core.installed import missing_modules

__all__ = ["BackendReport", "Outcome", "Run", "compare", "run_backend"]

Array = NDArray[Any]
Status = Literal["pass", "fail", "error", "unclaimed"]

LAYOUTS = ("channels_last", "channels_first")

_ENVIRONMENT: Mapping[str, str] = {
    # float64 needs x64 in JAX, and full float32 products need the reduced formats of accelerators off. They are set
    # here, in a process that only checks, and nowhere in the library.
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "NVIDIA_TF32_OVERRIDE": "0",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclass(frozen=True)
class Run:
    """One case in one dtype and layout."""

    case: Case
    dtype: str
    layout: str


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Args:
        run: which.
        status: "error" is a crash, an exception or a timeout; "unclaimed" an ability or layout that the backend
            does not have.
        verdicts: one for each quantity that was compared.
        message: why it is not a pass.
    """

    run: Run
    status: Status
    verdicts: tuple[Verdict, ...] = ()
    message: str = ""

    @property
    def ratio(self) -> float:
        """The worst error in noise floors."""
        return max((verdict.ratio for verdict in self.verdicts), default=0.0)


@dataclass(frozen=True)
class BackendReport:
    """Everything about one backend.

    Args:
        name: as it was asked for.
        versions: of the libraries underneath.
        outcomes: one for each run; empty if it did not start.
        missing: modules that are not installed.
        extra: the extra of this library that installs them.
        error: why it did not start.
    """

    name: str
    versions: Mapping[str, str] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    missing: tuple[str, ...] = ()
    extra: str = ""
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether it started, answered everything that it claims, and every answer was right."""
        answered = [outcome for outcome in self.outcomes if outcome.status != "unclaimed"]
        return not self.error and bool(answered) and all(outcome.status == "pass" for outcome in answered)


def all_runs(cases: Iterable[Case] = CASES) -> list[Run]:
    """Every case in every dtype and layout; a table of parameters has no layout."""
    return [
        Run(case, dtype, layout)
        for case in cases
        for dtype in DTYPES
        for layout in LAYOUTS
        if case.family != "params" or layout == LAYOUTS[0]
    ]


def run_backend(
    name: str, *, seed: int = 0, runs: Sequence[Run] | None = None, timeout: float = 900.0
) -> BackendReport:
    """Start a backend in its own process, ask it everything and compare.

    Args:
        name: one of `REGISTRY`, or "module:object" for another one.
        seed: of the inputs.
        runs: which; by default all.
        timeout: seconds after which the process is ended, and what it has not answered is an error.

    Raises:
        ValueError: if the name is neither.
    """
    if name not in REGISTRY and ":" not in name:
        raise ValueError(
            f"backend {name!r}: expected one of {', '.join(REGISTRY)}, or module:object for your own."
        )
    registered = REGISTRY.get(name, Registered(name, (), ""))
    missing = missing_modules(registered.requires)
    if missing:
        return BackendReport(name, missing=tuple(missing), extra=registered.extra)
    runs = all_runs() if runs is None else runs
    with tempfile.TemporaryDirectory(prefix="selfattn-conform-") as scratch:
        folder = Path(scratch)
        ending = _work(registered, folder, runs, seed, timeout)
        return _read(name, folder, runs, seed, ending)


def compare(run: Run, found: Mapping[str, Array], seed: int = 0) -> Outcome:
    """Judge the answers of one run.

    Args:
        run: which.
        found: array by quantity.
        seed: of the inputs.
    """
    if run.case.family == "params":
        return _compare_bits(run, found, inputs(run.case, run.dtype, seed).params)
    wanted = _expectations(run.case, run.dtype, seed)
    if problem := _names(found, wanted):
        return Outcome(run, "fail", (), problem)
    verdicts = tuple(judge(name, np.asarray(found[name]), wanted[name], run.dtype) for name in wanted)
    messages = [verdict.message for verdict in verdicts if not verdict.passed]
    return Outcome(run, "fail" if messages else "pass", verdicts, "; ".join(messages))


@cache
def _expectations(case: Case, dtype: str, seed: int) -> Mapping[str, Expectation]:
    return expect(case, dtype, seed)


def _compare_bits(run: Run, found: Mapping[str, Array], wanted: Mapping[str, Array]) -> Outcome:
    if problem := _names(found, wanted):
        return Outcome(run, "fail", (), problem)
    verdicts = []
    for name, want in wanted.items():
        got = np.asarray(found[name])
        same = got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()
        message = (
            ""
            if same
            else f"{name}: {got.dtype} {got.shape} is not bit for bit the {want.dtype} {want.shape} put in"
        )
        verdicts.append(Verdict(name, 0.0 if same else np.inf, 0.0 if same else np.inf, same, message))
    messages = [verdict.message for verdict in verdicts if not verdict.passed]
    return Outcome(run, "fail" if messages else "pass", tuple(verdicts), "; ".join(messages))


def _names(found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    parts = [f"missing {', '.join(missing)}"] if missing else []
    parts += [f"unexpected {', '.join(extra)}"] if extra else []
    return "; ".join(parts)


def _work(registered: Registered, folder: Path, runs: Sequence[Run], seed: int, timeout: float) -> str:
    """Run the worker to its end; says how it ended if not by itself."""
    job = {
        "target": registered.target,
        "folder": str(folder),
        "seed": seed,
        "runs": [{"case": run.case.id, "dtype": run.dtype, "layout": run.layout} for run in runs],
    }
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    with (folder / "output.txt").open("wb") as output:
        try:
            process = subprocess.run(
                [sys.executable, "-m", "selfattn_core.conformance.worker", str(job_file)],
                env={**os.environ, **_ENVIRONMENT, **registered.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"the process was ended after {timeout:g} s"
    code = process.returncode
    if code == 0:
        return ""
    return f"the process died by signal {-code}" if code < 0 else f"the process exited with code {code}"


def _read(name: str, folder: Path, runs: Sequence[Run], seed: int, ending: str) -> BackendReport:
    lines = list(_lines(folder / "progress.jsonl"))
    ready = next((line for line in lines if line["event"] == "ready"), None)
    if ready is None:
        failed = next((line["error"] for line in lines if line["event"] == "failed"), "")
        return BackendReport(name, error=failed.strip() or f"{ending or 'it did not start'}: {_tail(folder)}")
    events = {line["run"]: line for line in lines if "run" in line}
    outcomes = []
    for index, run in enumerate(runs):
        event = events.get(index, {"event": "unreached"})
        if run.case.family not in ready["claims"] or run.layout not in ready["layouts"]:
            outcomes.append(Outcome(run, "unclaimed"))
        elif event["event"] == "answered":
            with np.load(folder / f"{index}.npz") as file:
                outcomes.append(compare(run, dict(zip(event["names"], file.values(), strict=True)), seed))
        elif event["event"] == "raised":
            outcomes.append(Outcome(run, "error", (), event["error"].strip()))
        elif event["event"] == "started":
            outcomes.append(
                Outcome(run, "error", (), f"{ending or 'it ended'} in this case: {_tail(folder)}")
            )
        else:
            outcomes.append(Outcome(run, "error", (), f"not reached: {ending or 'the process ended early'}"))
    return BackendReport(name, ready["versions"], tuple(outcomes))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _tail(folder: Path) -> str:
    """The last that the process printed."""
    text = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip()
    return " | ".join(text.splitlines()[-3:]) or "it printed nothing"
