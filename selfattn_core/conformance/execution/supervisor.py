"""The processes of a backend: started, watched, ended where they stand still, and their answers compared."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.execution.devices import Device
from selfattn_core.conformance.protocol import Claims
from selfattn_core.conformance.results import BackendReport, Outcome
from selfattn_core.conformance.verdicts.compare import compare
from selfattn_core.conformance.verdicts.product_formats import coarsest

__all__ = ["Session"]

_STARTUP_SECONDS = 300.0
_MOST_PROCESSES = 12
_MOST_TIMEOUTS = 3
_LOOK_AGAIN_SECONDS = 0.02


class Session:
    """The processes that are asked the same runs, one after the other until every run has an answer or an end.

    Args:
        target: "module:object".
        variables: the environment of a process.
        folder: for what the processes write, empty.
        runs: to ask.
        seed: of the inputs.
        timeout: seconds that one run may take.
        stop: set where nobody waits for the answers any more.
        device: to compute on; empty for the CPU of a backend that takes one.
        shipped: whether the format of the framework's own products is measured.
    """

    def __init__(
        self,
        target: str,
        variables: Mapping[str, str],
        folder: Path,
        runs: Sequence[Run],
        seed: int,
        timeout: float,
        stop: Event,
        *,
        device: str = "",
        shipped: bool = False,
    ) -> None:
        self.target, self.variables = target, variables
        self.folder, self.seed, self.timeout = folder, seed, timeout
        self.runs, self.stop = runs, stop
        self.device, self.shipped = device, shipped
        self.events: dict[int, dict[str, Any]] = {}
        self.ready: dict[str, Any] | None = None
        self.precisions: dict[str, str] = {}
        self.failure = ""
        self.refused = self.absent = False
        self.timeouts = 0

    def report(self, name: str) -> BackendReport:
        """Start processes until all is answered, and compare.

        Raises:
            CancelledError: if it was told to stop.
        """
        for number in range(_MOST_PROCESSES):
            if not (pending := self.pending()):
                break
            if not self.work(number, pending):
                break
        if self.ready is None:
            return BackendReport(name, error=self.failure, refused=self.refused, absent=self.absent)
        return BackendReport(
            name,
            self.ready["versions"],
            tuple(self.ready["claims"]),
            tuple(self.ready["layouts"]),
            tuple(self.ready["dtypes"]),
            tuple(self.outcome(index) for index in range(len(self.runs))),
            device=Device(**self.ready["device"], precisions=self.precisions),
        )

    def pending(self) -> list[int]:
        """Runs that have no end yet."""
        waiting = [index for index in range(len(self.runs)) if index not in self.events]
        if self.ready is None:
            return waiting
        return [index for index in waiting if self.claims.covers(self.runs[index])]

    @property
    def claims(self) -> Claims:
        """What the backend claims, which has started."""
        ready = self.ready or {}
        return Claims(ready["claims"], ready["layouts"], ready["dtypes"])

    def work(self, number: int, pending: list[int]) -> bool:
        """One process, to its end; whether another one would be of use."""
        progress = self.folder / f"progress-{number}.jsonl"
        output = self.folder / f"output-{number}.txt"
        ending, hung = self.watch(self.start(number, pending, progress, output), progress)
        lines = _lines(progress)
        finished = bool(lines) and lines[-1]["event"] == "finished"
        if not finished:
            ending = ending or "the process exited with code 0"
        ready = next((line for line in lines if line["event"] == "ready"), None)
        self.ready = self.ready or ready
        if ready is None:
            failed = next((line for line in lines if line["event"] == "failed"), {})
            self.refused, self.absent = failed.get("refused", False), failed.get("absent", False)
            died = f"{ending} while the backend was imported: {_tail(output)}"
            self.failure = failed.get("error", "").strip() or died
            return False
        measured = next((line for line in lines if line["event"] == "measured"), None)
        self.precisions = self.precisions or (measured or {}).get("precisions", {})
        if lines[-1]["event"] == "measuring":
            ending = f"{ending} while the framework's own products were measured: {_tail(output)}"
        ended = {line["run"]: line for line in lines if "run" in line}
        for index, event in ended.items():
            if event["event"] == "started":
                words = f"{ending} in this case: {_tail(output)}"
                self.events[index] = {"event": "raised", "error": words}
                self.timeouts = self.timeouts + 1 if hung else 0
            else:
                self.events[index] = event
                self.timeouts = 0
        self.failure = ending
        if self.timeouts == _MOST_TIMEOUTS:
            self.failure = f"given up after {_MOST_TIMEOUTS} timeouts in a row, of {self.timeout:g} s each"
            return False
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
            "device": self.device,
            "shipped": self.shipped,
            "runs": runs,
        }
        job_file = self.folder / f"job-{number}.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        with output.open("wb") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "selfattn_core.conformance.execution.worker", str(job_file)],
                env=dict(self.variables),
                # Never written to: it ends with this process, and the worker with it.
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def watch(self, process: subprocess.Popen[bytes], progress: Path) -> tuple[str, bool]:
        """Wait until the process ends, or end it where it stands still; how it ended if not by itself, and if so."""
        size, since = -1, time.monotonic()
        try:
            while process.poll() is None:
                if self.stop.is_set():
                    raise CancelledError
                now = time.monotonic()
                grown = progress.stat().st_size if progress.exists() else 0
                if grown != size:
                    size, since = grown, now
                limit = self.timeout if size > 0 else _STARTUP_SECONDS
                if now - since > limit:
                    return f"the process was ended after {limit:g} s", True
                time.sleep(_LOOK_AGAIN_SECONDS)
        finally:
            process.kill()
            # It waits, and closes what was held open.
            process.communicate()
        code = process.returncode
        if code == 0:
            return "", False
        how = f"died by signal {-code}" if code < 0 else f"exited with code {code}"
        return f"the process {how}", False

    def outcome(self, index: int) -> Outcome:
        """What came of a run, and whether that was expected."""
        run = self.runs[index]
        if not self.claims.covers(run):
            return Outcome(run, "unclaimed")
        run = replace(run, layout=self.claims.layout(run))
        event = self.events.get(index, {"event": "unreached"})
        if event["event"] == "answered":
            with np.load(self.folder / f"{index}.npz") as file:
                label = coarsest(self.precisions)
                found = compare(run, dict(zip(event["names"], file.values(), strict=True)), self.seed, label)
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
        """The outcome of a run whose failure the backend may have announced."""
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
