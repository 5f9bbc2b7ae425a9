"""Runs backends, each in its own process, and compares what they answer with the spec."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core.conformance.backend import REGISTRY, Registered
from selfattn_core.conformance.cases import LEVELS, WHERE_CLAIMED, Case, Level, through
from selfattn_core.conformance.compare import compare
from selfattn_core.conformance.environment import environment
from selfattn_core.conformance.outcome import Outcome
from selfattn_core.conformance.runs import Run, all_runs, chosen_layout, is_claimed
from selfattn_core.installed import missing_modules

__all__ = [
    "BackendReport",
    "Outcome",
    "Run",
    "all_runs",
    "compare",
    "run_backend",
    "run_backends",
]

Array = NDArray[Any]

_STARTUP_SECONDS = 300.0
_MOST_PROCESSES = 12
_LOOK_AGAIN_SECONDS = 0.02


@dataclass(frozen=True)
class BackendReport:
    """Everything about one backend.

    Args:
        name: as it was asked for.
        versions: of the libraries underneath.
        claims: the abilities that it claims.
        layouts: that it computes in.
        dtypes: that it computes in.
        outcomes: one for each run, in order; empty if it did not start.
        missing: modules that are not installed.
        extra: the extra of this library that installs them.
        error: why it did not start.
        refused: whether that is because what was named is no backend.
        seconds: that it took.
    """

    name: str
    versions: Mapping[str, str] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    missing: tuple[str, ...] = ()
    extra: str = ""
    error: str = ""
    refused: bool = False
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it started, answered everything that it claims, and every answer was right or its failure expected."""
        answered = [outcome for outcome in self.outcomes if outcome.status != "unclaimed"]
        right = ("pass", "expected-failure")
        return not self.error and bool(answered) and all(outcome.status in right for outcome in answered)

    def conformant(self, level: Level) -> bool:
        """Whether it is conformant at a level.

        That is: every case of the level, and of those below it, was run and passed in at least one dtype and layout,
        and none of their runs failed, be it expected or not. What a backend does not claim it is not conformant in; but
        of the family dtype, cases that exist in none of its dtypes are not asked for, if there is one that does.
        """
        families = set(through(level)) - set(WHERE_CLAIMED)
        asked = [
            outcome
            for outcome in self.outcomes
            if outcome.run.case.family in families and self._has_dtype_for(outcome.run.case)
        ]
        passed = {outcome.run.case.id for outcome in asked if outcome.status == "pass"}
        bad = any(outcome.status not in ("pass", "unclaimed") for outcome in asked)
        ran = {outcome.run.case.family for outcome in asked}
        return ran == families and not bad and passed == {outcome.run.case.id for outcome in asked}

    def _has_dtype_for(self, case: Case) -> bool:
        return case.family != "dtype" or not set(case.dtypes).isdisjoint(self.dtypes)

    @property
    def level(self) -> Level | None:
        """The highest level that it is conformant at."""
        reached = [level for level in LEVELS if self.conformant(level)]
        return reached[-1] if reached else None


def run_backend(
    name: str,
    *,
    seed: int = 0,
    runs: Sequence[Run] | None = None,
    timeout: float = 120.0,
    processes: int = 1,
    programs: Path | None = None,
) -> BackendReport:
    """Start a backend in its own process, ask it everything and compare.

    A run that hangs or takes the process down is an error in that run, and the runs after it are asked of a new process.

    Args:
        name: one of `REGISTRY`, or "module:object" for another one.
        seed: of the inputs.
        runs: which; by default all.
        timeout: seconds that one run may take.
        processes: that run at once, as for `environment`.
        programs: where JAX keeps what it has compiled, as for `environment`.

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
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="selfattn-conform-") as scratch:
        variables = environment(registered.environment, processes=processes, programs=programs)
        asked = all_runs() if runs is None else runs
        report = _Session(registered.target, variables, Path(scratch), asked, seed, timeout).report(name)
    return replace(report, seconds=time.monotonic() - began)


def run_backends(
    names: Sequence[str],
    *,
    seed: int = 0,
    level: Level = "deploy",
    timeout: float = 120.0,
    tell: Callable[[str, str], None] = lambda _, __: None,
) -> list[BackendReport]:
    """Run several backends, two at a time where there is more than one core.

    Args:
        names: as for `run_backend`.
        seed: of the inputs.
        level: how far to go.
        timeout: seconds that one run may take.
        tell: called with a name and what is happening to it, from another thread.

    Returns:
        One report for each name, in their order.
    """
    runs = all_runs(level=level)
    processes = min(2, len(names), os.cpu_count() or 1)

    def one(name: str, programs: str) -> BackendReport:
        report = run_backend(
            name, seed=seed, runs=runs, timeout=timeout, processes=processes, programs=Path(programs)
        )
        tell(name, _summary(report))
        return report

    with (
        tempfile.TemporaryDirectory(prefix="selfattn-programs-") as programs,
        ThreadPoolExecutor(max(1, processes)) as pool,
    ):
        return list(pool.map(one, names, repeat(programs)))


def _summary(report: BackendReport) -> str:
    if report.missing:
        return f"{', '.join(report.missing)} not installed"
    if report.error:
        return "did not start"
    counts = Counter(outcome.status for outcome in report.outcomes)
    return ", ".join(f"{count} {status}" for status, count in counts.items()) + f" in {report.seconds:.0f} s"


class _Session:
    """The processes of one backend, one after the other until every run has an answer or an end."""

    def __init__(
        self,
        target: str,
        variables: Mapping[str, str],
        folder: Path,
        runs: Sequence[Run],
        seed: int,
        timeout: float,
    ) -> None:
        self.target, self.variables = target, variables
        self.folder, self.seed, self.timeout = folder, seed, timeout
        self.runs = runs
        self.events: dict[int, dict[str, Any]] = {}
        self.ready: dict[str, Any] | None = None
        self.failure = ""
        self.refused = False

    def report(self, name: str) -> BackendReport:
        """Start processes until all is answered, and compare."""
        for number in range(_MOST_PROCESSES):
            if not (pending := self.pending()):
                break
            if not self.work(number, pending):
                break
        if self.ready is None:
            return BackendReport(name, error=self.failure, refused=self.refused)
        return BackendReport(
            name,
            self.ready["versions"],
            tuple(self.ready["claims"]),
            tuple(self.ready["layouts"]),
            tuple(self.ready["dtypes"]),
            tuple(self.outcome(index) for index in range(len(self.runs))),
        )

    def pending(self) -> list[int]:
        """Runs that have no end yet."""
        waiting = [index for index in range(len(self.runs)) if index not in self.events]
        if self.ready is None:
            return waiting
        return [index for index in waiting if self.claimed(self.runs[index])]

    def claimed(self, run: Run) -> bool:
        ready = self.ready or {}
        return is_claimed(run, ready["claims"], ready["layouts"], ready["dtypes"])

    def work(self, number: int, pending: list[int]) -> bool:
        """One process, to its end; whether another one would be of use."""
        progress = self.folder / f"progress-{number}.jsonl"
        output = self.folder / f"output-{number}.txt"
        ending = self.watch(self.start(number, pending, progress, output), progress)
        lines = _lines(progress)
        ready = next((line for line in lines if line["event"] == "ready"), None)
        self.ready = self.ready or ready
        if ready is None:
            failed = next((line for line in lines if line["event"] == "failed"), {})
            self.refused = failed.get("refused", False)
            self.failure = (
                failed.get("error", "").strip() or f"{ending or 'it did not start'}: {_tail(output)}"
            )
            return False
        ended = {line["run"]: line for line in lines if "run" in line}
        for index, event in ended.items():
            if event["event"] == "started":
                words = f"{ending or 'the process ended early'} in this case: {_tail(output)}"
                self.events[index] = {"event": "raised", "error": words}
            else:
                self.events[index] = event
        self.failure = ending or "the process ended early"
        return bool(ended)

    def start(self, number: int, pending: list[int], progress: Path, output: Path) -> subprocess.Popen[bytes]:
        """A worker for these runs."""
        runs = [
            {"index": index, "case": run.case.id, "dtype": run.dtype, "layout": run.layout}
            for index, run in ((index, self.runs[index]) for index in pending)
        ]
        job = {
            "target": self.target,
            "folder": str(self.folder),
            "progress": str(progress),
            "seed": self.seed,
            "runs": runs,
        }
        job_file = self.folder / f"job-{number}.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        with output.open("wb") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "selfattn_core.conformance.worker", str(job_file)],
                env=dict(self.variables),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def watch(self, process: subprocess.Popen[bytes], progress: Path) -> str:
        """Wait until the process ends, or end it where it stands still; says how it ended if not by itself."""
        size, since = -1, time.monotonic()
        try:
            while process.poll() is None:
                now = time.monotonic()
                grown = progress.stat().st_size if progress.exists() else 0
                if grown != size:
                    size, since = grown, now
                limit = self.timeout if size > 0 else _STARTUP_SECONDS
                if now - since > limit:
                    return f"the process was ended after {limit:g} s"
                time.sleep(_LOOK_AGAIN_SECONDS)
        finally:
            process.kill()
            process.wait()
        code = process.returncode
        if code == 0:
            return ""
        return f"the process died by signal {-code}" if code < 0 else f"the process exited with code {code}"

    def outcome(self, index: int) -> Outcome:
        """What came of a run, and whether that was expected."""
        run = self.runs[index]
        if not self.claimed(run):
            return Outcome(run, "unclaimed")
        run = replace(run, layout=chosen_layout(run, (self.ready or {})["layouts"]))
        event = self.events.get(index, {"event": "unreached"})
        if event["event"] == "answered":
            with np.load(self.folder / f"{index}.npz") as file:
                found = compare(run, dict(zip(event["names"], file.values(), strict=True)), self.seed)
        elif event["event"] == "declined":
            return Outcome(run, "unclaimed", (), event["reason"])
        elif event["event"] == "malformed":
            found = Outcome(run, "fail", (), event["error"])
        elif event["event"] == "raised":
            found = Outcome(run, "error", (), event["error"].strip())
        else:
            found = Outcome(run, "error", (), f"not reached: {self.failure}")
        return self.as_expected(replace(found, seconds=event.get("seconds", 0.0)))

    def as_expected(self, outcome: Outcome) -> Outcome:
        expected: Mapping[str, list[str]] = (self.ready or {}).get("expected_failures", {})
        for key, (reason, link) in expected.items():
            if outcome.run.is_named(key):
                # A wrong answer was announced, not that there is none: a crash may hide any other.
                if outcome.status == "error":
                    return outcome
                if outcome.status == "fail":
                    return replace(outcome, status="expected-failure", reason=reason, link=link)
                stale = f"passes, and was expected to fail ({reason}; {link}): take {key} out of expected_failures"
                return replace(outcome, status="fail", message=stale, reason=reason, link=link)
        return outcome


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that a process may have died writing."""
    if not path.exists():
        return []
    written = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in written]


def _tail(path: Path) -> str:
    """The last that the process printed."""
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    return " | ".join(text.splitlines()[-3:]) or "it printed nothing"
